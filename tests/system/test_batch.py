"""Protects `srsys batch` and `srsys serve --ray` on a real Ray cluster of three nodes, all on this machine.

A node is killed, then the driver that distributes the work; a bucket is restored into a bucket (moto's server stands
for the store); a picture kills every process that opens it; and a replica of the service is killed under load.
"""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import boto3
import httpx
import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from moto.backends import get_backend
from moto.server import ThreadedMotoServer
from skimage import data
from torch import nn
from typer.testing import CliRunner

from srsys.batch.archive import BatchJob, Storage, list_pictures, parse_source, read_batch_manifest
from srsys.batch.cluster import ClusterOptions, restore_archive
from srsys.batch.folder import OutputSettings, plan_jobs, restore_one
from srsys.cli.main import main
from srsys.image import Picture, encode_picture, open_picture, save_picture
from srsys.models.weights import Model, load, shipped_weights
from srsys.restore.restorer import Restorer
from tests.system.conftest import SRSYS, free_port, kill_children_since, wait_until

pytestmark = pytest.mark.timeout(900)
SMALL = ("--model", "fast", "--scale", "2", "--device", "cpu", "--precision", "float32")


@contextmanager
def environment(**values):
    "Environment variables for a block."
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def store():
    "An object store, whose address is in the environment as the manifest for Kubernetes has it."
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with environment(
            AWS_ENDPOINT_URL=f"http://{host}:{port}",
            AWS_DEFAULT_REGION="us-east-1",
            AWS_ACCESS_KEY_ID="key",
            AWS_SECRET_ACCESS_KEY="word",
        ):
            client = boto3.client("s3")
            client.create_bucket(Bucket="archive")
            yield client
    finally:
        server.stop()


NODE = {"object_store_memory": 10**8}
STARTS = 4  # Ray allows each node 30 seconds to start, a limit that cannot be changed and is short on a busy machine


def start_cluster(before):
    "Start a head without cores and three nodes with one core each. A start that fails is cleaned up and tried again."
    from ray.cluster_utils import Cluster

    for start in range(1, STARTS + 1):
        try:
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **NODE})
            for _ in range(3):
                cluster.add_node(num_cpus=1, **NODE)
            cluster.wait_for_nodes(300)
            return cluster
        except Exception:  # what Ray raises when a node is slow
            kill_children_since(before)
            if start == STARTS:
                raise


@pytest.fixture(scope="module")
def cluster(store, tmp_path_factory):
    "A head that does no work and three nodes that do; whatever happens, all of Ray's processes end with it."
    before = psutil.Process().children(recursive=True)
    with environment(
        RAY_USAGE_STATS_ENABLED="0",
        RAY_BACKEND_LOG_LEVEL="fatal",
        OMP_NUM_THREADS="1",
        SRSYS_HOME=str(tmp_path_factory.mktemp("home")),
    ):
        try:
            running = start_cluster(before)
            yield running
            with suppress(Exception):  # what it does not end is killed below
                running.shutdown()
        finally:
            kill_children_since(before)


def batch(source, out, *options):
    "The command in this process: its status, and what it says."
    done = CliRunner().invoke(main, ["batch", str(source), str(out), *SMALL, "--json", *options])
    return done.exit_code, json.loads(done.stdout) if done.stdout else done.stderr


def manifest(address):
    return pa.concat_tables(part for _, part in read_batch_manifest(Storage(str(address)))).to_pandas()


def cut(pictures, folder, count, side=32):
    "Write small pictures cut from larger ones, each different, in folders of a hundred."
    for i in range(count):
        pixels = pictures[i % len(pictures)]
        y, x = (i * 7 % (n - side) for n in pixels.shape[:2])
        path = folder / f"{i // 100:03d}" / f"{i:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(Picture(pixels[y : y + side, x : x + side]), path)


