"""`srsys serve` as a process: bad requests, a full waiting room, a second start, and its end."""

import concurrent.futures
import http.client
import io
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from skimage import data

from srsys.image import open_picture
from srsys.models.weights import shipped_weights
from srsys.registry.store import Store, list_versions

pytestmark = pytest.mark.timeout(900)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


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
    return client.post(served.page + "/v1/restore", files={"file": (name, content)}, data=fields, timeout=200)


def eventually(happened, seconds=30):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def is_free(address):
    with socket.socket() as probe:
        return probe.connect_ex((urlsplit(address).hostname, urlsplit(address).port)) != 0


SMALL = data.astronaut()[:90, 180:300]


def test_a_picture_comes_back_and_says_who_made_it(served):
    answer = send(served, png(SMALL), model="fast", scale="4", format="webp")
    picture = open_picture(answer.content)
    assert (answer.status_code, picture.width, picture.height) == (200, 480, 360)
    assert answer.headers["x-model-version"] == "srsys-fast-x4/1" and float(answer.headers["x-consistency-db"]) > 25
    assert answer.headers["content-type"] == "image/webp" and "infer;dur=" in answer.headers["server-timing"]
    assert {m["name"] for m in httpx.get(served.page + "/v1/models").json()["models"]} == set(shipped_weights())


@pytest.mark.parametrize(
    "status, content, fields",
    [
        (415, b"Dear Sir or Madam,", {}),
        (415, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {}),
        (422, b"", {}),
        (422, png(SMALL)[:4000], {}),
        (413, header_of(40_000, 40_000), {}),
        (413, bytes(65 * 2**20), {}),
        (422, png(SMALL), {"model": "mystery"}),
        (422, png(SMALL), {"model": "../../../etc/passwd"}),
        (422, png(SMALL), {"scale": "-1"}),
        (422, png(SMALL), {"format": "exe"}),
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
    assert "set-cookie" not in answer.headers and answer.headers["x-request-id"] == answer.json()["request_id"]
    assert send(served, png(SMALL), model="fast-x2").status_code == 200


def test_an_endless_upload_is_cut_off(served):
    "The length is not announced, and the sender would go on for ever."
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
    assert sent < 200 * 2**20, "it took everything"
    assert send(served, png(SMALL), model="fast-x2").status_code == 200


def test_a_full_waiting_room_says_so_and_loses_nobody(served):
    content = png(np.tile(SMALL, (2, 2, 1)))
    with (
        concurrent.futures.ThreadPoolExecutor(90) as crowd,
        httpx.Client(limits=httpx.Limits(max_connections=90)) as client,
    ):
        answers = list(crowd.map(lambda _: send(served, content, client=client, model="photo-x4"), range(90)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert all(open_picture(answer.content).width == 960 for answer in answers if answer.status_code == 200)
    metrics = httpx.get(served.metrics).text
    assert f'srsys_shed_requests_total{{reason="full"}} {len(refused)}.0' in metrics
    assert "srsys_queue_depth 0.0" in metrics and 'srsys_model_info{alias="champion",name="photo-x4"' in metrics


def votes_down(served):
    return float(re.search(r'^srsys_feedback_total\{vote="down"\} (\S+)', httpx.get(served.metrics).text, re.M)[1])


def test_a_vote_is_kept(served):
    before = votes_down(served)
    answer = httpx.post(
        served.page + "/v1/feedback", json={"request_id": "f" * 32, "vote": "down", "reason": "five ears"}
    )
    assert answer.status_code == 201
    assert votes_down(served) == before + 1


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_killed_and_started_again_it_still_has_its_registry(serve, tmp_path):
    "Killed without a word, it leaves no child; started again it has the same versions; Ctrl-C ends both pages."
    first = serve(tmp_path, "--mlflow-port", free_port())
    eventually(lambda: not is_free(first.mlflow), 200)
    before = list_versions(Store(tmp_path))
    assert [v.label for v in before] == [f"srsys-{name}/1" for name in shipped_weights()]
    assert all(v.aliases == ("champion",) and v.status == "bootstrap" for v in before)
    children = psutil.Process(first.process.pid).children(recursive=True)
    first.end(signal.SIGKILL)
    eventually(
        lambda: (
            is_free(first.mlflow)
            and not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
        )
    )

    second = serve(tmp_path, "--mlflow-port", urlsplit(first.mlflow).port)
    assert (answer := send(second, png(SMALL))).headers.get("x-model-version") == "srsys-photo-x4/1", answer.text
    eventually(lambda: not is_free(second.mlflow), 200)
    listed = httpx.get(second.mlflow + "/ajax-api/2.0/mlflow/registered-models/search").json()["registered_models"]
    assert {model["name"]: model["aliases"][0]["alias"] for model in listed}["srsys-photo-x4"] == "champion"
    assert second.end() == 0
    eventually(lambda: is_free(second.page) and is_free(second.mlflow))
    assert list_versions(Store(tmp_path)) == before


def test_a_taken_port_is_one_line(served):
    command = [
        sys.executable,
        "-c",
        "from srsys.cli.main import main; main()",
        "serve",
        "--port",
        str(urlsplit(served.page).port),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "--port" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_two_that_start_together_register_each_model_once(tmp_path):
    code = f"from srsys.registry.store import Store, register_shipped; register_shipped(Store({str(tmp_path)!r}))"
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for one in both:
        _, said = one.communicate(timeout=200)
        assert one.returncode == 0 and said == "", said
    assert [v.version for v in list_versions(Store(tmp_path))] == [1] * len(shipped_weights())
