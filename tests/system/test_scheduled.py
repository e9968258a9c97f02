"""Protects the scheduled notebooks, the processes that run them, and the shipped timetable."""

import json
import os
import signal
import subprocess
import tomllib

import pytest

from srsys.jobs.runner import read_parameters
from srsys.jobs.timetable import read_timetable
from tests.system.conftest import ROOT, SRSYS, wait_until

pytestmark = pytest.mark.timeout(900)
NOTEBOOKS = sorted(ROOT.glob("scheduled/*.ipynb"))
assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_scheduled_notebook_only_calls_the_package(path):
    "Its parameters are tagged, it has a headline and a conclusion, and it defines nothing and stores no output."
    assert read_parameters(path)
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert "headline()" in sources[0] and "conclude(" in sources[-1]
    assert not [s for s in sources if "def " in s or "class " in s or "lambda" in s]
    assert not [cell for cell in cells if cell["outputs"]]


def test_the_shipped_timetable():
    rows = read_timetable(ROOT / "scheduled/timetable.toml")
    assert {n.stem for row in rows.values() for n in row.notebooks} == {p.stem for p in NOTEBOOKS}
    assert rows["retrain"].trigger.interval.days == 14


def test_the_shipped_systemd_unit():
    unit = (ROOT / "scheduled/srsys-schedule.service").read_text()
    assert "srsys schedule" in unit and "Restart=always" in unit


def begin(home, notebook, *options):
    return subprocess.Popen(
        [SRSYS, "run", notebook, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"SRSYS_HOME": str(home), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_kill_leaves_no_kernel(tmp_path, how, processes_of):
    "However `srsys run` is ended during a cell, no process survives, the notebook is kept, and the next run works."
    slow = {
        "cells": [
            {
                "cell_type": "code",
                "id": i,
                "metadata": {"tags": ["parameters"]} if i == "p" else {},
                "source": s,
                "outputs": [],
                "execution_count": None,
            }
            for i, s in (
                ("p", "wait = 600"),
                (
                    "w",
                    "import pathlib, subprocess, time\npathlib.Path('there').touch()\n"
                    "subprocess.Popen(['sleep', str(wait)])\ntime.sleep(wait)",
                ),
            )
        ],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (path := tmp_path / "slow.ipynb").write_text(json.dumps(slow))
    home = (tmp_path / "home").resolve()
    process = begin(home, path)
    try:
        wait_until((home / "there").exists, process)
        wait_until(
            lambda: len(processes_of(home)) >= 4
        )  # the command, papermill, the kernel, and what the kernel started
        process.send_signal(how)
        assert process.wait(60) != 0
        wait_until(lambda: not processes_of(home))
    finally:
        for left in [process, *processes_of(home)]:
            left.kill()
    assert list(home.glob("runs/*/slow.running.ipynb"))
    again = begin(home, path, "-p", "wait", "0", "--json")
    out, _ = again.communicate(timeout=240)
    assert again.returncode == 0 and json.loads(out.splitlines()[-1])["status"] == "done", out
    assert list(home.glob("runs/*/slow.killed.ipynb")) and not list(home.glob("runs/*/slow.running.ipynb"))


def test_wrong_usage(tmp_path):
    for options, word in (
        (["train", "-p", "step", "3"], "no parameter 'step'"),
        (["train", "-p", "steps", "many"], "steps must be an int"),
        (["train", "-p", "steps"], "2 arguments"),
    ):
        process = begin(tmp_path, *options)
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 2 and word in out, out


def test_a_process_keeps_the_timetable(tmp_path):
    "`srsys schedule` runs what is due, continues an interrupted row, and ends on SIGTERM."
    (tmp_path / "scheduled").mkdir()
    for path in NOTEBOOKS:
        (tmp_path / "scheduled" / path.name).write_bytes(path.read_bytes())
    timetable = tmp_path / "scheduled/timetable.toml"
    timetable.write_text('[nightly]\nevery = { weeks = 2 }\nbegins = 2026-01-05T02:00:00Z\nnotebooks = ["etl"]\n')
    assert tomllib.loads(timetable.read_text())
    home = tmp_path / "home"
    (home / "runs").mkdir(parents=True)
    (home / "runs/nightly.row").touch()  # it was interrupted
    process = subprocess.Popen(
        [SRSYS, "schedule", "--timetable", timetable],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"SRSYS_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    try:
        wait_until(lambda: list(home.glob("runs/*/etl.done.ipynb")), process)
        wait_until(lambda: not (home / "runs/nightly.row").exists(), process)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "nightly: next" in out and "ended" in out, out
    finally:
        process.kill()
