"""`srsys batch` on a Ray cluster of three nodes on this machine, of which one is killed, and then the one who hands out the work;
from a bucket into a bucket (moto's server stands for the store: it speaks the protocol); a picture that ends whoever works on it;
and `srsys serve --ray` on the same cluster, of whose replicas one is killed."""

import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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

pytestmark = pytest.mark.timeout(900)
SRSYS = Path(sys.executable).with_name("srsys")
SMALL = ("--model", "fast", "--scale", "2", "--device", "cpu", "--precision", "float32")


@contextmanager
def environment(**values):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    yield
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def store():
    "An object store, whose address is in the environment as the manifest for Kubernetes has it."
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    with environment(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="word",
    ):
        client = boto3.client("s3")
        client.create_bucket(Bucket="archive")
        yield client
    server.stop()


@pytest.fixture(scope="module")
def cluster(store, tmp_path_factory):
    "A head that does no work and three nodes that do."
    with environment(
        RAY_USAGE_STATS_ENABLED="0",
        RAY_BACKEND_LOG_LEVEL="fatal",
        OMP_NUM_THREADS="1",
        SRSYS_HOME=str(tmp_path_factory.mktemp("home")),
    ):
        from ray.cluster_utils import Cluster

        nodes = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 10**8},
        )
        try:
            for _ in range(3):
                nodes.add_node(num_cpus=1, object_store_memory=10**8)
            nodes.wait_for_nodes(120)
            yield nodes
        finally:
            nodes.shutdown()


def batch(source, out, *options):
    "The command in this process: its status, and what it says."
    done = CliRunner().invoke(main, ["batch", str(source), str(out), *SMALL, "--json", *options])
    return done.exit_code, json.loads(done.stdout) if done.stdout else done.stderr


def until(reached, process, within=300):
    end = time.monotonic() + within
    while process.poll() is None and not reached():
        assert time.monotonic() < end, "it does not go on"
        time.sleep(0.02)


def manifest(address):
    return pa.concat_tables(part for _, part in read_batch_manifest(Storage(str(address)))).to_pandas()


def cut(folder, count, side=32):
    "Small pictures, each another, in folders of a hundred."
    tiles = [
        open_picture(path).pixels
        for path in sorted(Path(__file__).resolve().parents[2].joinpath("../shared/data/bench/BSD100").glob("*.png"))
    ] or [data.astronaut()]
    for i in range(count):
        tile = tiles[i % len(tiles)]
        y, x = (i * 7 % (n - side) for n in tile.shape[:2])
        path = folder / f"{i // 100:03d}" / f"{i:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(Picture(tile[y : y + side, x : x + side]), path)


def survive(cluster, folder, count):
    "A node is killed at a third and the driver at two thirds; what the same command comes to afterwards."
    cut(folder / "in", count)
    (folder / "in" / "broken.jpg").write_text("Dear Sir or Madam,")
    made = lambda: sum(len(files) for place, _, files in os.walk(folder / "out") if "_srsys" not in place)  # noqa: E731
    command = [SRSYS, "batch", folder / "in", folder / "out", *SMALL, "--ray", cluster.address]
    with open(folder / "log", "w") as log:
        driver = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    try:
        until(lambda: made() > count / 3, driver)
        cluster.remove_node(sorted(cluster.worker_nodes, key=lambda node: node.node_id)[0], allow_graceful=False)
        until(lambda: made() > 2 * count / 3, driver)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait(60)
    done_before = made()
    status, report = batch(folder / "in", folder / "out", "--ray", cluster.address)
    print(
        f"{done_before} made before the driver was killed, of which {report['kept']} were kept; then {report['done']} in {report['seconds']} s"
    )
    assert status == 1 and report["failed"] == 1 and report["done"] + report["kept"] == count, report
    assert report["kept"] >= done_before - 3 * 16 * 2, "what was finished is not done again"
    rows = manifest(folder / "out")
    last = rows.drop_duplicates("source", keep="last").set_index("source")
    assert len(last) == count + 1 and list(last[last.status == "failed"].index) == [f"{folder}/in/broken.jpg"]
    for source, row in last[last.status == "done"].iterrows():
        assert row.input_sha256 == hashlib.sha256(Path(source).read_bytes()).hexdigest()
        assert row.output_sha256 == hashlib.sha256((folder / "out" / row.target).read_bytes()).hexdigest()
        assert row.target == str(Path(source).relative_to(folder / "in")) and row.width == 64
    assert (folder / "out/_srsys/contact.jpg").exists() and json.loads((folder / "out/_srsys/report.json").read_text())[
        "kept"
    ] == report["kept"]
    assert not last.duplicated("target").any(), "every picture is there once"
    assert made() == count and not list((folder / "out").rglob("*.part"))
    return rows


