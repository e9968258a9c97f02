"""docker/k8s: Kubernetes and three operators accept what Kustomize renders, and it fits the code that runs in it."""

import inspect
import re
import shlex
import shutil
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
from srsys.serve import worker_pool
from srsys.train.configs import CONFIGS, Compact, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
CRDS = yaml.safe_load(Path(__file__).with_name("crds.yaml").read_text())
OVERLAYS = sorted(path.parent.name for path in ROOT.glob("docker/k8s/overlays/*/kustomization.yaml"))
DRAIN = 25  # seconds, at most, from SIGTERM to the server's end
SERVER_MEMORY = 3 * 2**30  # bytes for the server itself, beside its worker processes
# Read by srsys, but not a part of Settings
SIGNING_KEY = {"SRSYS_SIGNING_KEY", "SRSYS_SIGNING_KEY_FILE"}


@pytest.fixture(scope="module")
def rendered():
    "The resources of each overlay."
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl, which contains Kustomize")
    return {
        name: list(
            yaml.safe_load_all(
                subprocess.run(
                    ["kubectl", "kustomize", ROOT / "docker/k8s/overlays" / name],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
        )
        for name in OVERLAYS
    }


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


def in_bytes(quantity):
    "A quantity of memory of Kubernetes, such as 3Gi."
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi)", quantity).groups()
    return int(number) * 1024 ** (["Ki", "Mi", "Gi"].index(unit) + 1)


def config_maps(resources):
    return {r["metadata"]["name"]: r["data"] for r in resources if r["kind"] == "ConfigMap"}


def test_the_overlays_are_the_four():
    assert OVERLAYS == ["cpu", "gpu", "gpu-amd", "ray"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_resource_is_one_that_the_cluster_accepts(rendered, overlay):
    known = kubernetes_validate.latest_version()
    for resource in rendered[overlay]:
        if resource["kind"] in CRDS:
            jsonschema.validate(resource["spec"], CRDS[resource["kind"]])
        else:
            kubernetes_validate.validate(resource, known, strict=True)
    for name, template in pods(rendered[overlay]):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}, known, strict=True
        )
        assert template["metadata"]["labels"], name


