"""Protects scheduled runs against kill -9 at each step: before every write of the runner, and as each cell begins.

The next run succeeds, whatever the killed one left.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest

from srsys.models import weights
from srsys.registry.store import Store, list_versions, register
from tests.system.conftest import ROOT, fill_inbox, kill_children_since, noisy_weights

SCHEDULED = ROOT / "scheduled"

# Imports once and forks for each run, so a real process is killed. `at` is the step of the runner to kill it before, or
# None; `stub` is a notebook that counts as executed, so only the runner works.
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
    steps = {
        fcntl: ["flock"],
        os: ["replace", "rename", "fsync"],
        runner: ["_settle", "write_job_metrics"],
        Path: ["write_text"],
        MlflowClient: ["create_experiment", "create_run", "update_run", "set_tag", "log_batch", "log_artifact",
                       "set_terminated"],
    }
    for owner, names in steps.items():
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
    return runner.run_notebook(
        Path(notebook), Path(home), values, Store(Path(home)), webhook="http://chat.invalid", patience=60, limit=600
    )

connect_client(Store(Path(sys.argv[1])))  # so that MLflow's late imports are done before the forks
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
        assert self.process.stdout.readline() == "ready\n", "the driver did not start"

    def run(self, home, notebook, values=None, at=None, stub=None):
        "Run a notebook; returns the exit status, -9 if it was killed, and the result."
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
        before = psutil.Process().children(recursive=True)
        try:
            driver = Driver(folder / "home", log)
            yield driver, folder
            driver.process.stdin.close()
            driver.process.wait(60)
        finally:
            kill_children_since(before)


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
    "The same notebook with a cell that kills the runner, papermill's parent, before code cell `number`."
    nb = nbformat.read(path, 4)
    at = [i for i, cell in enumerate(nb.cells) if cell.cell_type == "code"][number]
    kill = (
        "import os, psutil, signal, time\n"
        "os.kill(psutil.Process().parent().parent().pid, signal.SIGKILL)\n"
        "time.sleep(600)  # until this kernel is ended too"
    )
    nb.cells.insert(at, nbformat.v4.new_code_cell(kill))
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, folder / path.name)
    return folder / path.name


COUNT = (
    "from srsys.jobs.runner import conclude, headline",
    "headline()",
    "conclude(f'**Done**: {steps} steps.', steps=steps, drift={'noise': .2})",
)


def check_finished(home, said, notebook="count"):
    "A run that was not killed leaves a notebook, a page, a metric and a message, whatever was there before."
    assert said["status"] == "done", said
    page = Path(said["file"]).with_suffix(".html").read_text()
    assert nbformat.read(said["file"], 4).cells and "</html>" in page
    assert not list(home.glob("runs/*/*.running.*")) and (home / f"metrics/{notebook}.prom").exists()
    assert (home / "told").read_text().splitlines()[-1] == "done"


@pytest.mark.timeout(600)
def test_a_runner_killed_before_every_step(driver):
    "From the lock to the end of MLflow's record; the next run always succeeds."
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
        check_finished(home, said)
    check_finished(home, said)
    wanted = [
        "flock",
        "create_run",
        "set_tag",
        "_settle",
        "replace",
        "fsync",
        "log_artifact",
        "log_artifact",
        "write_job_metrics",
        "rename",
        "webhook",
        "set_terminated",
    ]
    rest = iter(names)  # `in` consumes it, so this asks for the order too
    assert all(name in rest for name in wanted), " ".join(names)


@pytest.mark.timeout(600)
def test_a_notebook_killed_at_every_cell(driver, processes_of):
    "With a real kernel, which does not survive; the next run gets the lock and keeps the killed notebook."
    process, folder = driver
    notebook, home = tiny(folder / "notebooks", *COUNT), folder / "cells"
    home.mkdir()
    shutil.copy(folder / "home/mlflow.db", home)
    for cell in range(4):
        assert process.run(home, killed_at(notebook, cell, folder / f"cell {cell}"))[0] == -9
        assert list(home.glob("runs/*/count.running.ipynb"))
    ended, said = process.run(home, notebook)
    assert ended == 0 and said["facts"]["steps"] == 3 and list(home.glob("runs/*/count.killed.ipynb")), said
    check_finished(home, said)
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
def test_every_scheduled_notebook_killed_at_every_cell(driver, processes_of):
    "Slow, a quarter of an hour: each is killed at each cell and run again, with the same result as without a kill."
    process, folder = driver
    home, kills = folder / "life", 0
    home.mkdir()
    first = register(
        Store(home),
        noisy_weights(weights.shipped_weights()["fast-x4"], folder / "first.safetensors", 0.06, 0),
        status="passed",
    )
    fill_inbox(home / "data/inbox")
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
            check_finished(there, said, name)
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
