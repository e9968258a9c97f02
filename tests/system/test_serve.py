"""Protects `srsys serve` as a process: bad requests, a full queue, a restart after kill -9, and its end."""

import concurrent.futures
import http.client
import re
import signal
import socket
import struct
import subprocess
import sys
import zlib
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest
from skimage import data

from srsys.image import open_picture
from srsys.models.weights import shipped_weights
from srsys.registry.store import Store, list_versions
from tests.system.conftest import PATIENCE, SRSYS, encoded, free_port, is_alive, wait_until

pytestmark = pytest.mark.timeout(900)


def header_of(width, height):
    "A PNG that claims a size and holds nothing."
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + struct.pack(">I", 0)
        + b"IDAT\x35\xaf\x06\x1e"
    )


def send(served, content, name="cat.png", client=httpx, **fields):
    return client.post(served.page + "/v1/restore", files={"file": (name, content)}, data=fields, timeout=PATIENCE)


def is_free(address):
    with socket.socket() as probe:
        return probe.connect_ex((urlsplit(address).hostname, urlsplit(address).port)) != 0


SMALL = data.astronaut()[:90, 180:300]


def test_a_result_names_its_model(served):
    answer = send(served, encoded(SMALL), model="fast", scale="4", format="webp")
    picture = open_picture(answer.content)
    assert (answer.status_code, picture.width, picture.height) == (200, 480, 360)
    assert answer.headers["x-model-version"] == "srsys-fast-x4/1"
    assert float(answer.headers["x-consistency-db"]) > 25
    assert answer.headers["content-type"] == "image/webp"
    assert "infer;dur=" in answer.headers["server-timing"]
    assert {m["name"] for m in httpx.get(served.page + "/v1/models").json()["models"]} == set(shipped_weights())


@pytest.mark.parametrize(
    "status, content, fields",
    [
        (415, b"Dear Sir or Madam,", {}),
        (415, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {}),
        (422, b"", {}),
        (422, encoded(SMALL)[:4000], {}),
        (413, header_of(40_000, 40_000), {}),
        (413, bytes(65 * 2**20), {}),
        (422, encoded(SMALL), {"model": "mystery"}),
        (422, encoded(SMALL), {"model": "../../../etc/passwd"}),
        (422, encoded(SMALL), {"scale": "-1"}),
        (422, encoded(SMALL), {"format": "exe"}),
    ],
    ids=[
        "text",
        "eps",
        "empty",
        "truncated",
        "huge header",
        "too many bytes",
        "unknown model",
        "path",
        "scale",
        "format",
    ],
)
def test_bad_requests_are_answered_and_the_next_good_one_succeeds(served, status, content, fields):
    answer = send(served, content, 'a";\r\nSet-Cookie: x=y.png', **fields)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error", "detail", "request_id"} and "\n" not in answer.json()["detail"]
    assert "set-cookie" not in answer.headers
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    assert send(served, encoded(SMALL), model="fast-x2").status_code == 200


def test_an_endless_upload_is_cut_off(served):
    "Its length is not announced, and the client would send for ever."
    connection = http.client.HTTPConnection(urlsplit(served.page).netloc, timeout=60)
    connection.putrequest("POST", "/v1/restore")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders(b"2d\r\n--x\r\nContent-Disposition: form-data; name=file\r\n")
    sent = 0
    try:
        while sent < 200 * 2**20:
            connection.send(b"100000\r\n" + bytes(0x100000) + b"\r\n")
            sent += 0x100000
    except OSError:
        pass
    assert sent < 200 * 2**20, "the server read all of it"
    assert send(served, encoded(SMALL), model="fast-x2").status_code == 200


def refused_so_far(served):
    "How many requests were refused because the queue was full; other tests of this server may have been refused too."
    found = re.search(r'^srsys_shed_requests_total\{reason="full"\} (\S+)', httpx.get(served.metrics).text, re.M)
    return float(found[1]) if found else 0.0


def test_a_full_queue_refuses_requests_and_loses_none(served):
    content, before = encoded(np.tile(SMALL, (2, 2, 1))), refused_so_far(served)
    with (
        concurrent.futures.ThreadPoolExecutor(90) as crowd,
        httpx.Client(limits=httpx.Limits(max_connections=90)) as client,
    ):
        answers = list(crowd.map(lambda _: send(served, content, client=client, model="photo-x4"), range(90)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}  # so none of the lists below is empty
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert all(open_picture(answer.content).width == 960 for answer in answers if answer.status_code == 200)
    assert refused_so_far(served) == before + len(refused)
    metrics = httpx.get(served.metrics).text
    assert "srsys_queue_depth 0.0" in metrics
    assert 'srsys_model_info{alias="champion",name="photo-x4"' in metrics


def negative_votes(served):
    return float(re.search(r'^srsys_feedback_total\{vote="down"\} (\S+)', httpx.get(served.metrics).text, re.M)[1])


def test_a_vote_is_counted(served):
    before = negative_votes(served)
    result = send(served, encoded(SMALL), model="fast-x2").headers["x-request-id"]
    answer = httpx.post(
        served.page + "/v1/feedback", json={"request_id": result, "vote": "down", "reason": "five ears"}
    )
    assert answer.status_code == 201
    assert negative_votes(served) == before + 1


def registered_models(address):
    "What MLflow lists, or nothing while it does not answer yet."
    try:
        return httpx.get(address, timeout=60).json()["registered_models"]
    except (httpx.HTTPError, ValueError, KeyError):
        return None


def test_a_server_killed_and_restarted_has_the_same_registry(serve, tmp_path):
    "kill -9 leaves no child process; after a restart the versions are the same; Ctrl-C ends the app and MLflow."
    first = serve(tmp_path, "--mlflow-port", free_port())
    wait_until(lambda: not is_free(first.mlflow), first.process)
    before = list_versions(Store(tmp_path))
    assert [v.label for v in before] == [f"srsys-{name}/1" for name in shipped_weights()]
    assert all(v.aliases == ("champion",) and v.status == "bootstrap" for v in before)
    children = psutil.Process(first.process.pid).children(recursive=True)
    first.end(signal.SIGKILL)
    assert children
    wait_until(lambda: is_free(first.mlflow) and not any(map(is_alive, children)))

    second = serve(tmp_path, "--mlflow-port", urlsplit(first.mlflow).port)
    answer = send(second, encoded(SMALL))
    assert answer.headers.get("x-model-version") == "srsys-photo-x4/1", answer.text
    wait_until(lambda: not is_free(second.mlflow), second.process)
    search = second.mlflow + "/ajax-api/2.0/mlflow/registered-models/search"
    listed = wait_until(lambda: registered_models(search))
    assert {model["name"]: model["aliases"][0]["alias"] for model in listed}["srsys-photo-x4"] == "champion"
    assert second.end() == 0
    wait_until(lambda: is_free(second.page) and is_free(second.mlflow))
    assert list_versions(Store(tmp_path)) == before


def test_a_port_in_use_is_reported_in_one_line(served):
    command = [SRSYS, "serve", "--port", str(urlsplit(served.page).port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and "--port" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_two_processes_that_start_together_register_each_model_once(tmp_path):
    code = f"from srsys.registry.store import Store, register_shipped; register_shipped(Store({str(tmp_path)!r}))"
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0 and errors == "", errors
    assert [v.version for v in list_versions(Store(tmp_path))] == [1] * len(shipped_weights())
