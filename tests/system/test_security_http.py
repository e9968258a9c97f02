"""Protects the page and the API: other sites' pages, slow readers, floods of connections, guesses, a full disk."""

import re
import resource
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest
from skimage import data

from tests.system import conftest
from tests.system.conftest import PATIENCE, SRSYS, encoded, wait_until

pytestmark = pytest.mark.timeout(600)
TOKEN = "a-token-of-a-client"
SMALL = data.astronaut()[30:78, 200:248].copy()


@pytest.fixture(scope="module")
def guarded(serve_long, tmp_path_factory):
    "A server with a token, a short timeout, and a name of its own."
    environment = {"SRSYS_TOKENS": TOKEN, "SRSYS_PATIENCE": "3", "SRSYS_HOSTS": "photos.example"}
    return serve_long(tmp_path_factory.mktemp("guarded"), **environment)


def restore(guarded, content=None, name="cat.png", token=TOKEN, headers=(), **fields):
    return httpx.post(
        guarded.page + "/v1/restore",
        files={"file": (name, content or encoded(SMALL))},
        data={"model": "fast-x2"} | fields,
        headers={"Authorization": f"Bearer {token}"} | dict(headers),
        timeout=PATIENCE,
    )


def refusal(answer):
    "Status and word of an error, whose form is checked."
    assert set(answer.json()) == {"error", "detail", "request_id"}, answer.text
    return answer.status_code, answer.json()["error"]


def test_requests_of_other_sites_pages_are_refused(guarded):
    for origin in ("http://elsewhere.example", "null", guarded.page.replace(":", ":1", 2), "file://"):
        assert refusal(restore(guarded, headers={"Origin": origin})) == (403, "cross_site"), origin
    for origin in (guarded.page, "https://photos.example"):
        assert restore(guarded, headers={"Origin": origin}).status_code == 200, origin


def test_the_host_must_be_a_name_of_the_server(guarded):
    port = urlsplit(guarded.page).port
    for host in ("elsewhere.example", f"elsewhere.example:{port}", "localhost.elsewhere.example", "10.1.2.3"):
        assert refusal(restore(guarded, headers={"Host": host})) == (421, "wrong_host"), host
        for path in ("/", "/v1/models", "/version"):
            answer = httpx.get(guarded.page + path, headers={"Host": host}, timeout=PATIENCE)
            assert refusal(answer) == (421, "wrong_host")
        nudge = httpx.post(guarded.metrics.replace("metrics", "nudge"), headers={"Host": host}, timeout=PATIENCE)
        assert refusal(nudge) == (421, "wrong_host")
        for probe in (guarded.page + "/livez", guarded.page + "/readyz", guarded.metrics):
            assert httpx.get(probe, headers={"Host": host}, timeout=PATIENCE).status_code == 200
    for host in ("localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", "[::1]", "photos.example"):
        assert restore(guarded, headers={"Host": host}).status_code == 200, host


