"""Protects the DAGs made from the timetable: a real Airflow (`make airflow`) runs them over the real notebooks."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRSYS, AIRFLOW = Path(sys.executable).with_name("srsys"), ROOT / ".airflow/bin/python"
pytestmark = pytest.mark.timeout(900)

RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import srsys_dags
from airflow.models.asset import AssetEvent
from airflow.utils.session import create_session
for name in sys.argv[2:]:
    run = srsys_dags.DAGS[name].test()
    with create_session() as session:
        events = [event.asset.uri for event in session.query(AssetEvent)]
    tasks = {task.task_id: str(task.state) for task in run.get_task_instances()}
    print("RESULT", json.dumps({"state": str(run.state), "tasks": tasks, "events": events}))
"""
LOOK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import srsys_dags
pods = [
    {"image": task.image, "gpus": task.container_resources.limits, "on": task.node_selector, "command": task.cmds[-1]}
    for task in srsys_dags.DAGS["retrain"].tasks
]
dags = {
    name: [repr(dag.schedule), dag.max_active_runs, dag.catchup, dag.task_ids] for name, dag in srsys_dags.DAGS.items()
}
print("RESULT", json.dumps(pods))
print("RESULT", json.dumps(dags))
"""


@pytest.fixture
def airflow(tmp_path):
    "Runs a script in Airflow's environment over a copy of scheduled/; returns the JSON documents that it prints."
    if not AIRFLOW.exists():
        pytest.skip("needs Airflow in .airflow: `make airflow` puts it there")
    folder = tmp_path / "scheduled"
    shutil.copytree(ROOT / "scheduled", folder)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")
    } | {
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(folder / "airflow"),
        "SRSYS_COMMAND": shlex.join(["env", f"PYTHONPATH={ROOT}", str(SRSYS)]),
        "SRSYS_SCHEDULED": str(folder),
        "OMP_NUM_THREADS": "1",
    }

    def run(code, *args, timetable=None, **more):
        if timetable:
            (folder / "timetable.toml").write_text(timetable)
        migrate = (
            "from airflow.utils.db import initdb; initdb()\n" if not (tmp_path / "airflow/airflow.db").exists() else ""
        )
        done = subprocess.run(
            [AIRFLOW, "-c", migrate + code, folder / "airflow", *args],
            env=environment | more,
            capture_output=True,
            text=True,
            timeout=800,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return [
            json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")
        ]

    return run


def test_each_row_of_the_timetable_is_a_dag(airflow):
    "Retraining starts every two weeks or by an asset, one run at a time; with an image, its tasks are GPU pods."
    pods, dags = airflow(LOOK, SRSYS_POD_IMAGE="registry.example/srsys:1")
    assert [p["on"] for p in pods] == [{"srsys/pool": "gpu"}] * 4
    assert [p["gpus"] for p in pods] == [{"nvidia.com/gpu": "1"}] * 4
    for part in ("srsys", "-p steps 2000", "/airflow/xcom/return.json"):
        assert part in pods[1]["command"]
    when, runs, catchup, tasks = dags["retrain"]
    assert "AssetOrTime" in when and "srsys://retrain/wanted" in when and "days=14" in when
    assert (runs, catchup, tasks) == (1, False, ["etl", "train", "evaluate", "promote"])
    assert dags["monitor"][0] == "'5 * * * *'" and dags["monitor"][3] == ["monitor", "ask_for_retrain"]


def test_airflow_runs_the_pipeline(airflow, home):
    "ETL, training, evaluation and promotion as tasks, each a notebook run by papermill with its default parameters."
    row = (
        "[retrain]\nevery = { weeks = 2 }\nbegins = 2026-01-05T02:00:00Z\n"
        'notebooks = ["etl", "train", "evaluate", "promote"]\n'
    )
    (result,) = airflow(RUN, "retrain", timetable=row)
    tasks = ("etl", "train", "evaluate", "promote")
    assert result["state"] == "success" and result["tasks"] == dict.fromkeys(tasks, "success")
    assert sorted(p.name for p in home.glob("runs/*/*.done.ipynb")) == [
        "etl.done.ipynb",
        "evaluate.done.ipynb",
        "promote.done.ipynb",
        "train.done.ipynb",
    ]


def test_monitoring_asks_for_a_retraining(airflow, tmp_path):
    "The result of `srsys run monitor --json` updates the asset or not; a notebook that fails is a task that fails."
    row = (
        '[monitor]\ncron = "5 * * * *"\nnotebooks = ["monitor"]\nasks = "retrain"\n\n'
        '[retrain]\nevery = { weeks = 2 }\nbegins = 2026-01-05T02:00:00Z\nnotebooks = ["etl"]\n'
    )
    said = tmp_path / "said"  # in place of srsys; every notebook but `monitor` fails
    said.write_text(
        '#!/bin/sh\ntest "$2" = monitor || exit 1\necho "looked at 300 pictures"\n'
        'echo "{\\"facts\\": {\\"retrain\\": $(cat "$0.wanted")}}"\n'
    )
    said.chmod(0o755)
    for wanted, state, events in (("false", "skipped", []), ("true", "success", ["srsys://retrain/wanted"])):
        Path(f"{said}.wanted").write_text(wanted)
        result, *_ = airflow(RUN, "monitor", timetable=row, SRSYS_COMMAND=str(said))
        assert result["tasks"] == {"monitor": "success", "ask_for_retrain": state} and result["events"] == events
    (result,) = airflow(RUN, "retrain", SRSYS_COMMAND=str(said))
    assert result["state"] == "failed" and result["tasks"] == {"etl": "failed"}