def check_manifest(folder, count):
    "The last row of each picture is true, and every picture has one; returns all rows."
    rows = manifest(folder / "out")
    last = rows.drop_duplicates("source", keep="last").set_index("source")
    done = last[last.status == "done"]
    assert len(done) == count and len(last) == count + 1
    assert list(last[last.status == "failed"].index) == [f"{folder}/in/broken.jpg"]
    for source, row in done.iterrows():
        assert row.input_sha256 == hashlib.sha256(Path(source).read_bytes()).hexdigest()
        assert row.output_sha256 == hashlib.sha256((folder / "out" / row.target).read_bytes()).hexdigest()
        assert row.target == str(Path(source).relative_to(folder / "in")) and row.width == 64
    assert not last.duplicated("target").any()
    return rows


def kill_a_node_and_the_driver(cluster, folder, count):
    "Kill a node after a third of the pictures and the driver after two thirds, then run the same command to its end."
    cut([data.astronaut(), data.coffee(), data.chelsea()], folder / "in", count)
    (folder / "in" / "broken.jpg").write_text("Dear Sir or Madam,")

    def results():
        return sum(len(files) for place, _, files in os.walk(folder / "out") if "_srsys" not in place)

    command = [SRSYS, "batch", folder / "in", folder / "out", *SMALL, "--ray", cluster.address]
    with open(folder / "log", "w") as log:
        driver = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    try:
        wait_until(lambda: results() > count / 3, driver, 600)
        cluster.remove_node(sorted(cluster.worker_nodes, key=lambda node: node.node_id)[0], allow_graceful=False)
        wait_until(lambda: results() > 2 * count / 3, driver, 600)
    except AssertionError as error:
        raise AssertionError((folder / "log").read_text()[-2000:]) from error
    finally:
        driver.send_signal(signal.SIGKILL)
        ended = driver.wait(60)
    assert ended == -signal.SIGKILL, "the driver was done before it was killed"
    done_before = results()
    status, report = batch(folder / "in", folder / "out", "--ray", cluster.address)
    print(
        f"{done_before} results when the driver was killed, of which {report['kept']} were kept; "
        f"then {report['done']} in {report['seconds']} s"
    )
    assert status == 1 and report["failed"] == 1 and report["done"] + report["kept"] == count, report
    in_work = 3 * 16 * 2  # three engines, each with two chunks of sixteen whose rows are not written yet
    assert report["kept"] >= done_before - in_work, "a finished picture was restored again"
    rows = check_manifest(folder, count)
    assert (folder / "out/_srsys/contact.jpg").exists()
    assert json.loads((folder / "out/_srsys/report.json").read_text())["kept"] == report["kept"]
    assert results() == count and not list((folder / "out").rglob("*.part"))
    return rows


def test_a_bucket_is_restored_into_a_bucket(cluster, store):
    pictures = [encode_picture(Picture(data.astronaut()[i : i + 40, i : i + 40])) for i in range(12)]
    for i, content in enumerate(pictures):
        store.put_object(Bucket="archive", Key=f"in/1999/{i:02d}.png", Body=content)
    store.put_object(Bucket="archive", Key="in/broken.png", Body=b"Dear Sir or Madam,")
    store.put_object(Bucket="archive", Key="in/1999/00.jpg", Body=b"its result would have the name of 00.png's")
    status, report = batch("s3://archive/in", "s3://archive/out", "--ray", cluster.address)
    assert status == 1 and (report["done"], report["failed"], report["kept"]) == (11, 3, 0), report
    messages = [message for _, message in report["failures"]]
    assert any("both become" in message for message in messages), messages
    assert any("s3://archive/in/broken.png: not a picture" in message for message in messages), messages
    rows = manifest("s3://archive/out").set_index("source")
    for i, content in list(enumerate(pictures))[1:]:
        row = rows.loc[f"s3://archive/in/1999/{i:02d}.png"]
        result = store.get_object(Bucket="archive", Key=f"out/1999/{i:02d}.png")["Body"].read()
        assert row.input_sha256 == hashlib.sha256(content).hexdigest()
        assert row.output_sha256 == hashlib.sha256(result).hexdigest()
        assert open_picture(result).width == 80 and row.consistency_db > 30


class Deadly(nn.Upsample):
    "A network that ends its process when it sees black."

    def forward(self, lr_nchw):
        if not lr_nchw.any():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(lr_nchw)


