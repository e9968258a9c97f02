"""The rows of ../timetable.toml as Airflow 3 DAGs that call `srsys run`: put this folder's parent where Airflow finds DAGs.

Each notebook is a task, here by a shell, or in a pod on the GPU pool if SRSYS_POD_IMAGE names an image. A row that `asks` for another
updates an asset, and that one then runs without waiting for its day. What else may be set stands in `SETTINGS`.
"""

import json
import os
import shlex
import tomllib
from datetime import timedelta
from pathlib import Path

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, Asset, AssetOrTimeSchedule, DeltaTriggerTimetable, task
from airflow.sdk.exceptions import AirflowSkipException

SETTINGS = {
    name: os.environ.get(f"SRSYS_{name}", default)
    for name, default in {
        "COMMAND": "srsys",
        "POD_IMAGE": "",
        "POD_NAMESPACE": "srsys",
        "POD_SECRET": "srsys",
        "POD_VOLUME": "srsys-home",
        "POD_SELECTOR": "srsys/pool=gpu",
        "POD_GPUS": "1",
    }.items()
}
TIMETABLE = tomllib.loads((Path(__file__).resolve().parents[1] / "timetable.toml").read_text())


def plain(value):
    "A parameter as `srsys run -p` reads it."
    return value if isinstance(value, str) else json.dumps(value)


def pod(name, words):
    "A notebook as a pod on the GPU pool, with the claim that holds SRSYS_HOME."
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
    from kubernetes.client import models as k8s

    gpus = {"nvidia.com/gpu": SETTINGS["POD_GPUS"]} if SETTINGS["POD_GPUS"] != "0" else None
    claim = k8s.V1Volume(
        name="home", persistent_volume_claim=k8s.V1PersistentVolumeClaimVolumeSource(SETTINGS["POD_VOLUME"])
    )
    return KubernetesPodOperator(
        task_id=name,
        image=SETTINGS["POD_IMAGE"],
        namespace=SETTINGS["POD_NAMESPACE"],
        do_xcom_push=True,
        on_finish_action="delete_succeeded_pod",
        cmds=[
            "sh",
            "-c",
            f"{words} > /tmp/said; status=$?; cat /tmp/said; mkdir -p /airflow/xcom; tail -n 1 /tmp/said > /airflow/xcom/return.json; exit $status",
        ],
        node_selector=dict([SETTINGS["POD_SELECTOR"].split("=", 1)]) if SETTINGS["POD_SELECTOR"] else None,
        container_resources=k8s.V1ResourceRequirements(limits=gpus) if gpus else None,
        env_vars={"SRSYS_HOME": "/home/srsys/data"},
        env_from=[k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(SETTINGS["POD_SECRET"], optional=True))],
        volumes=[claim],
        volume_mounts=[k8s.V1VolumeMount(name="home", mount_path="/home/srsys/data")],
    )


def notebook(name, parameters, hours):
    "A notebook as a task; what it came to, as JSON, is the task's result."
    given = [word for key, value in parameters.items() for word in ("-p", key, plain(value))]
    words = shlex.join(
        [*shlex.split(SETTINGS["COMMAND"]), "run", name, *given, "--limit", str(int(3600 * hours)), "--json"]
    )
    made = (
        pod(name, words)
        if SETTINGS["POD_IMAGE"]
        else BashOperator(task_id=name, bash_command=f"exec {words} ", append_env=True)
    )
    made.execution_timeout = timedelta(hours=hours + 0.1)
    return made


def wanted(row):
    "Whether a row's result asks for another row: if so its asset is updated, if not the task is skipped."

    @task(task_id=f"ask_for_{row}", outlets=[asset(row)])
    def ask(result):
        facts = (json.loads(result) if isinstance(result, str) else result)["facts"]
        if not facts.get(row):
            raise AirflowSkipException(f"nothing asks for {row}")

    return ask


def asset(row):
    return Asset(f"srsys_{row}_wanted", uri=f"srsys://{row}/wanted")


def dag(name, row):
    "A row of the timetable."
    when = DeltaTriggerTimetable(timedelta(**row["every"])) if "every" in row else row["cron"]
    if any(other.get("asks") == name for other in TIMETABLE.values()):
        when = AssetOrTimeSchedule(timetable=when, assets=[asset(name)])
    with DAG(
        f"srsys_{name}",
        schedule=when,
        start_date=row.get("begins"),
        catchup=False,
        max_active_runs=1,
        tags=["srsys"],
        doc_md=__doc__,
    ) as made:
        tasks = [notebook(n, row.get(n, {}), row.get("hours", 6)) for n in row["notebooks"]]
        for before, after in zip(tasks, tasks[1:], strict=False):
            before >> after
        if "asks" in row:
            wanted(row["asks"])(tasks[-1].output)
    return made


DAGS = {name: dag(name, row) for name, row in TIMETABLE.items()}
globals().update({made.dag_id: made for made in DAGS.values()})  # where Airflow looks
