"""A scheduled run that is killed (kill -9) at each of its steps: before everything that its runner writes or starts, and as each cell of its notebook begins. The next run succeeds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from srsys.models import weights
from srsys.registry.store import Store, list_versions, register

SCHEDULED = Path(__file__).resolve().parents[2] / "scheduled"

# Imports once and forks for each run: what is killed is a real process. `at` is a step of the runner, or nothing; `stub` is a notebook that counts as executed, so that only the runner works.
DRIVER = """
import fcntl, json, os, shutil, signal, sys
from pathlib import Path
import mlflow.artifacts, nbconvert, papermill
from mlflow import MlflowClient
from srsys.jobs import runner
from srsys.registry import tracking
from srsys.registry.store import Store, connect_client

def die_before(step, home):
    left = [step]
    def counted(name, do):
        def call(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                with open(Path(home, "died"), "w") as file:
                    file.write(name)
                os.kill(os.getpid(), signal.SIGKILL)
            return do(*args, **options)
        return call
    for owner, names in {fcntl: ["flock"], os: ["replace", "rename", "fsync"], runner: ["_save_report", "write_job_metrics"], Path: ["write_text"],
                         MlflowClient: ["create_experiment", "create_run", "update_run", "set_tag", "log_batch", "log_artifact", "set_terminated"]}.items():
        for name in names:
            setattr(owner, name, counted(name, getattr(owner, name)))
    runner.httpx.post = counted("webhook", runner.httpx.post)

def do(home, notebook, values, at, stub):
    def told(address, json, **options):
        with open(Path(home, "told"), "a") as file:
            file.write(json["status"] + chr(10))
        return runner.httpx.Response(200, request=runner.httpx.Request("POST", address))
    runner.httpx.post = told
    if stub:
        runner._execute = lambda job, *_: shutil.copy(stub, job["out"]) and ""
    if at is not None:
        die_before(at, home)
    return runner.run_notebook(Path(notebook), Path(home), values, Store(Path(home)), webhook="http://chat.invalid", patience=60, limit=600)

connect_client(Store(Path(sys.argv[1])))  # what MLflow imports on the way is there for all
print("ready", flush=True)
for line in sys.stdin:
    if not (child := os.fork()):
        os.environ["SRSYS_HOME"] = json.loads(line)["home"]
        try:
            print(json.dumps(do(**json.loads(line)).to_dict()), flush=True)
            os._exit(0)
        except BaseException as error:
            print(json.dumps({"status": repr(error)}), flush=True)
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Driver:
    def __init__(self, home, log):
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, home],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, home, notebook, values=None, at=None, stub=None):
        "How a run ended: its exit status, -9 if it was killed, and what came of it."
        self.process.stdin.write(
            json.dumps(
                {
                    "home": str(home),
                    "notebook": str(notebook),
                    "values": values or {},
                    "at": at,
                    "stub": stub and str(stub),
                }
            )
            + "\n"
        )
        self.process.stdin.flush()
        said = {}
        while not (line := self.process.stdout.readline().strip()).lstrip("-").isdigit():
            assert line, "the driver ended"
            said = json.loads(line)
        return int(line), said


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    with open(folder / "log", "w") as log:
        driver = Driver(folder / "home", log)
        yield driver, folder
        driver.process.stdin.close()
        driver.process.wait(60)


def tiny(folder, *cells, name="count"):
    "A notebook with a parameter and some cells."
    first = nbformat.v4.new_code_cell("steps = 3", metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    folder.mkdir(exist_ok=True)
    nbformat.write(
        nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)], metadata=kernel),
        folder / f"{name}.ipynb",
    )
    return folder / f"{name}.ipynb"


def killed_at(path, number, folder):
    "The same notebook, whose runner is killed as code cell `number` begins: the cell below it kills the process that waits for papermill."
    nb = nbformat.read(path, 4)
    at = [i for i, cell in enumerate(nb.cells) if cell.cell_type == "code"][number]
    kill = "import os, psutil, signal, time\nos.kill(psutil.Process().parent().parent().pid, signal.SIGKILL)\ntime.sleep(600)"
    nb.cells.insert(at, nbformat.v4.new_code_cell(kill))
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, folder / path.name)
    return folder / path.name


COUNT = (
    "from srsys.jobs.runner import conclude, headline",
    "headline()",
    "conclude(f'**Done**: {steps} steps.', steps=steps, drift={'noise': .2})",
)


def sound(home, said, notebook="count"):
    "What every run leaves that nobody killed, whatever was there before."
    assert said["status"] == "done", said
    page = Path(said["file"]).with_suffix(".html").read_text()
    assert nbformat.read(said["file"], 4).cells and "</html>" in page
    assert not list(home.glob("runs/*/*.running.*")) and (home / f"metrics/{notebook}.prom").exists()
    assert (home / "told").read_text().splitlines()[-1] == "done"


