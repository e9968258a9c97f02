"""Protects the operator port: it listens on loopback, limits what it reads, and takes alerts only from Alertmanager."""

import json
import socket
import time
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.system.conftest import PATIENCE, wait_until

pytestmark = pytest.mark.timeout(600)
TOKEN, ALERT_TOKEN = "a-token-of-a-client", "a-token-of-alertmanager"
ALERT = {
    "status": "firing",
    "labels": {"alertname": "SrsysDrift", "feature": "noise"},
    "startsAt": "2026-11-24T17:30:25Z",
    "annotations": {"summary": "noise has drifted"},
}


@pytest.fixture(scope="module")
def operated(serve_long, tmp_path_factory):
    "A server that all addresses reach, with tokens and a short timeout."
    environment = {"SRSYS_TOKENS": TOKEN, "SRSYS_ALERT_TOKEN": ALERT_TOKEN, "SRSYS_PATIENCE": "3"}
    return serve_long(tmp_path_factory.mktemp("operated"), "--host", "0.0.0.0", **environment)


def port_of(address):
    return urlsplit(address).port


def url(operated, path):
    return f"http://127.0.0.1:{port_of(operated.metrics)}{path}"


def post(operated, content, path="/alerts", token=ALERT_TOKEN, **headers):
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return httpx.post(url(operated, path), content=content, headers=headers, timeout=PATIENCE)


def connect(operated):
    return socket.create_connection(("127.0.0.1", port_of(operated.metrics)), PATIENCE)


def reply(connection):
    "All that the server sends until it closes the connection."
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def test_the_port_listens_on_loopback_whatever_the_page_does(operated):
    assert urlsplit(operated.page).hostname == "0.0.0.0"
    with socket.socket() as other:  # 127.0.0.2 reaches what listens on all addresses, and not what listens on 127.0.0.1
        assert other.connect_ex(("127.0.0.2", port_of(operated.page))) == 0
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.2", port_of(operated.metrics))) != 0


def test_prometheus_and_promotion_are_answered_as_before(operated):
    metrics = httpx.get(url(operated, "/metrics"), timeout=PATIENCE)
    assert metrics.status_code == 200 and "srsys_queue_capacity 32.0" in metrics.text
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "srsys_inflight_requests 0.0" in metrics.text, "the scrape does not count itself"
    assert post(operated, b"", "/nudge", token="").status_code == 202
    assert httpx.get(url(operated, "/nudge")).status_code == 405
    assert httpx.get(url(operated, "/alerts")).status_code == 405


def test_an_alert_needs_a_token_and_comes_from_no_page(operated):
    message = {"alerts": [ALERT]}
    for refused in (post(operated, message, token=""), post(operated, message, token="a-guess-of-someone")):
        assert refused.status_code == 401 and refused.json()["error"] == "unauthorized"
        assert refused.headers["www-authenticate"] == "Bearer"
    for foreign in ({"Origin": "http://elsewhere.example"}, {"Sec-Fetch-Site": "cross-site"}):
        for path in ("/alerts", "/nudge"):
            refused = post(operated, message, path, **foreign)
            assert refused.status_code == 403 and refused.json()["error"] == "cross_site"
    assert post(operated, message).status_code == 204
    assert post(operated, message, token=TOKEN).status_code == 204
    page = f"http://127.0.0.1:{port_of(operated.page)}/v1/models"
    refused = httpx.get(page, headers={"Authorization": f"Bearer {ALERT_TOKEN}"}, timeout=PATIENCE)
    assert refused.status_code == 401, "Alertmanager's token is for alerts alone"


def test_malformed_alerts_are_the_senders_mistake(operated):
    deep = b"[" * 200_000
    odd = [{"alerts": [ALERT | change]} for change in ({"annotations": {"summary": {}}}, {"startsAt": 2**70})]
    odd += [{"alerts": [ALERT | {"labels": {"alertname": ["a"]}}]}, {"alerts": 3}, [1], 7, None]
    for content in (b"{", b"\xff", deep, b'{"alerts": [{"labels": "\\ud800"}]}', *odd):
        answer = post(operated, content)
        assert answer.status_code == 400, (content, answer.text)
        assert set(answer.json()) == {"error", "detail", "request_id"}
    answer = httpx.get(url(operated, "/metrics") + "?name[]=%ff", headers={"Accept": b"\xff\xfe"}, timeout=PATIENCE)
    assert answer.status_code in (200, 400)


def test_nothing_is_read_beyond_the_limit(operated):
    process = psutil.Process(operated.process.pid)
    before = process.memory_info().rss
    assert post(operated, bytes(2 << 20)).status_code == 413
    head = b"POST /alerts HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + ALERT_TOKEN.encode() + b"\r\n"
    for length, status in [(b"-1", b"400"), (b"x", b"400"), (b"99999999999", b"413"), (b"", b"400")]:
        with connect(operated) as connection:
            received = b""
            try:
                connection.sendall(head + b"Content-Length: " + length + b"\r\n\r\n")
                for _ in range(60):
                    connection.sendall(bytes(1 << 20))
            except OSError:  # the server has closed the connection
                pass
            received = reply(connection)
            assert received.startswith(b"HTTP/1.1 " + status) or not received, (length, received)
    with connect(operated) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(60):
                connection.sendall(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
        except OSError:
            pass
        received = reply(connection)
        assert received.startswith(b"HTTP/1.1 413") or not received
    assert process.memory_info().rss - before < 30 * 2**20


def test_half_sent_requests_hold_no_threads_and_are_ended(operated):
    process, connections = psutil.Process(operated.process.pid), []
    threads = process.num_threads()
    try:
        for i in range(60):
            connections.append(connect(operated))
            half = b"POST /alerts HT", b"POST /alerts HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
            connections[-1].sendall(half[i % 2])
        start = time.monotonic()
        assert httpx.get(url(operated, "/metrics"), timeout=PATIENCE).status_code == 200
        assert process.num_threads() < threads + 20
        for connection in connections:
            assert reply(connection)[:12] in (b"HTTP/1.1 408", b"HTTP/1.1 401")
        assert time.monotonic() - start < 60
    finally:
        for connection in connections:
            connection.close()
    wait_until(lambda: httpx.get(url(operated, "/metrics"), timeout=PATIENCE).status_code == 200)