def test_a_bucket_goes_into_a_bucket(cluster, store):
    pictures = [encode_picture(Picture(data.astronaut()[i : i + 40, i : i + 40])) for i in range(12)]
    for i, content in enumerate(pictures):
        store.put_object(Bucket="archive", Key=f"in/1999/{i:02d}.png", Body=content)
    store.put_object(Bucket="archive", Key="in/broken.png", Body=b"Dear Sir or Madam,")
    store.put_object(Bucket="archive", Key="in/1999/00.jpg", Body=b"has the name that 00.png wants")
    status, report = batch("s3://archive/in", "s3://archive/out", "--ray", cluster.address)
    assert status == 1 and (report["done"], report["failed"], report["kept"]) == (11, 3, 0), report
    assert any("both become" in why for _, why in report["failures"]) and any(
        "s3://archive/in/broken.png: not a picture" in why for _, why in report["failures"]
    )
    rows = manifest("s3://archive/out").set_index("source")
    for i, content in list(enumerate(pictures))[1:]:
        row, result = (
            rows.loc[f"s3://archive/in/1999/{i:02d}.png"],
            store.get_object(Bucket="archive", Key=f"out/1999/{i:02d}.png")["Body"].read(),
        )
        assert (
            row.input_sha256 == hashlib.sha256(content).hexdigest()
            and row.output_sha256 == hashlib.sha256(result).hexdigest()
        )
        assert open_picture(result).width == 80 and row.consistency_db > 30


class Deadly(nn.Upsample):
    "A network that ends its process when it sees black."

    def forward(self, lr_nchw):
        if not lr_nchw.any():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(lr_nchw)


def test_a_picture_that_ends_its_engine_is_set_aside(cluster, tmp_path, monkeypatch):
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
    "The processes in which Ray has the service."
    return [
        p for p in psutil.process_iter(["name", "cmdline"]) if "ServeReplica:srsys" in " ".join(p.info["cmdline"] or [])
    ]


def test_the_service_by_ray_serve(cluster, tmp_path):
    "A second replica comes with the load; one is killed: those in its hands are told, and all others are served the right picture, before and after."
    with socket.create_server(("127.0.0.1", 0)) as claimed:
        port = claimed.getsockname()[1]
    cat = Picture(data.chelsea()[100:180, 100:260])
    content, made = (
        encode_picture(cat),
        Restorer(load(shipped_weights()["fast-x2"]), "cpu", "float32").restore(cat).pixels,
    )
    command = [
        SRSYS,
        "serve",
        "--ray",
        cluster.address,
        "--port",
        port,
        "--replicas",
        2,
        "--cores",
        1,
        "--device",
        "cpu",
        "--precision",
        "float32",
    ]
    with (
        open(tmp_path / "log", "w+") as log,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
        ThreadPoolExecutor(8) as people,
    ):
        server = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env={**os.environ, "SRSYS_HOME": str(tmp_path / "home")}
        )

        def ask(_=None):
            answer = client.post(
                "/v1/restore", files={"file": ("cat.png", content)}, data={"model": "fast", "scale": "2"}
            )
            assert answer.status_code != 200 or np.array_equal(open_picture(answer.content).pixels, made)
            return answer.status_code

        try:
            until(lambda: "The API" in (tmp_path / "log").read_text(), server)
            assert (
                client.get("/readyz").json() == {"ready": True}
                and client.get("/v1/models").json()["models"][0]["name"] == "fast-x2"
            )
            wrong = client.post("/v1/restore", files={"file": ("letter.png", b"Dear Sir or Madam,")})
            assert wrong.status_code == 415 and wrong.json()["error"] == "not_an_accepted_format"
            before, end = Counter(), time.monotonic() + 120
            while len(replicas()) < 2 and time.monotonic() < end:
                before += Counter(people.map(ask, range(16)))
            assert set(before) == {200} and len(replicas()) == 2
            under_way = [people.submit(ask) for _ in range(48)]
            time.sleep(0.5)
            replicas()[0].kill()
            meanwhile = Counter(job.result() for job in under_way)
            print(f"{before.total()} by one replica and then two; of 48 while one was killed {dict(meanwhile)}")
            assert meanwhile[200] >= 40 and set(meanwhile) <= {200, 500, 503}
            assert Counter(people.map(ask, range(24))) == {200: 24}
            last = [people.submit(ask) for _ in range(4)]
            time.sleep(0.3)
            server.send_signal(signal.SIGTERM)
            assert {job.result() for job in last} == {200} and server.wait(60) == 0 and not replicas()
        finally:
            server.kill()
            print((tmp_path / "log").read_text()[-2000:])


