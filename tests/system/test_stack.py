"""Protects the topology of docker/compose.yaml, run as processes: PostgreSQL, an S3-compatible store, MLflow and srsys.

A model is trained, registered, promoted and served, and is still served after all of them were restarted. moto's server
stands for the store.
"""

import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path

import boto3
import httpx
import pytest
import yaml
from PIL import Image
from skimage import data

from srsys.models.weights import shipped_weights
from srsys.registry import tracking
from srsys.registry.gating import Decision, GateReason
from srsys.registry.promotion import promote, register_challenger
from srsys.registry.store import Store, list_champions
from srsys.train.configs import Compact, TrainConfig
from srsys.train.loop import train
from tests.system.conftest import PATIENCE, ROOT, encoded, free_port, wait_until

pytestmark = pytest.mark.timeout(900)
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())


def wait_for(address, process, log):
    "Wait until a process answers at its address; its log is in the error if it does not."

    def answers():
        try:
            return httpx.get(address, timeout=10).status_code < 500
        except httpx.HTTPError:
            return False

    try:
        wait_until(answers, process)
    except AssertionError as error:
        raise AssertionError(f"{address} does not answer: {log.read_text()[-2000:]}") from error


class Stack:
    "What compose.yaml starts, on free ports of this machine and with state in one folder."

    def __init__(self, folder, postgres_bin):
        self.folder, self.bin, self.running, self.store = folder, postgres_bin, [], None
        self.ports = {name: free_port() for name in ("postgres", "store", "mlflow")}
        (folder / "s3_credentials").write_text("[default]\naws_access_key_id = key\naws_secret_access_key = word\n")
        (folder / "postgres_password").write_text("a password of the stack")
        user = {"user": "postgres"} if os.geteuid() == 0 else {}  # PostgreSQL refuses to be root
        if user:
            os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)
        self.as_postgres = user
        subprocess.run(
            [
                self.bin / "initdb",
                "-D",
                folder / "db",
                "-U",
                "mlflow",
                "--auth=scram-sha-256",
                f"--pwfile={folder}/postgres_password",
                "--no-sync",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd="/",
            **user,
        )

    def environment(self, service="app"):
        "A service's environment in compose.yaml, its hosts being this machine and its secrets these files."
        said = COMPOSE["services"][service]["environment"]
        there = {
            "${BUCKET:-srsys}": "srsys",
            "/run/secrets": str(self.folder),
            "${MLFLOW_PORT:-5001}": str(self.ports["mlflow"]),
            "${MLFLOW_MORE_HOSTS:-}": "",
        }
        there |= {
            "postgres:5432": f"127.0.0.1:{self.ports['postgres']}",
            "store:8333": f"127.0.0.1:{self.ports['store']}",
            "http://mlflow:5000": f"http://127.0.0.1:{self.ports['mlflow']}",
        }
        for old, new in there.items():
            said = {name: value.replace(old, new) for name, value in said.items()}
        return os.environ | {k: v for k, v in said.items() if not k.startswith("SRSYS_")} | {"OMP_NUM_THREADS": "1"}

    def start(self, name, *command, **options):
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                [str(part) for part in command], stdout=log, stderr=log, start_new_session=True, **options
            )
        self.running.append(process)
        return process

    def s3(self):
        return boto3.client(
            "s3",
            endpoint_url=self.environment("mlflow")["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="word",
        )

    def up(self):
        "Start all but the app, and wait until each answers."
        postgres = self.start(
            "postgres",
            self.bin / "postgres",
            "-D",
            self.folder / "db",
            "-p",
            self.ports["postgres"],
            "-h",
            "127.0.0.1",
            "-k",
            "",
            "-F",
            cwd="/",
            **self.as_postgres,
        )
        ask = [self.bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.ports["postgres"])]
        wait_until(lambda: subprocess.run(ask).returncode == 0, postgres)
        if not self.store:  # moto keeps its content in memory, so it alone is not restarted
            self.store = self.start(
                "store", sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", self.ports["store"]
            )
            self.running.remove(self.store)
            wait_for(self.environment("mlflow")["AWS_ENDPOINT_URL"], self.store, self.folder / "store.log")
            self.s3().create_bucket(Bucket="srsys")
            subprocess.run(
                [self.bin / "createdb", "-h", "127.0.0.1", "-p", str(self.ports["postgres"]), "-U", "mlflow", "mlflow"],
                check=True,
                env=os.environ | {"PGPASSWORD": "a password of the stack"},
            )
        server = self.start(
            "mlflow",
            ROOT / "docker/entry.sh",
            sys.executable,
            "-m",
            "mlflow",
            "server",
            env=self.environment("mlflow")
            | {
                "MLFLOW_HOST": "127.0.0.1",
                "MLFLOW_PORT": str(self.ports["mlflow"]),
                "MLFLOW_WORKERS": "1",
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            },
        )
        wait_for(f"http://127.0.0.1:{self.ports['mlflow']}/health", server, self.folder / "mlflow.log")

    def down(self):
        for process in reversed(self.running):
            if process.poll() is not None:
                continue
            os.killpg(process.pid, signal.SIGTERM if process.args[0].endswith("entry.sh") else signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)
        self.running.clear()


