"""The rows of ../timetable.toml as Airflow 3 DAGs. Add the folder above this one to Airflow's DAGs folder.

Each notebook is one task that calls `srsys run`: in a shell, or in a pod on the GPU nodes if SRSYS_POD_IMAGE names an
image. A row with `asks` can update the asset of another row, which then runs at once. `SETTINGS` lists the other
variables, SRSYS_….
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
POD_HOME = "/home/srsys/data"
# The last line of the output is the result as JSON; Airflow's sidecar reads it from this file.
POD_SCRIPT = """{command} > /tmp/output; status=$?; cat /tmp/output; mkdir -p /airflow/xcom; \
tail -n 1 /tmp/output > /airflow/xcom/return.json; exit $status"""


def format_parameter(value):
    "A parameter in the form that `srsys run -p` reads."
    return value if isinstance(value, str) else json.dumps(value)


def pod_task(name, command):
    "A task that runs the command in a pod on the GPU nodes, with the volume that holds SRSYS_HOME."
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
    from kubernetes.client import models as k8s

    gpus = {"nvidia.com/gpu": SETTINGS["POD_GPUS"]} if SETTINGS["POD_GPUS"] != "0" else None
    claim = k8s.V1PersistentVolumeClaimVolumeSource(SETTINGS["POD_VOLUME"])
    signing_key = k8s.V1SecretKeySelector(name=SETTINGS["POD_SECRET"], key="signing_key", optional=True)
    # As in docker/k8s, whose namespace admits only pods of the level `restricted`.
    pod_security = k8s.V1PodSecurityContext(
        run_as_non_root=True,
        run_as_user=10001,
        run_as_group=10001,
        fs_group=10001,
        seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault"),
    )
    container_security = k8s.V1SecurityContext(
        allow_privilege_escalation=False,
        read_only_root_filesystem=True,
        capabilities=k8s.V1Capabilities(drop=["ALL"]),
    )
    return KubernetesPodOperator(
        task_id=name,
        image=SETTINGS["POD_IMAGE"],
        namespace=SETTINGS["POD_NAMESPACE"],
        labels={"kind": "job"},  # the network policies of docker/k8s select pods by it
        do_xcom_push=True,
        on_finish_action="delete_succeeded_pod",
        cmds=["sh", "-c", POD_SCRIPT.format(command=command)],
        node_selector=dict([SETTINGS["POD_SELECTOR"].split("=", 1)]) if SETTINGS["POD_SELECTOR"] else None,
        container_resources=k8s.V1ResourceRequirements(limits=gpus) if gpus else None,
        security_context=pod_security,
        container_security_context=container_security,
        xcom_sidecar_container_security_context=container_security,
        automount_service_account_token=False,
        env_vars=[
            k8s.V1EnvVar(name="SRSYS_HOME", value=POD_HOME),
            k8s.V1EnvVar(name="SRSYS_SIGNING_KEY", value_from=k8s.V1EnvVarSource(secret_key_ref=signing_key)),
        ],
        env_from=[k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(SETTINGS["POD_SECRET"], optional=True))],
        volumes=[
            k8s.V1Volume(name="home", persistent_volume_claim=claim),
            k8s.V1Volume(name="tmp", empty_dir=k8s.V1EmptyDirVolumeSource()),
        ],
        volume_mounts=[
            k8s.V1VolumeMount(name="home", mount_path=POD_HOME),
            k8s.V1VolumeMount(name="tmp", mount_path="/tmp"),
        ],
    )


def notebook_task(name, parameters, hours):
    "A task that runs a notebook for at most so many hours; its result is the JSON that the notebook returned."
    options = [word for key, value in parameters.items() for word in ("-p", key, format_parameter(value))]
    command = shlex.join(
        [*shlex.split(SETTINGS["COMMAND"]), "run", name, *options, "--limit", str(int(3600 * hours)), "--json"]
    )
    operator = (
        pod_task(name, command)
        if SETTINGS["POD_IMAGE"]
        else BashOperator(task_id=name, bash_command=f"exec {command} ", append_env=True)
    )
    operator.execution_timeout = timedelta(hours=hours + 0.1)
    return operator


def request_task(row):
    "A task that updates another row's asset if the result asks for that row; otherwise the task is skipped."

    @task(task_id=f"ask_for_{row}", outlets=[row_asset(row)])
    def request(result):
        facts = (json.loads(result) if isinstance(result, str) else result)["facts"]
        if not facts.get(row):
            raise AirflowSkipException(f"{row} was not asked for")

    return request


def row_asset(row):
    "The asset whose update starts a row."
    return Asset(f"srsys_{row}_wanted", uri=f"srsys://{row}/wanted")


def row_dag(name, row):
    "The DAG of a row of the timetable."
    schedule = DeltaTriggerTimetable(timedelta(**row["every"])) if "every" in row else row["cron"]
    if any(other.get("asks") == name for other in TIMETABLE.values()):
        schedule = AssetOrTimeSchedule(timetable=schedule, assets=[row_asset(name)])
    with DAG(
        f"srsys_{name}",
        schedule=schedule,
        start_date=row.get("begins"),
        catchup=False,
        max_active_runs=1,
        tags=["srsys"],
        doc_md=__doc__,
    ) as dag:
        tasks = [notebook_task(notebook, row.get(notebook, {}), row.get("hours", 6)) for notebook in row["notebooks"]]
        for before, after in zip(tasks, tasks[1:], strict=False):
            before >> after
        if "asks" in row:
            request_task(row["asks"])(tasks[-1].output)
    return dag


DAGS = {name: row_dag(name, row) for name, row in TIMETABLE.items()}
globals().update({dag.dag_id: dag for dag in DAGS.values()})  # Airflow finds DAGs among a module's globals