def test_a_picture_that_kills_its_engine_is_recorded_as_failed(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("srsys.batch.cluster.MAX_ATTEMPTS", 2)  # of three, for time
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the engines know no tests
    (tmp_path / "in").mkdir()
    for i in range(8):
        save_picture(Picture(np.full((16, 16, 3), 0 if i == 5 else 10 + i, np.uint8)), tmp_path / "in" / f"{i}.png")
    model = Model(
        Deadly(scale_factor=2),
        "deadly",
        2,
        overlap=0,
        exact=True,
        multiple_of=1,
        architecture="nearest",
        sha256="1" * 64,
    )
    work = BatchJob(
        parse_source(f"{tmp_path}/in"),
        Storage(f"{tmp_path}/out"),
        OutputSettings(None, "png", 95, "float32", model.sha256),
    )
    progress = restore_archive(
        work, model, ClusterOptions(cluster.address, engines=1, device="cpu", precision="float32")
    )
    assert (progress.done, progress.failed) == (7, 1) and "2 engines died while restoring it" in progress.failures[0][1]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [f"{i}.png" for i in range(8) if i != 5]


def replicas():
    "The processes in which Ray runs the service."
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if "ServeReplica:srsys" in " ".join(process.info["cmdline"] or [])]


@pytest.fixture
def service(cluster, tmp_path):
    "`srsys serve --ray` with up to two replicas: its process, and its address."
    port, log = free_port(), tmp_path / "log"
    options = ["--ray", cluster.address, "--port", port, "--replicas", 2, "--cores", 1]
    options += ["--device", "cpu", "--precision", "float32"]
    with open(log, "w") as file:
        server = subprocess.Popen(
            [SRSYS, "serve", *map(str, options)],
            stdout=file,
            stderr=file,
            env={**os.environ, "SRSYS_HOME": str(tmp_path / "home")},
        )
    try:
        wait_until(lambda: "The API" in log.read_text(), server)
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait(60)
        print(log.read_text()[-2000:])


def test_the_service_survives_a_killed_replica(service):
    "A second replica starts under load; one is killed: only requests that it had are lost, and all results are right."
    server, address = service
    cat = Picture(data.chelsea()[100:180, 100:260])
    content = encode_picture(cat)
    expected = Restorer(load(shipped_weights()["fast-x2"]), "cpu", "float32").restore(cat).pixels
    sent, people = [], 8

    def trace(event, info):
        if event == "http11.send_request_body.complete":
            sent.append(time.monotonic())

    limits = httpx.Limits(keepalive_expiry=1)  # before the proxy closes a connection that is idle
    with httpx.Client(base_url=address, timeout=300, limits=limits) as client, ThreadPoolExecutor(people) as pool:

        def ask(_=None):
            try:
                answer = client.post(
                    "/v1/restore",
                    files={"file": ("cat.png", content)},
                    data={"model": "fast", "scale": "2"},
                    extensions={"trace": trace},
                )
            except httpx.RemoteProtocolError:
                return "disconnected"
            assert answer.status_code != 200 or np.array_equal(open_picture(answer.content).pixels, expected)
            return answer.status_code

        assert client.get("/readyz").json() == {"ready": True}
        assert client.get("/v1/models").json()["models"][0]["name"] == "fast-x2"
        wrong = client.post("/v1/restore", files={"file": ("letter.png", b"Dear Sir or Madam,")})
        assert wrong.status_code == 415 and wrong.json()["error"] == "not_an_accepted_format"

        before = Counter()

        def scaled_up():
            before.update(pool.map(ask, range(16)))
            return len(replicas()) == 2

        wait_until(scaled_up)
        assert set(before) == {200}

        under_way = [pool.submit(ask) for _ in range(48)]
        wait_until(lambda: any(job.done() for job in under_way))
        replicas()[0].kill()
        meanwhile = Counter(job.result() for job in under_way)
        print(f"{before.total()} by one replica and then two; of 48 while one was killed {dict(meanwhile)}")
        # requests that the dead replica had end with 500 or 503 from Ray's proxy, or without an answer;
        # at most `people` are under way at once
        assert set(meanwhile) <= {200, 500, 503, "disconnected"} and 48 - meanwhile[200] <= people
        assert Counter(pool.map(ask, range(24))) == {200: 24}

        sent.clear()
        last = [pool.submit(ask) for _ in range(4)]
        wait_until(lambda: len(sent) == 4)
        time.sleep(0.5)  # until the proxy has passed them on, which nothing shows
        server.send_signal(signal.SIGTERM)
        assert [job.result() for job in last] == [200] * 4
        assert server.wait(300) == 0 and not replicas()


