"""Protects docker/k8s: what Kustomize renders is accepted by Kubernetes and three operators, and fits the code."""

import inspect
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml
from prometheus_client import generate_latest

from srsys.cli import main
from srsys.cli.common import Settings
from srsys.cli.develop import track_training
from srsys.monitor.telemetry import Metrics
from srsys.registry.store import Store, connect_client
from srsys.serve.access import PUBLIC_ROUTES
from srsys.train.configs import CONFIGS, Compact, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
CRDS = yaml.safe_load(Path(__file__).with_name("crds.yaml").read_text())
OVERLAYS = sorted(path.parent.name for path in ROOT.glob("docker/k8s/overlays/*/kustomization.yaml"))
DRAIN = 25  # seconds, at most, from SIGTERM to the server's end


@pytest.fixture(scope="module")
def rendered(system_package):
    "The resources of each overlay."
    kubectl = system_package("kubectl")

    def render(overlay):
        command = [kubectl, "kustomize", ROOT / "docker/k8s/overlays" / overlay]
        return list(yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True, text=True).stdout))

    return {overlay: render(overlay) for overlay in OVERLAYS}


def named(resources, kind, name):
    return next(r for r in resources if r["kind"] == kind and r["metadata"]["name"] == name)


def templates(value):
    "Every pod template in a resource, however deep."
    if isinstance(value, dict):
        if isinstance(value.get("spec"), dict) and "containers" in value["spec"]:
            yield value
        for part in value.values():
            yield from templates(part)
    elif isinstance(value, list):
        for part in value:
            yield from templates(part)


def pods(resources):
    for resource in resources:
        for template in templates(resource):
            yield f"{resource['kind']} {resource['metadata']['name']}", template


def environment(container, maps):
    "The names and values that a container is given; the value of one that is only known in the cluster is None."
    found = {}
    for source in container.get("envFrom", ()):
        found |= maps[source["configMapRef"]["name"]]
    return found | {entry["name"]: entry.get("value") for entry in container.get("env", ())}


def config_maps(resources):
    return {r["metadata"]["name"]: r["data"] for r in resources if r["kind"] == "ConfigMap"}


def test_the_overlays_are_the_four():
    assert OVERLAYS == ["cpu", "gpu", "gpu-amd", "ray"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_cluster_accepts_every_resource(rendered, overlay):
    known = kubernetes_validate.latest_version()
    for resource in rendered[overlay]:
        if resource["kind"] in CRDS:
            jsonschema.validate(resource["spec"], CRDS[resource["kind"]])
        else:
            kubernetes_validate.validate(resource, known, strict=True)
    found = list(pods(rendered[overlay]))
    assert len(found) >= 5
    for name, template in found:
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}, known, strict=True
        )
        assert template["metadata"]["labels"], name