def open_results(guarded):
    "Results that the server holds open; their files have been deleted."
    found = []
    for link in Path(f"/proc/{guarded.process.pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:  # closed meanwhile
            continue
        if "srsys-" in target and target.endswith(" (deleted)"):
            found.append(target)
    return found


def ask_for_a_large_result(guarded, buffer=4096):
    "A connection on which a result of some 20 MB arrives, of which nothing has been read."
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    form = httpx.Request(
        "POST",
        guarded.page + "/v1/restore",
        files={"file": ("noise.png", encoded(noise))},
        data={"model": "fast-x2", "scale": "4", "format": "tiff"},
        headers={"Authorization": f"Bearer {TOKEN}"},
    )
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(PATIENCE)
    connection.connect((urlsplit(guarded.page).hostname, urlsplit(guarded.page).port))
    lines = "".join(f"{name}: {value}\r\n" for name, value in form.headers.items())
    connection.sendall(f"POST /v1/restore HTTP/1.1\r\n{lines}\r\n".encode() + form.read())
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection


def test_a_result_that_nobody_reads_is_given_up(guarded):
    connection = ask_for_a_large_result(guarded)
    assert open_results(guarded)
    start = time.monotonic()
    wait_until(lambda: not open_results(guarded), within=60)
    assert time.monotonic() - start < 40, "3 seconds, and what the buffers of both ends hold"
    connection.close()


def test_a_result_is_deleted_when_its_client_disconnects(guarded):
    connection = ask_for_a_large_result(guarded)
    assert open_results(guarded)
    connection.close()
    wait_until(lambda: not open_results(guarded), within=2)


def size_of(received):
    "The size of a whole response, head and body, by what has arrived of it."
    head, end, _ = bytes(received[:10_000]).partition(b"\r\n\r\n")
    return len(head) + 4 + int(re.search(rb"content-length: (\d+)", head)[1]) if end else 1 << 30


def test_a_slow_but_steady_reader_gets_all_of_its_result(guarded):
    "It reads for longer than a client that reads nothing may wait."
    connection, received, start = ask_for_a_large_result(guarded, 32_768), bytearray(b"HTTP/1.1 200"), time.monotonic()
    while piece := connection.recv(1 << 20):
        received += piece
        if time.monotonic() - start < 6:
            time.sleep(0.03)
        if len(received) >= size_of(received):
            break
    assert len(received) == size_of(received) and time.monotonic() - start > 4
    connection.close()


def test_more_connections_than_the_server_takes(serve, tmp_path, monkeypatch):
    "With 512 file descriptors: the others are refused at once, the log stays short, and then all is as before."
    script, log = tmp_path / "srsys", tmp_path / "log"
    script.write_text(f'#!/bin/sh\nulimit -n 512\nexec {SRSYS} "$@" 2>{log}\n')
    script.chmod(0o755)
    monkeypatch.setattr(conftest, "SRSYS", script)
    served = serve(tmp_path / "home")
    address = (urlsplit(served.page).hostname, urlsplit(served.page).port)
    before, connections, refused = len(log.read_bytes()), [], 0
    try:
        for _ in range(900):
            connections.append(socket.create_connection(address, PATIENCE))
        for connection in connections:
            connection.settimeout(0.01)
            try:
                refused += connection.recv(100).startswith(b"HTTP/1.1 503")
            except OSError:  # still open
                pass
        assert refused > 700
        assert psutil.Process(served.process.pid).num_fds() < 512
        assert httpx.get(served.metrics, timeout=PATIENCE).status_code == 200
    finally:
        for connection in connections:
            connection.close()

    def answers():
        try:
            return httpx.get(served.page + "/readyz", timeout=PATIENCE).status_code == 200
        except httpx.HTTPError:
            return False

    wait_until(answers, within=60)
    assert len(log.read_bytes()) - before < 10_000, log.read_text()[-3000:]
    assert "a connection is refused" in log.read_text()


def test_a_long_file_name_is_shortened(guarded):
    for name in ("a" * 300 + ".png", "\N{PILE OF POO}" * 300 + ".png", "é" * 300):
        answer = restore(guarded, name=name)
        assert answer.status_code == 200, (name, answer.text)
        assert len(answer.headers["content-disposition"]) < 200
        uploaded = httpx.post(
            guarded.page + "/page/pictures",
            files={"file": (name, encoded(SMALL))},
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=PATIENCE,
        )
        assert uploaded.status_code == 200, (name, uploaded.text)


def test_no_room_for_an_upload_is_the_servers_trouble(guarded):
    "A limit on the size of its files stands in for a full disk."
    process = psutil.Process(guarded.process.pid)
    before = process.rlimit(resource.RLIMIT_FSIZE)
    noise = encoded(np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8))
    process.rlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
    try:
        for path in ("/v1/restore", "/page/pictures"):
            answer = httpx.post(
                guarded.page + path,
                files={"file": ("noise.png", noise)},
                headers={"Authorization": f"Bearer {TOKEN}"},
                timeout=PATIENCE,
            )
            assert refusal(answer) == (503, "no_room") and answer.headers["retry-after"]
    finally:
        process.rlimit(resource.RLIMIT_FSIZE, before)
    assert restore(guarded).status_code == 200


def test_guessing_a_token_is_slow(guarded):
    "The last test of this file: afterwards the server refuses tokens from this address for a moment."
    answers = [
        httpx.get(
            guarded.page + "/v1/models", headers={"Authorization": f"Bearer a-guess-number-{i:06}"}, timeout=PATIENCE
        )
        for i in range(60)
    ]
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {401, 429} and statuses.count(429) > 15
    slowed = next(answer for answer in answers if answer.status_code == 429)
    assert refusal(slowed) == (429, "too_often") and int(slowed.headers["retry-after"]) >= 1
    assert refusal(httpx.get(guarded.page + "/v1/models", timeout=PATIENCE)) == (401, "unauthorized")
    assert httpx.get(guarded.page + "/readyz", timeout=PATIENCE).status_code == 200
