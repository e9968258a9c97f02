"""Protects the life of a model: pictures come in, a network is fine-tuned, judged, promoted and served; a worse one is
refused, and a promotion is rolled back.

The notebooks run as the timetable runs them, with MLflow's server on SQLite and on PostgreSQL, while the app serves.
"""

import os
import pwd
import re
import signal
import subprocess
from pathlib import Path

import httpx
import pytest
from skimage import data

from srsys.jobs import runner
from srsys.models import weights
from srsys.registry import promotion
from srsys.registry.store import Store, list_versions, register
from srsys.serve import mlflow_server
from tests.system.conftest import ROOT, SRSYS, encoded, fill_inbox, free_port, noisy_weights, wait_until

pytestmark = pytest.mark.timeout(900)  # a minute for each database on an idle machine
SCHEDULED = ROOT / "scheduled"
STEPS = {
    "etl": {"side": 96, "holdout": 3},
    "train": {"steps": 60, "batch": 4, "patch": 24, "learning_rate": 3e-4, "validate_every": 20},
    "evaluate": {"least": 4, "latency_ratio": 9.0},
    "promote": {"least": 4, "latency_ratio": 9.0},
}


def answers(address):
    try:
        return httpx.get(address, timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def postgres(tmp_path_factory, system_package):
    "Starts a PostgreSQL server; returns the address of its database."
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
        wait_until(lambda: subprocess.run([tools / "createdb", *at, "mlflow"], capture_output=True).returncode == 0)
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow"

    yield start
    for process in running:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(params=["sqlite", "postgresql"])
def mlflow(request, tmp_path, monkeypatch):
    "MLflow's server on a database of that kind: its address, which is also in the environment."
    database = (
        request.getfixturevalue("postgres")() if request.param == "postgresql" else f"sqlite:///{tmp_path}/server.db"
    )
    (tmp_path / "server").mkdir()
    command = mlflow_server.mlflow_command(Store(tmp_path / "server", database), "127.0.0.1", port := free_port())
    server = mlflow_server.start_child_process(command, tmp_path / "mlflow.log")
    try:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), server)
        except AssertionError as error:
            raise AssertionError((tmp_path / "mlflow.log").read_text()) from error
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stdin.close()
        try:
            server.wait(60)
        finally:
            server.kill()


def test_the_life_of_a_model(mlflow, home, serve, tmp_path, monkeypatch):
    monkeypatch.setenv("SRSYS_POLL", "3")
    store = Store(home, mlflow)
    first = register(
        store,
        noisy_weights(weights.shipped_weights()["fast-x4"], tmp_path / "first.safetensors", 0.12, 0),
        status="passed",
    )
    fill_inbox(home / "data/inbox")
    app = serve(home, within=600)

    def run(notebook):
        return runner.run_notebook(SCHEDULED / f"{notebook}.ipynb", home, STEPS[notebook], store, limit=600)

    def served():
        answer = httpx.post(
            app.page + "/v1/restore",
            files={"file": ("a.png", encoded(data.astronaut()[:24, :32]))},
            data={"model": "fast-x4"},
            timeout=240,
        )
        assert answer.status_code == 200, answer.text
        return answer.headers["X-Model-Version"]

    assert served() == first.label
    done = {notebook: run(notebook).facts for notebook in STEPS}
    assert done["etl"]["quarantined"] >= 2 and done["etl"]["accepted"] >= 8, done
    for notebook in STEPS:  # they show their plots even where MPLBACKEND is Agg
        assert '"image/png"' in next(home.glob(f"runs/*/{notebook}.done.ipynb")).read_text(), notebook
    assert done["train"]["after"] > done["train"]["before"] + 0.1
    assert done["evaluate"]["accepted"], done["evaluate"]
    assert done["promote"] == {"accepted": True, "version": done["train"]["version"], "status": "passed"}, done
    second = next(v for v in list_versions(store, "srsys-fast-x4") if "champion" in v.aliases)
    assert second.label == done["train"]["version"] and second != first
    wait_until(lambda: served() == second.label, app.process)  # by the process that served the first

    third = promotion.register_challenger(
        store, noisy_weights(weights.shipped_weights()["fast-x4"], tmp_path / "third.safetensors", 0.2, 1)
    )
    judged, refused = run("evaluate"), run("promote")
    assert not judged.facts["accepted"]
    assert refused.facts == {"accepted": False, "version": third.label, "status": "refused"}
    assert f"may not replace {second.label}" in refused.words and "gain on validation" in refused.words
    assert served() == second.label

    back = subprocess.run([SRSYS, "rollback", "fast-x4"], capture_output=True, text=True, timeout=240)
    assert back.returncode == 0 and first.label in back.stdout, back.stderr
    wait_until(lambda: served() == first.label, app.process)
    # a second run on the same day has the time in its name: evaluate.done.184830.ipynb
    kept = sorted(re.sub(r"\.\d{6}\.", ".", path.name) for path in home.glob("runs/*/*.ipynb"))
    run_twice = ["evaluate", "promote"]
    assert kept == sorted(f"{notebook}.done.ipynb" for notebook in [*STEPS, *run_twice])
    assert app.process.poll() is None