def test_a_field_that_nobody_knows_is_refused(rendered):
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
def test_every_pod_keeps_the_restricted_rules(rendered, overlay):
    "No root, no capabilities, nothing written except in volumes, no addresses of services in the environment."
    found = list(pods(rendered[overlay]))
    assert {"Deployment srsys", "Deployment mlflow", "CronJob retrain", "CronJob evaluate", "CronJob monitor"} <= {
        name for name, _ in found
    }
    for name, template in found:
        spec = template["spec"]
        assert all(":" in container["image"] for container in spec["containers"]), name
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not spec.get("hostNetwork") and not spec.get("initContainers"), name
        assert spec["enableServiceLinks"] is False and spec["automountServiceAccountToken"] is False, name
        for container in spec["containers"]:
            own = container["securityContext"]
            assert (
                own["readOnlyRootFilesystem"]
                and not own["allowPrivilegeEscalation"]
                and own["capabilities"] == {"drop": ["ALL"]}
            ), name
            assert (
                {"cpu", "memory"}
                <= set(container["resources"]["requests"])
                <= set(container["resources"]["limits"]) | {"ephemeral-storage"}
            ), name
            assert {"/tmp", "/var/lib/srsys"} <= {mount["mountPath"] for mount in container["volumeMounts"]}, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_server_is_probed_and_ended_as_it_expects(rendered, overlay):
    spec = named(rendered[overlay], "Deployment", "srsys")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    defaults = {name: parameter.default for name, parameter in inspect.signature(main.serve_command).parameters.items()}
    assert ports == {"http": defaults["port"], "metrics": defaults["metrics_port"]}
    assert container["args"][:2] == ["srsys", "serve"] and [
        container["args"][i + 1] for i, arg in enumerate(container["args"]) if "port" in arg
    ] == ["7860", "9464"]
    routes = (ROOT / "srsys/serve/api.py").read_text()
    for probe, path in {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}.items():
        assert container[probe]["httpGet"] == {"path": path, "port": "http"} and f'"{path}"' in routes
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] >= pause + DRAIN + 10
    budget = named(rendered[overlay], "PodDisruptionBudget", "srsys")["spec"]
    least = named(rendered[overlay], "ScaledObject", "srsys")["spec"]["minReplicaCount"]
    assert budget["selector"]["matchLabels"] == {"app": "srsys"} and budget["minAvailable"] < least, (
        "a node can be drained"
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_setting_exists(rendered, overlay):
    settings = {f"SRSYS_{name}".upper() for name in Settings.model_fields}
    of_mlflow = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["mlflow"]["environment"]
    maps = config_maps(rendered[overlay])
    for name, template in pods(rendered[overlay]):
        for container in template["spec"]["containers"]:
            given = environment(container, maps)
            assert {key for key in given if key.startswith("SRSYS_")} <= settings | SIGNING_KEY, name
            if name == "Deployment mlflow":
                assert (
                    set(given) <= set(of_mlflow)
                    and given["MLFLOW_BACKEND_STORE_URI"] == of_mlflow["MLFLOW_BACKEND_STORE_URI"]
                )
            else:
                assert (
                    given["MLFLOW_TRACKING_URI"] == "http://mlflow:5000" and given["SRSYS_HOME"] == "/var/lib/srsys"
                ), name
    assert "mlflow:5000" in maps[next(m for m in maps if m.startswith("mlflow"))]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(
        ","
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_that_runs_srsys_has_the_signing_key(rendered, overlay):
    maps = config_maps(rendered[overlay])
    for name, template in pods(rendered[overlay]):
        spec = template["spec"]
        for container in spec["containers"]:
            given = environment(container, maps)
            volumes = {v["name"]: v.get("secret", {}) for v in spec["volumes"]}
            mounted = {
                f"{mount['mountPath']}/{item['path']}"
                for mount in container["volumeMounts"]
                for item in volumes[mount["name"]].get("items", ())
            }
            key = given.get("SRSYS_SIGNING_KEY_FILE")
            assert (key in mounted and key == "/run/secrets/signing_key") == (name != "Deployment mlflow"), name
            tokens = [entry for entry in container.get("env", ()) if entry["name"] == "SRSYS_TOKENS"]
            assert all(not entry["valueFrom"]["secretKeyRef"].get("optional") for entry in tokens), (
                "never open by mistake"
            )
            assert bool(tokens) == (name in ("Deployment srsys", "RayService srsys")), name


def test_a_pod_that_serves_holds_the_server_and_a_worker_at_its_limit(rendered):
    "A file that makes its decoder take all the memory that it may take ends that worker, not the pod."
    for overlay in OVERLAYS:
        templates = [named(rendered[overlay], "Deployment", "srsys")["spec"]["template"]]
        if overlay == "ray":
            service = named(rendered[overlay], "RayService", "srsys")["spec"]["rayClusterConfig"]
            templates += [group["template"] for group in service["workerGroupSpecs"]]
        for template in templates:
            (container,) = template["spec"]["containers"]
            in_memory = [v["emptyDir"] for v in template["spec"]["volumes"] if v.get("emptyDir", {}).get("medium")]
            held = sum(in_bytes(volume["sizeLimit"]) for volume in in_memory)
            limit = in_bytes(container["resources"]["limits"]["memory"])
            assert limit >= worker_pool.WORKER_MEMORY + SERVER_MEMORY + held, overlay


def test_what_is_scaled_by_and_scraped_is_what_the_server_says(rendered):
    resources = rendered["cpu"]
    said = generate_latest(Metrics().registry).decode()
    query = named(resources, "ScaledObject", "srsys")["spec"]["triggers"][0]["metadata"]["query"]
    used = re.findall(r"srsys_\w+", query)
    assert used == ["srsys_queue_depth", "srsys_inflight_requests"] and all(
        f"# TYPE {name} gauge" in said for name in used
    )
    service = named(resources, "Service", "srsys")
    assert named(resources, "ServiceMonitor", "srsys")["spec"]["endpoints"][0]["port"] in {
        port["name"] for port in service["spec"]["ports"]
    }


def test_only_what_must_talk_can(rendered):
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
def test_gpus_are_asked_for_where_they_are(rendered, overlay, resource):
    vendor = resource.split(".")[0]
    for kind, name in [("Deployment", "srsys"), ("Job", "train")]:
        spec = named(rendered[overlay], kind, name)["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        assert [key for key in container["resources"]["limits"] if "/" in key] == [resource]
        assert container["image"] == ("srsys-worker:latest" if vendor == "nvidia" else "srsys-worker:latest-rocm")
        assert vendor in str(spec["nodeSelector"]) and [t["key"] for t in spec["tolerations"]] == [resource]


def test_the_schedule_runs_notebooks_of_the_timetable(rendered):
    wanted = {
        r["metadata"]["name"]: re.findall(
            r"srsys run (\w+)", r["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"][-1]
        )
        for r in rendered["cpu"]
        if r["kind"] == "CronJob"
    }
    assert wanted == {
        "retrain": ["etl", "train", "evaluate", "promote"],
        "evaluate": ["evaluate"],
        "monitor": ["monitor"],
    }
    timetable = ROOT / "scheduled/timetable.toml"
    if timetable.exists():
        rows = tomllib.loads(timetable.read_text())
        assert {name: rows[name]["notebooks"] for name in wanted} == wanted
        crons = {name: row["cron"] for name, row in rows.items() if "cron" in row}
        assert {
            r["metadata"]["name"]: r["spec"]["schedule"]
            for r in rendered["cpu"]
            if r["kind"] == "CronJob" and r["metadata"]["name"] in crons
        } == crons


def test_jobs_say_what_the_command_line_understands(rendered):
    spec = named(rendered["gpu"], "Job", "train")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    args = dict(zip(container["args"][1:-1], container["args"][2:], strict=True))
    assert container["args"][0] == "torchrun" and args["--nnodes"] == str(spec["completions"]) == str(
        spec["parallelism"]
    )
    assert args["--nproc-per-node"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert (
        args["--master-addr"] == f"train-0.{spec['template']['spec']['subdomain']}"
        and named(rendered["gpu"], "Service", "train")["spec"]["clusterIP"] == "None"
    )
    assert args["train"] in CONFIGS
    job = named(rendered["ray"], "RayJob", "archive")["spec"]
    verb, *words = shlex.split(job["entrypoint"])[1:]
    options = {opt for parameter in typer.main.get_command(main.main).commands[verb].params for opt in parameter.opts}
    assert (
        verb == "batch"
        and [word for word in words if word.startswith("s3://")] == words[:2]
        and {word for word in words if word.startswith("-")} <= options
    )
    assert job["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", (
        "the head lists and counts, which needs no core of Ray's"
    )
    assert re.search(
        rf"^ray(\[.*\])?=={re.escape(job['rayClusterSpec']['rayVersion'])} ",
        (ROOT / "requirements.lock").read_text(),
        re.M,
    ), "the images' Ray"


def test_the_service_on_ray_is_one_that_its_nodes_can_hold(rendered, home):
    service = named(rendered["ray"], "RayService", "srsys")["spec"]
    config, (workers,) = yaml.safe_load(service["serveConfigV2"]), service["rayClusterConfig"]["workerGroupSpecs"]
    (app,) = config["applications"]
    assert app["import_path"] == "srsys.cli.main:on_ray"
    deployment, pod = main.on_ray(app["args"])._bound_deployment, workers["template"]["spec"]
    limits, needs = pod["containers"][0]["resources"]["limits"], deployment.ray_actor_options
    assert (needs["num_cpus"], needs["num_gpus"]) == (int(limits["cpu"]), int(limits["nvidia.com/gpu"])) and app[
        "args"
    ]["most"] == workers["maxReplicas"]
    assert pod["terminationGracePeriodSeconds"] >= DRAIN + 10 and config["http_options"]["port"] in [
        port["containerPort"] for port in pod["containers"][0]["ports"]
    ]


def test_of_several_ranks_one_talks_to_mlflow(home, monkeypatch):
    "By the variable that torchrun, and so the Job, sets for each of its processes."
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
