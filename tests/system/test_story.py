"""The life of a model, whole: pictures come in, a network is fine-tuned on them, judged, promoted and served; a worse one is refused, and a promotion taken back.

The notebooks run as the timetable runs them, with MLflow's own server on SQLite and on PostgreSQL, while people are served.
"""

import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from skimage import data

from srsys.image import Picture, encode_picture, save_picture
from srsys.jobs import runner
from srsys.models import weights
from srsys.registry import promotion
from srsys.registry.store import Store, list_versions, register
from srsys.serve import mlflow_server

pytestmark = pytest.mark.timeout(900)  # a minute for each database on an idle machine
SRSYS, SCHEDULED = Path(sys.executable).with_name("srsys"), Path(__file__).resolve().parents[2] / "scheduled"
STEPS = {
    "etl": {"side": 96, "holdout": 3},
    "train": {"steps": 60, "batch": 4, "patch": 24, "learning_rate": 3e-4, "validate_every": 20},
    "evaluate": {"least": 4, "latency_ratio": 9.0},
    "promote": {"least": 4, "latency_ratio": 9.0},
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(true, within=240):
    end = time.monotonic() + within
    while not (found := true()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.2)
    return found


def answers(address):
    try:
        return httpx.get(address, timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def postgres(tmp_path_factory, system_package):
    "Starts a PostgreSQL; the address of its database."
    running = []

    def start():
        system_package("psql")
        tools = (sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(system_package("initdb")).parent])[-1]
        folder, port, user = tmp_path_factory.mktemp("postgres"), free_port(), {}
        if os.geteuid() == 0:  # which PostgreSQL refuses to be
            user = {"user": "postgres"}
            os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)
            for parent in (folder.parent, folder.parent.parent):
                parent.chmod(parent.stat().st_mode | 0o011)
        subprocess.run(
            [tools / "initdb", "-D", folder / "db", "-U", "mlflow", "--auth=trust", "--no-sync"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd="/",
            **user,
        )
        running.append(
            subprocess.Popen(
                [tools / "postgres", "-D", folder / "db", "-p", str(port), "-h", "127.0.0.1", "-k", "", "-F"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                **user,
            )
        )
        at = ["-h", "127.0.0.1", "-p", str(port), "-U", "mlflow"]
        until(lambda: subprocess.run([tools / "createdb", *at, "mlflow"], capture_output=True).returncode == 0)
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow"

    yield start
    for process in running:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.fixture(params=["sqlite", "postgresql"])
def mlflow(request, tmp_path, monkeypatch):
    "MLflow's server on a database of that kind: its address, which the environment has too."
    database = (
        request.getfixturevalue("postgres")() if request.param == "postgresql" else f"sqlite:///{tmp_path}/server.db"
    )
    (tmp_path / "server").mkdir()
    command = mlflow_server.mlflow_command(Store(tmp_path / "server", database), "127.0.0.1", port := free_port())
    server = mlflow_server.start_child_process(command, tmp_path / "mlflow.log")
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/health") or server.poll() is not None)
        assert server.poll() is None, (tmp_path / "mlflow.log").read_text()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stdin.close()
        server.wait(60)


def worse(path, out, noise, seed):
    "Weights with noise upon them, as a file of their own."
    model, rng = weights.load(path), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.net.parameters():
            weight += noise * weight.std().nan_to_num(0) * torch.randn(weight.shape, generator=rng)
    weights.save(model.net, replace(model.card, notes=f"noise {noise}"), out)
    return out


def fill(inbox):
    "Pieces of photographs, and two files that are none."
    inbox.mkdir(parents=True)
    for name in ("astronaut", "coffee", "chelsea"):
        pixels = getattr(data, name)()
        for y in range(0, pixels.shape[0] - 95, 96):
            for x in range(0, pixels.shape[1] - 95, 96):
                save_picture(Picture(pixels[y : y + 96, x : x + 96]), inbox / f"{name}-{y}-{x}.png")
    (inbox / "letter.png").write_text("Dear Sir or Madam,")
    save_picture(Picture(np.full((128, 128, 3), 99, np.uint8)), inbox / "grey.png")


def test_the_life_of_a_model(mlflow, home, serve, tmp_path, monkeypatch):
    monkeypatch.setenv("SRSYS_POLL", "3")
    store = Store(home, mlflow)
    first = register(
        store, worse(weights.shipped_weights()["fast-x4"], tmp_path / "first.safetensors", 0.12, 0), status="passed"
    )
    fill(home / "data/inbox")
    app = serve(home, within=600)

    def run(notebook):
        return runner.run_notebook(SCHEDULED / f"{notebook}.ipynb", home, STEPS[notebook], store, limit=600)

    def served():
        answer = httpx.post(
            app.page + "/v1/restore",
            files={"file": ("a.png", encode_picture(Picture(data.astronaut()[:24, :32])))},
            data={"model": "fast-x4"},
            timeout=240,
        )
        assert answer.status_code == 200, answer.text
        return answer.headers["X-Model-Version"]

    assert served() == first.label
    done = {notebook: run(notebook).facts for notebook in STEPS}
    assert done["etl"]["quarantined"] >= 2 and done["etl"]["accepted"] >= 8, done
    assert all('"image/png"' in next(home.glob(f"runs/*/{n}.done.ipynb")).read_text() for n in STEPS), (
        "whatever MPLBACKEND says here"
    )
    assert done["train"]["after"] > done["train"]["before"] + 0.1
    assert done["evaluate"]["accepted"] and done["promote"] == {
        "accepted": True,
        "version": done["train"]["version"],
        "status": "passed",
    }, done
    second = next(v for v in list_versions(store, "srsys-fast-x4") if "champion" in v.aliases)
    assert second.label == done["train"]["version"] and second != first
    until(lambda: served() == second.label)  # by the same process, which never stopped

    third = promotion.register_challenger(
        store, worse(weights.shipped_weights()["fast-x4"], tmp_path / "third.safetensors", 0.2, 1)
    )
    judged, refused = run("evaluate"), run("promote")
    assert not judged.facts["accepted"] and refused.facts == {
        "accepted": False,
        "version": third.label,
        "status": "refused",
    }
    assert f"may not replace {second.label}" in refused.words and "gain on validation" in refused.words
    assert served() == second.label

    back = subprocess.run([SRSYS, "rollback", "fast-x4"], capture_output=True, text=True, timeout=240)
    assert back.returncode == 0 and first.label in back.stdout, back.stderr
    until(lambda: served() == first.label)
    kept = [p.name for p in home.glob("runs/*/*.ipynb")]
    assert (
        app.process.poll() is None
        and {*kept} >= {f"{notebook}.done.ipynb" for notebook in STEPS}
        and len(kept) == len(STEPS) + 2
    ), kept  # the earlier two as well