def test_a_node_is_killed_and_then_the_driver(cluster, tmp_path):
    kill_a_node_and_the_driver(cluster, tmp_path, 240)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_pictures_survive_it(cluster, tmp_path):
    "Slow: ten minutes."
    cluster.add_node(num_cpus=1, **NODE)
    cluster.wait_for_nodes(300)
    rows = kill_a_node_and_the_driver(cluster, tmp_path, 10_000)
    print(f"{len(rows)} rows in {len(list((tmp_path / 'out/_srsys/manifest').iterdir()))} files")


@pytest.mark.slow
def test_what_ray_costs(tmp_path, shared):
    "Slow: the rate of two engines with a core each, against one process with two threads."
    photos = [open_picture(path).pixels for path in sorted(shared("data/bench/BSD100").glob("*.png"))]
    cut(photos, tmp_path / "in", 600, side=128)
    model = load(shipped_weights()["fast-x2"])
    settings = OutputSettings(None, "png", 95, "float32", model.sha256)
    torch.set_num_threads(2)
    restorer, jobs = Restorer(model, "cpu", "float32"), plan_jobs([tmp_path / "in"], tmp_path / "alone")
    start = time.monotonic()
    for job in jobs:
        restore_one(job, job.target.name, restorer, settings, measured=True)
    alone = len(jobs) / (time.monotonic() - start)
    torch.set_num_threads(1)
    answers = []  # (time, pictures done)
    with environment(OMP_NUM_THREADS="1"):
        start = time.monotonic()
        restore_archive(
            BatchJob(parse_source(f"{tmp_path}/in"), Storage(f"{tmp_path}/out"), settings),
            model,
            ClusterOptions(engines=2, device="cpu", precision="float32"),
            lambda progress, rows: answers.append((time.monotonic(), progress.done)),
        )
    (first, before), (last, after) = answers[8], answers[-1]
    rate = (after - before) / (last - first)
    print(
        f"alone {alone:.1f}, with Ray {rate:.1f} pictures/s: {rate / alone:.0%}; "
        f"the first answer after {answers[0][0] - start:.1f} s"
    )
    assert after == 600


class Enough(Exception):
    pass


@pytest.mark.slow
def test_a_bucket_of_a_hundred_thousand(store, tmp_path):
    "Slow: the time to the first restored picture, and the most memory that listing takes."
    content = encode_picture(Picture(data.astronaut()[:32, :32]))
    backend = get_backend("s3")["123456789012"]["aws"]
    for i in range(100_000):
        backend.put_object("archive", f"many/{i // 1000:03d}/{i:06d}.png", content)
    model, answered, start = load(shipped_weights()["fast-x2"]), [], time.monotonic()

    def stop_after_200(progress, rows):
        answered.append(time.monotonic() - start)
        if progress.done >= 200 and progress.total:
            raise Enough

    job = BatchJob(
        parse_source("s3://archive/many"),
        Storage("s3://archive/restored"),
        OutputSettings(None, "png", 95, "float32", model.sha256),
    )
    with pytest.raises(Enough):
        restore_archive(job, model, ClusterOptions(engines=1, device="cpu", precision="float32"), stop_after_200)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = sum(1 for _ in list_pictures(parse_source("s3://archive/many")))
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"first picture after {answered[0]:.1f} s, all counted after {answered[-1]:.1f} s; "
        f"the largest process of Ray had {children:.0f} MB, listing {names} names took {more:.0f} MB more"
    )
    assert names == 100_000
