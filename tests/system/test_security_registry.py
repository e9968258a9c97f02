"""Whoever reaches MLflow's API can write tags and move aliases, but must not decide which model is served."""

import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from srsys.image import Picture, save_picture
from srsys.models import weights
from srsys.models.networks import CompactNet
from srsys.registry import store as store_module
from srsys.registry.promotion import rollback, sign_version
from srsys.registry.store import (
    RegistryError,
    Store,
    connect_client,
    list_versions,
    register,
    register_shipped,
    resolve,
    set_alias,
    weights_file,
)

SRSYS = Path(sys.executable).with_name("srsys")
TOKEN, KEY = "a-token-of-this-test", "the signing key of this test, which MLflow does not have"
NAME, NOT_SIGNED = "srsys-moss-x2", "its gate record is not signed by this installation's key"
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
    running = Server(folder / "home", folder / "log", "--host", "127.0.0.2", SRSYS_SIGNING_KEY=KEY)
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

    tell = subprocess.run(
        [SRSYS, "models", "list"],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"SRSYS_HOME": str(server.home), "SRSYS_SIGNING_KEY": KEY, "COLUMNS": "200"},
    )
    assert reason in tell.stdout, tell.stderr
    with pytest.raises(RegistryError, match="not signed by this installation's key"):
        resolve("fast-x4", Store(server.home, signing_key=KEY))


def test_an_operator_signs_it_and_then_it_is_served(server, tmp_path):
    "The same way in, but somebody who has the key has looked at the version."
    attacker = Attacker(server)
    number = attacker.upload("srsys-fast-x2", brightening(5, tmp_path, "fast-x2", 2))
    attacker.make_champion("srsys-fast-x2", number)
    label = f"srsys-fast-x2/{number}"
    eventually(lambda: label in server.version()["refused"])
    attacker.call("model-versions/set-tag", name="srsys-fast-x2", version="1", key="gate.status", value="refused")
    with pytest.raises(RegistryError, match="gate status of srsys-fast-x2/1 is"):
        sign_version(Store(server.home, signing_key=KEY), "fast-x2", 1)
    sign_version(Store(server.home, signing_key=KEY), "fast-x2", number)
    eventually(lambda: server.version()["models"]["fast-x2"] == label)


def test_mlflow_listens_on_this_machine_only_and_gets_no_secrets(server):
    assert server.mlflow == f"http://127.0.0.1:{server.mlflow_port}", "and the page on 127.0.0.2"
    process = server.mlflow_process()
    for each in [process, *process.children(recursive=True)]:
        assert not {"SRSYS_TOKENS", "SRSYS_SIGNING_KEY"}.intersection(each.environ())
    addresses = {c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    for child in process.children(recursive=True):
        addresses |= {c.laddr for c in child.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert {address.ip for address in addresses} == {"127.0.0.1"}
    assert KEY.encode() not in b"".join(p.read_bytes() for p in server.home.rglob("*") if p.is_file())
    assert KEY not in server.output()


def test_the_processes_that_read_files_do_not_have_the_key(server, tmp_path):
    save_picture(Picture(np.full((24, 24, 3), 99, np.uint8)), tmp_path / "grey.png")
    answer = httpx.post(
        f"{server.page}/v1/restore",
        files={"file": (tmp_path / "grey.png").read_bytes()},
        data={"model": "photo-x2"},
        headers=HEADERS,
        timeout=240,
    )
    assert answer.status_code == 200, answer.text
    children = psutil.Process(server.process.pid).children(recursive=True)
    workers = [child for child in children if "srsys.serve import worker_pool" in " ".join(child.cmdline())]
    assert workers and not any("SRSYS_SIGNING_KEY" in worker.environ() for worker in workers)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    "A home with a champion, the one before, and a version that was never judged."
    folder = tmp_path_factory.mktemp("registry")
    store = Store(folder / "home")
    for level in (1, 2):
        register_shipped(store, {"moss-x2": brightening(level, folder, "moss-x2", 2)})
    register(store, brightening(3, folder, "moss-x2", 2), alias=None, status="")
    return store.home


@pytest.fixture
def store(template, tmp_path):
    "A copy of that home, whose artifacts are copies too."
    shutil.copytree(template, tmp_path / "home")
    store = Store(tmp_path / "home")
    with sqlite3.connect(store.home / "mlflow.db") as database:
        for table, column in (("model_versions", "source"), ("model_versions", "storage_location")):
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(template), str(store.home)))
    return store


