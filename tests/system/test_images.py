"""Protects docker/: what can be checked of images and stack without building them. `docker/build.sh` builds them."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from srsys.cli.common import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
COMPOSE = (DOCKER / "compose.yaml").read_text()
DRAIN = 25  # seconds, at most, from SIGTERM to the server's end


def published_on(port):
    "The address of a published port, in either form that docker-compose prints."
    return port.get("host_ip") if isinstance(port, dict) else str(port).split(":")[0]


def seconds(text):
    return int(re.fullmatch(r"(\d+)s", text)[1])


@pytest.fixture
def stack(tmp_path, system_package):
    "compose.yaml as docker-compose reads it, under some profiles."

    def read(profiles="cpu,schedule", **variables):
        folder = tmp_path / "docker"
        shutil.copytree(DOCKER, folder, dirs_exist_ok=True)
        shutil.copy(DOCKER / ".env.example", folder / ".env")
        subprocess.run([sys.executable, folder / "newsecrets.py"], check=True)
        said = subprocess.run(
            [system_package("docker-compose"), "-f", folder / "compose.yaml", "config"],
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | {"COMPOSE_PROFILES": profiles} | variables,
        )
        assert said.returncode == 0, said.stderr
        return yaml.safe_load(said.stdout)

    return read


def test_the_dockerfile_is_linted():
    subprocess.run([Path(sys.executable).with_name("hadolint"), DOCKER / "Dockerfile"], check=True)


def test_no_image_keeps_root_or_what_installed_it():
    "Each target's last user is not root, and only the results of the installing stages are copied."
    stages = re.split(r"^FROM ", (DOCKER / "Dockerfile").read_text(), flags=re.M)[1:]
    by_name = {re.match(r"\S+ AS (\S+)", text)[1]: text for text in stages}
    assert {"app", "worker", "lab", "mlflow", "airflow"} <= set(by_name)
    for name in ("app", "worker", "lab", "mlflow", "airflow"):
        chain, at = "", name
        while at in by_name:
            chain, at = by_name[at] + chain, by_name[at].split()[0]
        assert re.findall(r"^USER (\S+)", chain, re.M)[-1] == "10001:10001", name
        assert "apt-get" not in chain and "pip" not in chain, name
        assert {Path(path).parts[1] for path in re.findall(r"COPY --from=\S+ (\S+)", chain)} <= {
            "opt",
            "apart",
            "package",
        }, name


def test_the_dockerignore_admits_every_copied_file(tmp_path):
    "The allow-list of Dockerfile.dockerignore admits every source of a COPY."
    allowed = [
        line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    copies = re.findall(r"^COPY (?!--from)(.+)$", (DOCKER / "Dockerfile").read_text(), re.M)
    assert copies
    for line in copies:
        for source in [part for part in line.split()[:-1] if not part.startswith("--")]:
            assert any(Path(source).match(pattern) or source.split("/")[0] == pattern for pattern in allowed), source


@pytest.mark.parametrize("torch", ["lock", "cpu"])
def test_images_install_the_locked_versions(tmp_path, torch):
    "install.sh with a script in place of the installer: only PyTorch from another index is installed without hashes."
    for path in (ROOT / "requirements.lock", DOCKER / "install.sh"):
        shutil.copy(path, tmp_path)
    (tmp_path / "uv").write_text('#!/bin/sh\necho "$UV_TORCH_BACKEND" "$@"\n')
    (tmp_path / "uv").chmod(0o755)
    said = subprocess.run(
        ["./install.sh", "-r", "mlflow.txt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"UV": "./uv", "TORCH": torch},
    ).stdout
    assert "--verify-hashes --constraints constraints.lock" in said and "-r mlflow.txt" in said
    lock, used = ((tmp_path / name).read_text() for name in ("requirements.lock", "constraints.lock"))
    if torch == "lock":
        assert used == lock
        return
    assert said.startswith("cpu pip install")
    names = {name: set(re.findall(r"^([a-z0-9.-]+)==", text, re.M)) for name, text in [("lock", lock), ("used", used)]}
    gone = names["lock"] - names["used"]
    assert gone and all(re.match(r"triton|nvidia-|cuda-", name) for name in gone)
    bare = [line for line in used.splitlines() if re.match(r"[a-z]", line) and not line.endswith("\\")]
    assert sorted(line.split("==")[0] for line in bare) == ["torch", "torchvision"]
    assert set(bare) < {line.split(" ")[0] for line in lock.splitlines()}


def test_the_packages_of_the_mlflow_image_are_locked():
    lock = (ROOT / "requirements.lock").read_text()
    names = re.findall(r"^[a-z].*$", (DOCKER / "mlflow.txt").read_text(), re.M)
    assert names
    for name in names:
        assert re.search(rf"^{name}==", lock, re.M), name


def test_every_variable_is_explained_and_used():
    explained = set(re.findall(r"^#?([A-Z][A-Z_]+)=", (DOCKER / ".env.example").read_text(), re.M))
    read = set(re.findall(r"\$\{([A-Z_]+)", COMPOSE)) | {"COMPOSE_PROFILES", "OMP_NUM_THREADS"}
    settings = {f"SRSYS_{name}".upper() for name in Settings.model_fields} - {
        "SRSYS_HOME",
        "SRSYS_TRACKING_URI",
        "SRSYS_TOKENS",
    }
    assert read <= explained, "compose.yaml reads what .env.example does not explain"
    assert explained <= read | settings, "and nothing is explained that does not exist"
    shown = dict(re.findall(r"^#([A-Z][A-Z_]+)=(.*)$", (DOCKER / ".env.example").read_text(), re.M))
    for name, default in re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", COMPOSE):
        assert default == shown[name], name


@pytest.mark.parametrize("profiles", ["cpu,schedule", "gpu,schedule", "cpu,airflow"])
def test_compose_accepts_the_stack(stack, profiles):
    services = stack(profiles)["services"]
    for name, service in services.items():
        assert ":" in service["image"] and not service.get("privileged"), name
        for port in service.get("ports", ()):
            assert published_on(port) == "127.0.0.1", f"{name} is open to other machines"
    for name in {"app", "app-gpu"} & set(services):
        assert services[name]["read_only"] and services[name]["cap_drop"] == ["ALL"]
        assert services[name]["user"] == "10001:10001"
        assert seconds(services[name]["stop_grace_period"]) > DRAIN
    if "app-gpu" in services:
        assert services["app-gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_addresses_of_the_stack_are_those_of_its_services(stack):
    services = stack()["services"]
    exposed = set(re.findall(r"^EXPOSE (.+)$", (DOCKER / "Dockerfile").read_text(), re.M))
    assert {"7860 9464", "5000", "8888", "8080"} == exposed
    assert services["app"]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert "mlflow:5000" in services["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql+psycopg2://"), (
        "the driver that the lock has"
    )
    for service in services.values():
        for name in service.get("depends_on", ()):
            assert name in services


def test_secrets_are_made_once_and_do_not_appear_in_the_stack(stack, tmp_path):
    folder = tmp_path / "docker/secrets"
    text = yaml.safe_dump(stack())
    made = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(made) == set(yaml.safe_load(COMPOSE)["secrets"]) and folder.stat().st_mode & 0o77 == 0
    assert not [name for name, word in made.items() if word and word.strip() in text]
    (credentials,) = json.loads(made["s3_identities"])["identities"][0]["credentials"]
    ini = configparser.ConfigParser()
    ini.read_string(made["s3_credentials"])
    assert dict(ini["default"]) == {
        "aws_access_key_id": credentials["accessKey"],
        "aws_secret_access_key": credentials["secretKey"],
    }
    (folder / "grafana_password").unlink()
    stack()
    again = {path.name: path.read_text() for path in folder.iterdir()}
    assert {name for name in made if made[name] != again[name]} == {"grafana_password"}


def test_secrets_reach_programs_that_read_the_environment(tmp_path):
    (tmp_path / "word").write_text("so$ 'secret\"\n")
    said = subprocess.run(
        [
            DOCKER / "entry.sh",
            sys.executable,
            "-c",
            "import os; print(os.environ['PGPASSWORD'], 'JUPYTER_TOKEN' in os.environ)",
        ],
        env=os.environ | {"PGPASSWORD_FILE": str(tmp_path / "word")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "so$ 'secret\" False\n"
