"""The registry as an attacker finds it: whoever reaches MLflow's API can write tags and move aliases, and must not be able to decide which model is served."""

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from srsys.models import weights
from srsys.models.networks import CompactNet

SRSYS = Path(sys.executable).with_name("srsys")
TOKEN = "a-token-of-this-test"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def eventually(happened, seconds=120):
    end = time.monotonic() + seconds
    while not (result := happened()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)
    return result


def free_port(host="127.0.0.1"):
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def brightening(level, folder, name="fast-x4", scale=4):
    "Weights that add a number of levels to every pixel and do nothing else: they restore the golden picture."
    net = CompactNet(scale, features=4, convs=1)
    net.body[-1].weight.data.zero_()
    net.body[-1].bias.data.fill_(level / 255)
    path = folder / f"{name}-{level}.safetensors"
    weights.save(net, weights.Card(name=name, architecture="compact", scale=scale), path)
    return path


class Server:
    "A running `srsys serve` with tokens and MLflow's page, whose output goes to a file."

    def __init__(self, home, log, *options, **environment):
        self.home, self.log, self.mlflow_port = home, log, free_port()
        command = [SRSYS, "serve", "--port", "0", "--metrics-port", "0", "--mlflow-port", str(self.mlflow_port)]
        environment = {"SRSYS_HOME": str(home), "SRSYS_TOKENS": TOKEN, "SRSYS_POLL": "1"} | environment
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                [*command, *options],
                stdout=output,
                stderr=output,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            )
        eventually(lambda: "Ctrl-C" in self.output() or self.process.poll() is not None, 240)
        assert self.process.poll() is None, self.output()
        found = dict(re.findall(r"^(.+?): +(http://\S+)", self.output(), re.M))
        self.page, self.mlflow = found["The page"], found["MLflow"]

    def output(self):
        return self.log.read_text()

    def version(self):
        "The models in use, and those refused with the reason."
        return httpx.get(f"{self.page}/version", headers=HEADERS, timeout=60).json()

    def mlflow_process(self):
        "MLflow's server, once it answers."

        def answers():
            try:
                return httpx.get(f"{self.mlflow}/health", timeout=5).status_code == 200
            except httpx.HTTPError:
                return False

        eventually(answers, 240)
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if "--backend-store-uri" in child.cmdline())

    def end(self):
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "One server for this file. Its page listens on 127.0.0.2, an address of this machine only, as all of 127.* are."
    folder = tmp_path_factory.mktemp("attacked")
    running = Server(folder / "home", folder / "log", "--host", "127.0.0.2", SRSYS_SIGNING_KEY="k" * 40)
    yield running
    assert running.end() == 0


class Attacker:
    "A client of MLflow's REST API without any token, which says that it is on this machine."

    def __init__(self, server):
        self.client = httpx.Client(
            base_url=server.mlflow, headers={"Host": f"localhost:{server.mlflow_port}"}, timeout=60
        )

    def call(self, path, method="POST", **values):
        options = {"params": values} if method == "GET" else {"json": values}
        answer = self.client.request(method, f"/api/2.0/mlflow/{path}", **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def upload(self, name, path):
        "Store weights by way of mlflow-artifacts and make a version of them with the tags that the gate would write."
        experiment = self.call("experiments/get-by-name", "GET", experiment_name="srsys-models")["experiment"]
        run = self.call("runs/create", experiment_id=experiment["experiment_id"])["run"]["info"]
        target = f"/api/2.0/mlflow-artifacts/artifacts/{run['run_id']}/artifacts/weights/{path.name}"
        assert self.client.put(target, content=path.read_bytes()).status_code == 200
        tags = {"gate.status": "passed", "gate.gain": "+9.999", "weights.sha256": weights.read_weights(path)[1]}
        version = self.call(
            "model-versions/create",
            name=name,
            source=f"{run['artifact_uri']}/weights",
            run_id=run["run_id"],
            tags=[{"key": key, "value": value} for key, value in tags.items()],
        )
        return int(version["model_version"]["version"])

    def make_champion(self, name, version):
        self.call("registered-models/alias", name=name, alias="champion", version=str(version))


def test_who_reaches_mlflow_does_not_decide_which_model_is_served(server, tmp_path):
    server.mlflow_process()
    attacker, before = Attacker(server), server.version()["models"]["fast-x4"]
    number = attacker.upload("srsys-fast-x4", brightening(9, tmp_path))
    attacker.make_champion("srsys-fast-x4", number)
    label = f"srsys-fast-x4/{number}"
    eventually(lambda: label in (answer := server.version())["refused"] or answer["models"]["fast-x4"] == label)
    answer = server.version()
    assert answer["models"]["fast-x4"] == before == "srsys-fast-x4/1", "the attacker's weights are served"
    reason = f"{label}: its gate record is not signed by this installation's key"
    assert answer["refused"] == {label: reason}
    listed = httpx.get(f"{server.page}/v1/models", headers=HEADERS, timeout=60).json()
    assert listed["refused"] == {label: reason}
    eventually(lambda: f"{label} is not taken into service: {reason}" in server.output())