def test_an_unknown_field_is_refused(rendered):
    resources = rendered["ray"]
    job, deployment = named(resources, "RayJob", "archive"), named(resources, "Deployment", "srsys")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job["spec"] | {"entrypoints": "x"}, CRDS["RayJob"])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            deployment | {"spec": deployment["spec"] | {"replica": 1}},
            kubernetes_validate.latest_version(),
            strict=True,
        )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_meets_the_restricted_security_standard(rendered, overlay):
    "No root, no privileges, writes only to volumes, no service addresses in the environment."
    found = list(pods(rendered[overlay]))
    assert {"Deployment srsys", "Deployment mlflow", "CronJob retrain", "CronJob evaluate", "CronJob monitor"} <= {
        name for name, _ in found
    }
    for name, template in found:
        spec = template["spec"]
        assert all(":" in container["image"] for container in spec["containers"]), name
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001, name
        assert spec["enableServiceLinks"] is False and spec["automountServiceAccountToken"] is False, name
        for container in spec["containers"]:
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"], name
            assert own["capabilities"] == {"drop": ["ALL"]}, name
            requests, limits = (set(container["resources"][kind]) for kind in ("requests", "limits"))
            assert {"cpu", "memory"} <= requests <= limits | {"ephemeral-storage"}, name
            assert {"/tmp", "/var/lib/srsys"} <= {mount["mountPath"] for mount in container["volumeMounts"]}, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ports_and_grace_period_fit_the_server(rendered, overlay):
    spec = named(rendered[overlay], "Deployment", "srsys")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    defaults = {name: parameter.default for name, parameter in inspect.signature(main.serve).parameters.items()}
    assert ports == {"http": defaults["port"], "metrics": defaults["metrics_port"]}
    args = container["args"]
    assert args[:2] == ["srsys", "serve"]
    assert [args[i + 1] for i, arg in enumerate(args) if "port" in arg] == ["7860", "9464"]
    for probe, path in {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}.items():
        assert container[probe]["httpGet"] == {"path": path, "port": "http"}
        assert path in PUBLIC_ROUTES
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] >= pause + DRAIN + 10
    budget = named(rendered[overlay], "PodDisruptionBudget", "srsys")["spec"]
    least = named(rendered[overlay], "ScaledObject", "srsys")["spec"]["minReplicaCount"]
    assert budget["selector"]["matchLabels"] == {"app": "srsys"}
    assert budget["minAvailable"] < least, "no node could be drained"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_setting_exists(rendered, overlay):
    settings = {f"SRSYS_{name}".upper() for name in Settings.model_fields}
    of_mlflow = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["mlflow"]["environment"]
    maps = config_maps(rendered[overlay])
    for name, template in pods(rendered[overlay]):
        for container in template["spec"]["containers"]:
            given = environment(container, maps)
            assert {key for key in given if key.startswith("SRSYS_")} <= settings, name
            if name == "Deployment mlflow":
                assert set(given) <= set(of_mlflow)
                assert given["MLFLOW_BACKEND_STORE_URI"] == of_mlflow["MLFLOW_BACKEND_STORE_URI"]
            else:
                assert given["MLFLOW_TRACKING_URI"] == "http://mlflow:5000", name
                assert given["SRSYS_HOME"] == "/var/lib/srsys", name
    mlflow = maps[next(name for name in maps if name.startswith("mlflow"))]
    assert "mlflow:5000" in mlflow["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


def test_the_autoscaler_and_the_scraper_use_metrics_that_exist(rendered):
    resources = rendered["cpu"]
    metrics = generate_latest(Metrics().registry).decode()
    query = named(resources, "ScaledObject", "srsys")["spec"]["triggers"][0]["metadata"]["query"]
    used = re.findall(r"srsys_\w+", query)
    assert used == ["srsys_queue_depth", "srsys_inflight_requests"]
    for name in used:
        assert f"# TYPE {name} gauge" in metrics
    service = named(resources, "Service", "srsys")
    monitor = named(resources, "ServiceMonitor", "srsys")
    assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_network_policies_allow_only_the_connections_that_are_needed(rendered):
    policies = {r["metadata"]["name"]: r["spec"] for r in rendered["cpu"] if r["kind"] == "NetworkPolicy"}
    assert policies["nothing-else"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert [[port["port"] for port in rule["ports"]] for rule in policies["srsys"]["ingress"]] == [[7860], [9464]]
    assert policies["srsys"]["egress"] == [
        {"to": [{"podSelector": {"matchLabels": {"app": "mlflow"}}}], "ports": [{"port": 5000}]}
    ]
    callers = [
        source["podSelector"]["matchLabels"] for rule in policies["mlflow"]["ingress"] for source in rule["from"]
    ]
    assert callers == [{"app": "srsys"}, {"kind": "job"}]


@pytest.mark.parametrize("overlay, resource", [("gpu", "nvidia.com/gpu"), ("gpu-amd", "amd.com/gpu")])
def test_gpu_pods_request_gpus_of_their_vendor(rendered, overlay, resource):
    vendor = resource.split(".")[0]
    for kind, name in [("Deployment", "srsys"), ("Job", "train")]:
        spec = named(rendered[overlay], kind, name)["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        assert [key for key in container["resources"]["limits"] if "/" in key] == [resource]
        assert container["image"] == ("srsys-worker:latest" if vendor == "nvidia" else "srsys-worker:latest-rocm")
        assert vendor in str(spec["nodeSelector"]) and [t["key"] for t in spec["tolerations"]] == [resource]


def test_the_schedule_runs_notebooks_of_the_timetable(rendered):
    jobs = {r["metadata"]["name"]: r["spec"] for r in rendered["cpu"] if r["kind"] == "CronJob"}
    notebooks = {}
    for name, job in jobs.items():
        (container,) = job["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        notebooks[name] = re.findall(r"srsys run (\w+)", container["args"][-1])
    assert notebooks == {
        "retrain": ["etl", "train", "evaluate", "promote"],
        "evaluate": ["evaluate"],
        "monitor": ["monitor"],
    }
    rows = tomllib.loads((ROOT / "scheduled/timetable.toml").read_text())
    assert {name: rows[name]["notebooks"] for name in notebooks} == notebooks
    crons = {name: row["cron"] for name, row in rows.items() if "cron" in row}
    assert crons and {name: jobs[name]["schedule"] for name in crons} == crons


def test_the_command_line_understands_the_jobs(rendered):
    spec = named(rendered["gpu"], "Job", "train")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    args = dict(zip(container["args"][1:-1], container["args"][2:], strict=True))
    assert container["args"][0] == "torchrun"
    assert args["--nnodes"] == str(spec["completions"]) == str(spec["parallelism"])
    assert args["--nproc-per-node"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert args["--master-addr"] == f"train-0.{spec['template']['spec']['subdomain']}"
    assert named(rendered["gpu"], "Service", "train")["spec"]["clusterIP"] == "None"
    assert args["train"] in CONFIGS
    job = named(rendered["ray"], "RayJob", "archive")["spec"]
    verb, *words = shlex.split(job["entrypoint"])[1:]
    options = {opt for parameter in typer.main.get_command(main.main).commands[verb].params for opt in parameter.opts}
    assert verb == "batch" and [word for word in words if word.startswith("s3://")] == words[:2]
    assert {word for word in words if word.startswith("-")} <= options
    cluster = job["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "the head lists and counts, it does no work"
    locked = (ROOT / "requirements.lock").read_text()
    assert re.search(rf"^ray(\[.*\])?=={re.escape(cluster['rayVersion'])} ", locked, re.M), (
        "the images have another Ray"
    )


def test_replicas_on_ray_fit_their_nodes(rendered, home):
    service = named(rendered["ray"], "RayService", "srsys")["spec"]
    config, (workers,) = yaml.safe_load(service["serveConfigV2"]), service["rayClusterConfig"]["workerGroupSpecs"]
    (app,) = config["applications"]
    assert app["import_path"] == "srsys.cli.main:on_ray"
    deployment, pod = main.on_ray(app["args"])._bound_deployment, workers["template"]["spec"]
    limits, needs = pod["containers"][0]["resources"]["limits"], deployment.ray_actor_options
    assert (needs["num_cpus"], needs["num_gpus"]) == (int(limits["cpu"]), int(limits["nvidia.com/gpu"]))
    assert app["args"]["most"] == workers["maxReplicas"]
    assert pod["terminationGracePeriodSeconds"] >= DRAIN + 10
    assert config["http_options"]["port"] in [port["containerPort"] for port in pod["containers"][0]["ports"]]


def test_only_one_of_several_ranks_writes_to_mlflow(home, monkeypatch):
    "Recognised by the variable RANK, which torchrun sets for each process of the Job."
    config, settings = (
        TrainConfig("ranks-x2", 2, Compact(8, 1, width=16)),
        SimpleNamespace(home=home, tracking_uri=None),
    )
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with track_training(settings, config, home / "runs") as track:
            track.step(1, {"l1": 1.0})
            assert (track.client is not None) == (rank == "0")
    client = connect_client(Store(home))
    runs = client.search_runs([client.get_experiment_by_name("srsys-training").experiment_id])
    assert [(run.info.run_name, run.info.status) for run in runs] == [("ranks-x2", "FINISHED")]