@pytest.fixture
def stack(tmp_path_factory, system_package):
    system_package("psql")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(system_package("initdb")).parent]
    folder = tmp_path_factory.mktemp("stack")
    for parent in (folder.parent, folder.parent.parent):  # another user is to come through
        parent.chmod(parent.stat().st_mode | 0o011)
    made = Stack(folder, found[-1])
    try:
        yield made
    finally:
        made.down()
        if made.store:
            os.killpg(made.store.pid, signal.SIGKILL)
            made.store.wait(30)


def train_small(store, folder):
    "Train a small network for two steps, tracked as `srsys train` does it; returns the weights file."
    config = TrainConfig(
        "small-x2",
        2,
        Compact(8, 1, width=16),
        steps=2,
        batch=2,
        patch=16,
        validate_every=2,
        precision="32-true",
        shrink=(),
        holdout=(("Photos", 3),),
    )
    (folder / "Photos").mkdir()
    for i in range(5):
        Image.fromarray(data.astronaut()[i * 96 : i * 96 + 96, 100:196]).save(folder / f"Photos/{i}.png")
    with tracking.track_run(store, "srsys-training", config.name, config.settings()) as track:
        path = train(config, folder, folder, accelerator="cpu")
        track.file(path)
    assert track.client, "MLflow took it"
    return path


def restored(running):
    "Send a picture to the server; returns the model's version and the result."
    answer = httpx.post(
        running.page + "/v1/restore",
        files={"file": ("cat.png", encoded(data.chelsea()[:60, :80]))},
        data={"model": "small"},
        timeout=PATIENCE,
    )
    assert answer.status_code == 200, answer.text
    return answer.headers["x-model-version"], answer.content


def test_a_model_is_trained_promoted_served_and_still_served_after_a_restart(stack, serve, home, monkeypatch, tmp_path):
    stack.up()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address := stack.environment()["MLFLOW_TRACKING_URI"])
    key = "the signing key of all machines that share this registry"
    monkeypatch.setenv("SRSYS_SIGNING_KEY", key)
    store = Store(home, address, key)
    version = register_challenger(store, train_small(store, tmp_path))
    assert version.aliases == ("challenger",)
    first = Decision(
        version.label,
        None,
        version.sha256,
        None,
        None,
        (GateReason("trust", True, "a model of two training steps"),),
    )
    assert promote(store, version.name, first).aliases == ("champion",)
    running = serve(tmp_path / "first")
    made_by, picture = restored(running)
    assert made_by == "srsys-small-x2/1"
    assert running.end(signal.SIGTERM) == 0

    keys = {item["Key"].rsplit("/", 1)[1] for item in stack.s3().list_objects_v2(Bucket="srsys")["Contents"]}
    assert {"small-x2.safetensors", *(f"{name}.safetensors" for name in shipped_weights())} <= keys
    assert {"decision.md", "decision.json"} <= keys
    stack.down()
    stack.up()
    running = serve(tmp_path / "second")  # a machine that has nothing yet
    assert restored(running) == (made_by, picture)
    served = {model["name"]: model["version"] for model in httpx.get(running.page + "/v1/models").json()["models"]}
    assert served == {v.name.removeprefix("srsys-"): v.label for v in list_champions(store).values()}
    assert all(version.endswith("/1") for version in served.values()), "a model was registered twice"
    assert running.end(signal.SIGTERM) == 0
