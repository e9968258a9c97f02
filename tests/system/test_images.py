"""docker/: checks of the images and of the compose stack that need no build. `docker/build.sh` builds the images."""

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
ALL_PROFILES = "cpu,gpu,schedule,airflow"


def seconds(text):
    return int(re.fullmatch(r"(\d+)s", text)[1])


def create_secrets(script, *options):
    "Run newsecrets.py; what it printed."
    return subprocess.run([sys.executable, script, *options], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def stack(tmp_path, system_package):
    "The services of compose.yaml as docker-compose reads them, with some profiles and variables."

    def read(profiles="cpu,schedule", **variables):
        folder = tmp_path / "docker"
        shutil.copytree(DOCKER, folder, dirs_exist_ok=True)
        shutil.copy(DOCKER / ".env.example", folder / ".env")
        create_secrets(folder / "newsecrets.py")
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
    "The last user of each target is a number other than 0, and of the build stages only what they installed is copied."
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


def test_what_is_copied_is_let_through(tmp_path):
    "The allow-list of Dockerfile.dockerignore admits every source of a COPY."
    allowed = [
        line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    for line in re.findall(r"^COPY (?!--from)(.+)$", (DOCKER / "Dockerfile").read_text(), re.M):
        for source in [part for part in line.split()[:-1] if not part.startswith("--")]:
            assert any(Path(source).match(pattern) or source.split("/")[0] == pattern for pattern in allowed), source


@pytest.mark.parametrize("torch", ["lock", "cpu"])
def test_every_version_is_the_locks(tmp_path, torch):
    "install.sh with a script in place of uv: only PyTorch of another index is installed without the lock's hashes."
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
    assert sorted(line.split("==")[0] for line in bare) == ["torch", "torchvision"] and set(bare) < {
        line.split(" ")[0] for line in lock.splitlines()
    }


def test_what_mlflows_image_needs_is_in_the_lock():
    lock = (ROOT / "requirements.lock").read_text()
    for name in re.findall(r"^[a-z].*$", (DOCKER / "mlflow.txt").read_text(), re.M):
        assert re.search(rf"^{name}==", lock, re.M), name


def test_pip_and_uv_are_installed_from_the_lock_before_anything_else():
    lock = (ROOT / "requirements.lock").read_text()
    for path in (ROOT / "Makefile", DOCKER / "Dockerfile"):
        (names,) = re.findall(r"awk '/\^\[a-z\]/ \{keep = /\^\(([a-z|]+)\)==/\} keep'", path.read_text())
        assert {"pip", "uv"} <= set(names.split("|")), path
        for name in names.split("|"):
            assert re.search(rf"^{name}==\S+ \\\n    --hash=sha256:", lock, re.M), name


def test_every_knob_is_explained_and_turns_something():
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
def test_the_stack_is_one_that_compose_can_read(stack, profiles):
    services = stack(profiles)["services"]
    for name, service in services.items():
        assert ":" in service["image"] and not service.get("privileged"), name
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", ())), (
            f"{name} is open to other machines"
        )
    for name in {"app", "app-gpu"} & set(services):
        assert services[name]["user"] == "10001:10001"
        assert seconds(services[name]["stop_grace_period"]) > DRAIN
    if "app-gpu" in services:
        assert services["app-gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_every_service_is_confined(stack):
    "No capabilities, no way to gain privileges, nothing written except in volumes and tmpfs."
    services = stack(ALL_PROFILES)["services"]
    assert set(services) == set(yaml.safe_load(COMPOSE)["services"])
    for name, service in services.items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "/tmp" in {mount.split(":")[0] for mount in service["tmpfs"]}, name
    # PostgreSQL's image starts as root and changes its user
    added = {name: set(service["cap_add"]) for name, service in services.items() if service.get("cap_add")}
    assert added == {"postgres": {"CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID"}}
    assert services["postgres"]["tmpfs"][1].startswith("/var/run/postgresql:")


def test_what_has_no_login_is_published_on_this_machine_alone(stack):
    services = stack(ALL_PROFILES, SRSYS_BIND="0.0.0.0")["services"]
    addresses = {
        name: {str(port).split(":")[0] for port in service["ports"]}
        for name, service in services.items()
        if service.get("ports")
    }
    assert addresses == dict.fromkeys(("mlflow", "prometheus", "alertmanager"), {"127.0.0.1"}) | dict.fromkeys(
        ("app", "app-gpu", "lab", "grafana", "airflow"), {"0.0.0.0"}
    )


def test_the_signing_key_reaches_the_services_that_run_srsys_and_no_others(stack):
    services = stack(ALL_PROFILES)["services"]
    holders = {"app", "app-gpu", "scheduler", "lab", "airflow"}
    for name, service in services.items():
        mounted = {secret["source"] for secret in service.get("secrets", ())}
        assert (name in holders) == ("signing_key" in mounted) == ("srsys_tokens" in mounted), name
        assert (name in holders) == ("SRSYS_SIGNING_KEY_FILE" in service.get("environment", {})), name
        if name in holders:
            assert service["environment"]["SRSYS_SIGNING_KEY_FILE"] == "/run/secrets/signing_key"
            assert service["environment"]["SRSYS_TOKENS_FILE"] == "/run/secrets/srsys_tokens"


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


def test_secrets_are_made_once_and_no_word_of_them_is_in_the_stack(stack, tmp_path):
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
    for name in ("grafana_password", "s3_credentials"):
        (folder / name).unlink()
    stack()
    again = {path.name: path.read_text() for path in folder.iterdir()}
    assert {name for name in made if made[name] != again[name]} == {"grafana_password"}, (
        "and the key of the store is that of the file that was left"
    )
    (folder / "s3_identities").unlink()
    stack()
    assert (folder / "s3_identities").read_text() == made["s3_identities"]


def test_a_token_is_required_unless_the_stack_is_made_open(tmp_path, monkeypatch):
    said = create_secrets(DOCKER / "newsecrets.py", tmp_path / "closed")
    token = (tmp_path / "closed/srsys_tokens").read_text()
    assert len(token) >= 32 and str(tmp_path / "closed/srsys_tokens") in said and token not in said
    assert re.fullmatch(r"[0-9a-f]{64}", (tmp_path / "closed/signing_key").read_text())
    assert create_secrets(DOCKER / "newsecrets.py", "--open", tmp_path / "closed").startswith("Created in")
    assert (tmp_path / "closed/srsys_tokens").read_text() == token, "what exists is kept"
    monkeypatch.setenv("SRSYS_TOKENS", token)
    assert Settings().tokens.get_secret_value().split() == [token], "the server accepts it"

    assert "WARNING" in create_secrets(DOCKER / "newsecrets.py", "--open", tmp_path / "open")
    assert (tmp_path / "open/srsys_tokens").read_text() == ""
    assert "WARNING" in create_secrets(DOCKER / "newsecrets.py", tmp_path / "open"), "it stays open, and says so"


def test_images_are_pinned_by_their_digests(tmp_path):
    "pin.sh with a docker that answers with made-up digests, and with one that knows only one image."
    for name in ("compose.yaml", "Dockerfile", "pin.sh"):
        shutil.copy(DOCKER / name, tmp_path)
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin/docker"
    docker.write_text(
        '#!/bin/sh\nfor image; do :; done\nprintf "sha256:%064x\\n" "$(printf %s "$image" | cksum | cut -d" " -f1)"\n'
    )
    docker.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    before = {name: (tmp_path / name).read_text() for name in ("compose.yaml", "Dockerfile")}
    said = subprocess.run([tmp_path / "pin.sh"], env=environment, check=True, capture_output=True, text=True).stdout
    after = {name: (tmp_path / name).read_text() for name in before}
    digest = r"@sha256:[0-9a-f]{64}"
    pinned = re.findall(rf"^ *image: (docker\.io/\S+?){digest}$", after["compose.yaml"], re.M)
    assert (
        len(pinned) == 5
        and f"ARG BASE={[line for line in said.splitlines() if 'python' in line][0]}\n" in after["Dockerfile"]
    )
    assert {name: re.sub(digest, "", text) for name, text in after.items()} == before, "and nothing else is changed"
    subprocess.run([tmp_path / "pin.sh"], env=environment, check=True, capture_output=True)
    assert {name: (tmp_path / name).read_text() for name in before} == after, "nor pinned twice"

    docker.write_text('#!/bin/sh\ncase "$*" in *grafana*) echo sha256:0 ;; *) echo "not found" >&2; exit 1 ;; esac\n')
    failed = subprocess.run([tmp_path / "pin.sh"], env=environment, capture_output=True, text=True)
    assert failed.returncode and "not found" in failed.stderr
    assert {name: (tmp_path / name).read_text() for name in before} == after


@pytest.mark.parametrize("script", sorted(DOCKER.glob("*.sh")) + [ROOT / ".ci/run"], ids=lambda path: path.name)
def test_every_script_is_one_that_the_shell_can_read(script):
    subprocess.run(["sh", "-n", script], check=True)
    assert os.access(script, os.X_OK) and script.read_text().startswith("#!/bin/sh\n")


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
