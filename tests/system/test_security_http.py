"""Protects the page and the API: other sites' pages, slow readers, floods of connections, guessed tokens, a full disk."""

import socket
from urllib.parse import urlsplit

import httpx
import pytest
from skimage import data

from tests.system.conftest import PATIENCE, encoded

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