def write_tags(store, number, **tags):
    for key, value in tags.items():
        connect_client(store).set_model_version_tag(NAME, str(number), key.replace("_", ".", 1), value)


def test_replaced_weights_with_their_own_digest_are_refused(store, tmp_path):
    champion = list_versions(store, NAME)[1]
    path = weights_file(store, champion)
    assert path.is_relative_to(store.home)
    shutil.copy(brightening(7, tmp_path, "moss-x2", 2), path)
    with pytest.raises(RegistryError, match="the digest it was registered with is"):
        resolve("moss-x2", store)
    write_tags(store, 2, weights_sha256=weights.read_weights(path)[1])
    with pytest.raises(RegistryError, match=f"{NAME}/2: {NOT_SIGNED}"):
        resolve("moss-x2", store)


def test_a_signature_is_of_one_version_and_one_status(store):
    champion = list_versions(store, NAME)[1]
    write_tags(store, 3, gate_status="bootstrap", gate_signature=champion.signature)
    set_alias(store, NAME, "champion", 3)
    for name in ("moss-x2", f"models:/{NAME}@champion", f"models:/{NAME}/3"):
        with pytest.raises(RegistryError, match=f"{NAME}/3: {NOT_SIGNED}"):
            resolve(name, store)
    set_alias(store, NAME, "champion", 2)
    assert resolve("moss-x2", store).version == champion
    write_tags(store, 2, gate_status="passed")
    with pytest.raises(RegistryError, match=f"{NAME}/2: {NOT_SIGNED}"):
        resolve("moss-x2", store)


def test_another_key_is_refused_and_so_is_its_rollback(store, tmp_path):
    elsewhere = Store(store.home, signing_key="x" * 32)
    with pytest.raises(RegistryError, match=f"{NAME}/2: {NOT_SIGNED}"):
        resolve("moss-x2", elsewhere)
    with pytest.raises(RegistryError, match=f"{NAME}/1 cannot be champion again.*{NOT_SIGNED}"):
        rollback(elsewhere, "moss-x2")
    (tmp_path / "key").write_text(f"  {'x' * 32}\n")
    sign_version(Store(store.home, signing_key=tmp_path / "key"), "moss-x2", 2)
    assert resolve("moss-x2", elsewhere).label == f"{NAME}/2", "by file or by value, with or without an end of line"
    assert rollback(store, "moss-x2").version == 1


def forget_signatures(store):
    "Make the home as it was before there were signatures."
    signed = [version.version for version in list_versions(store, NAME) if version.signature]
    (store.home / "signing.key").unlink()
    for number in signed:
        connect_client(store).delete_model_version_tag(NAME, str(number), "gate.signature")


def test_an_old_home_is_trusted_once(store, caplog):
    forget_signatures(store)
    with caplog.at_level(logging.WARNING, "srsys.registry.store"):
        assert resolve("moss-x2", store).label == f"{NAME}/2"
        assert [bool(v.signature) for v in list_versions(store, NAME)] == [True, True, False]
        assert rollback(store, "moss-x2").version == 1
    (line,) = caplog.messages
    assert f"{NAME}/1, {NAME}/2" in line and "older than its signing key" in line
    write_tags(store, 3, gate_status="passed")
    set_alias(store, NAME, "champion", 3)
    (store.home / "signing.key").unlink()  # lost: this is no old home, and nobody is trusted again
    for name in ("moss-x2", f"models:/{NAME}/1"):
        with pytest.raises(RegistryError, match=NOT_SIGNED):
            resolve(name, store)


def test_the_upgrade_of_an_old_home_is_finished_after_a_crash(store, monkeypatch):
    forget_signatures(store)
    write, calls = store_module._write_signature, []

    def fail_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RegistryError("a power cut")
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(store_module, "_write_signature", fail_at_the_second)
        assert [bool(version.signature) for version in list_versions(store, NAME)] == [True, False, False]
        assert not (store.home / "signing.key").exists()
    assert resolve("moss-x2", store).label == f"{NAME}/2" and rollback(store, "moss-x2").version == 1


def test_a_registry_on_a_server_is_never_trusted_by_itself(store, caplog):
    forget_signatures(store)
    remote = Store(store.home, uri=store.address)
    with pytest.raises(RegistryError, match=f"{NAME}/2: {NOT_SIGNED}"):
        resolve("moss-x2", remote)
    assert not caplog.messages
    assert sign_version(remote, NAME, 2).aliases == ("champion",)
    assert resolve("moss-x2", remote).label == f"{NAME}/2"