def test_a_node_dies_and_then_the_driver(cluster, tmp_path):
    survive(cluster, tmp_path, 240)


@pytest.mark.slow
def test_ten_thousand_pictures_survive_it(cluster, tmp_path):
    "Slow: ten minutes."
    cluster.add_node(num_cpus=1, object_store_memory=10**8)
    cluster.wait_for_nodes(120)
    rows = survive(cluster, tmp_path, 10_000)
    print(f"{len(rows)} rows in {len(list((tmp_path / 'out/_srsys/manifest').iterdir()))} files")


@pytest.mark.slow
def test_what_ray_costs(tmp_path):
    "Slow: pictures a second of two engines with a core each, between the first answer and the last, beside one process with two threads."
    cut(tmp_path / "in", 600, side=128)
    resolved = load(shipped_weights()["fast-x2"])
    settings, here = OutputSettings(None, "png", 95, "float32", resolved.sha256), []
    torch.set_num_threads(2)
    restorer, jobs = Restorer(resolved, "cpu", "float32"), plan_jobs([tmp_path / "in"], tmp_path / "alone")
    start = time.monotonic()
    for job in jobs:
        restore_one(job, job.target.name, restorer, settings, measured=True)
    alone = len(jobs) / (time.monotonic() - start)
    torch.set_num_threads(1)
    with environment(OMP_NUM_THREADS="1"):
        begun = time.monotonic()
        restore_archive(
            BatchJob(parse_source(f"{tmp_path}/in"), Storage(f"{tmp_path}/out"), settings),
            resolved,
            ClusterOptions(engines=2, device="cpu", precision="float32"),
            lambda progress, rows: here.append((time.monotonic(), progress.done)),
        )
    (first, before), (last, after) = here[8], here[-1]
    rate = (after - before) / (last - first)
    print(
        f"alone {alone:.1f}, with Ray {rate:.1f} pictures/s: {rate / alone:.0%}; the first answer after {here[0][0] - begun:.1f} s"
    )


class Enough(Exception):
    pass


@pytest.mark.slow
def test_a_bucket_of_a_hundred_thousand(store, tmp_path):
    "Slow: the time to the first restored picture, and the most memory that listing takes."
    content = encode_picture(Picture(data.astronaut()[:32, :32]))
    backend = get_backend("s3")["123456789012"]["aws"]
    for i in range(100_000):
        backend.put_object("archive", f"many/{i // 1000:03d}/{i:06d}.png", content)
    model, heard, start = load(shipped_weights()["fast-x2"]), [], time.monotonic()

    def tell(progress, rows):
        heard.append(time.monotonic() - start)
        if progress.done >= 200 and progress.total:
            raise Enough

    with pytest.raises(Enough):
        restore_archive(
            BatchJob(
                parse_source("s3://archive/many"),
                Storage("s3://archive/restored"),
                OutputSettings(None, "png", 95, "float32", model.sha256),
            ),
            model,
            ClusterOptions(engines=1, device="cpu", precision="float32"),
            tell,
        )
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = sum(1 for _ in list_pictures(parse_source("s3://archive/many")))
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"first picture after {heard[0]:.1f} s, all counted after {heard[-1]:.1f} s; the largest process of Ray had {children:.0f} MB, listing {names} names took {more:.0f} MB more"
    )