@pytest.mark.timeout(600)
def test_a_runner_killed_before_every_step(driver):
    "The lock, MLflow's record, the start of papermill, the naming, the page, what is kept in MLflow, the metric, the webhook, the end of the record."
    (process, folder), names = driver, []
    notebook, stub = tiny(folder / "notebooks", *COUNT), folder / "executed.ipynb"
    ended, said = process.run(folder / "plain", notebook)  # by a real kernel
    assert ended == 0, said
    shutil.copy(said["file"], stub)
    for step in range(99):
        (home := folder / f"step {step}").mkdir()
        shutil.copy(folder / "home/mlflow.db", home)
        ended, said = process.run(home, notebook, at=step, stub=stub)
        if ended == 0:
            break
        assert ended == -9, said
        names.append((home / "died").read_text())
        ended, said = process.run(home, notebook, stub=stub)
        assert ended == 0, said
        sound(home, said)
    sound(home, said)
    wanted = [
        "flock",
        "create_run",
        "set_tag",
        "_save_report",
        "replace",
        "fsync",
        "log_artifact",
        "log_artifact",
        "write_job_metrics",
        "rename",
        "webhook",
        "set_terminated",
    ]
    rest = iter(names)
    assert all(name in rest for name in wanted), " ".join(names)


@pytest.mark.timeout(600)
def test_a_notebook_killed_at_every_cell(driver, processes_of):
    "By a real kernel each time, of which nothing is left; the next run has the lock, and keeps what the killed one got to."
    process, folder = driver
    notebook, home = tiny(folder / "notebooks", *COUNT), folder / "cells"
    home.mkdir()
    shutil.copy(folder / "home/mlflow.db", home)
    for cell in range(4):
        assert process.run(home, killed_at(notebook, cell, folder / f"cell {cell}"))[0] == -9
        assert list(home.glob("runs/*/count.running.ipynb"))
    ended, said = process.run(home, notebook)
    assert ended == 0 and said["facts"]["steps"] == 3 and list(home.glob("runs/*/count.killed.ipynb")), said
    sound(home, said)
    assert not processes_of(home)


OPTIONS = {
    "etl": {"side": 96, "holdout": 3},
    "train": {"steps": 20, "batch": 4, "patch": 24, "learning_rate": 3e-4, "validate_every": 10},
    "evaluate": {"least": 4, "latency_ratio": 9.0},
    "promote": {"least": 4, "latency_ratio": 9.0},
    "monitor": {},
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_cell_of_every_scheduled_notebook(driver, processes_of, monkeypatch):
    "Each killed at each cell, then run through from what that left, which comes to the same as a run that nobody killed; a quarter of an hour on an idle machine."
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import test_story

    process, folder = driver
    home, kills = folder / "life", 0
    home.mkdir()
    first = register(
        Store(home),
        test_story.worse(weights.shipped_weights()["fast-x4"], folder / "first.safetensors", 0.06, 0),
        status="passed",
    )
    test_story.fill(home / "data/inbox")
    for name, values in OPTIONS.items():
        path = SCHEDULED / f"{name}.ipynb"
        cells = sum(cell.cell_type == "code" for cell in nbformat.read(path, 4).cells)
        (before := folder / f"before {name}").mkdir()
        shutil.copytree(home, before, dirs_exist_ok=True)
        ended, plain = process.run(home, path, values)
        assert ended == 0, plain
        for cell in range(cells):
            shutil.rmtree(there := folder / f"{name} {cell}", ignore_errors=True)
            shutil.copytree(before, there)
            assert process.run(there, killed_at(path, cell, folder / f"{name} at {cell}"), values)[0] == -9
            assert any("champion" in v.aliases for v in list_versions(Store(there), first.name))
            ended, said = process.run(there, path, values)
            assert ended == 0, (name, cell, said)
            sound(there, said, name)
            came_to = {
                n: [(v.version, v.aliases, v.status) for v in list_versions(Store(h), first.name)]
                for n, h in (("plain", home), ("killed", there))
            }
            assert came_to["plain"] == came_to["killed"], (name, cell, came_to)
            pictures = [sorted(p.name for p in (h / "data/accepted").rglob("*.png")) for h in (home, there)]
            assert pictures[0] == pictures[1], (name, cell)
            assert not processes_of(there)
            shutil.rmtree(there)
            kills += 1
        print(f"{name}: killed at each of {cells} cells")
    print(f"{kills} kills, {kills} runs after them")
