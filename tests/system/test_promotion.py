"""Protects promotion and rollback against kill -9 before each write, and against two processes that promote at once."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from srsys.models import weights
from srsys.models.networks import CompactNet
from srsys.registry.gating import Decision, Gain, GateReason
from srsys.registry.promotion import promote, register_challenger, rollback
from srsys.registry.store import Store, connect_client, list_versions, register, resolve

# Imports once and forks for each job, so a real process is killed, with all that it has open.
DRIVER = """
import json, os, signal, sys
from pathlib import Path
import mlflow.artifacts
from mlflow import MlflowClient
from srsys.registry.gating import Decision
from srsys.registry.promotion import promote, rollback
from srsys.registry.store import Store, resolve

def die_before(write):
    left = [write]
    def counted(do):
        def call(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return do(*args, **options)
        return call
    writes = "log_artifact", "set_model_version_tag", "set_registered_model_alias", "delete_registered_model_alias"
    for name in writes:
        setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))

def case(home, verb, decision, write):
    die_before(write)
    store = Store(Path(home))
    if verb == "rollback":
        rollback(store, "fern-x2")
    else:
        promote(store, "fern-x2", Decision.from_dict(decision), [sys.argv[1]])

def start(job):
    if child := os.fork():
        return child
    code = 1
    try:
        case(*job)
        code = 0
    except Exception as error:
        print(error, file=sys.stderr, flush=True)
    finally:
        os._exit(code)

groups = json.loads(Path(sys.argv[1]).read_text())
resolve("fern-x2", Store(Path(sys.argv[2])))  # so that MLflow's late imports are done before the forks
ended = []
for group in groups:  # the jobs of a group run at once
    children = [start(job) for job in group]
    ended.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
print(json.dumps(ended))
"""


REGISTRY = ("mlflow.db", "signing.key")  # of a home; the artifacts stay where they are


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    "A registry with a champion and two challengers, one of them promoted in a second registry; and the decisions."
    folder = tmp_path_factory.mktemp("promotion")

    def tiny(seed):
        torch.manual_seed(seed)
        path = folder / f"{seed}" / "fern-x2.safetensors"
        path.parent.mkdir()
        weights.save(CompactNet(2, features=4, convs=1), weights.Card("fern-x2", "compact", 2), path)
        return path

    store = Store(folder / "home")
    register(store, tiny(1))
    two, three = (register_challenger(store, tiny(seed)) for seed in (2, 3))
    one = list_versions(store)[0]
    yes = {
        v.version: Decision(
            v.label, one.label, v.sha256, one.sha256, Gain(0.1, 0.05, 0.15, 60), (GateReason("gain", True, "+0.1 dB"),)
        )
        for v in (two, three)
    }
    promoted = Store(folder / "promoted")
    promoted.home.mkdir()
    for name in REGISTRY:
        shutil.copy(store.home / name, promoted.home)
    promote(promoted, "fern-x2", yes[3])
    return folder, yes


@pytest.fixture(scope="module")
def ends(template):
    "The exit statuses of the processes on each copy of the registry: 0 done, 1 refused, -9 killed; and their stderr."
    folder, yes = template
    groups = (
        {f"promote {write}": [[3, write]] for write in range(12)}
        | {f"rollback {write}": [[0, write]] for write in range(4)}
        | {"both": [[2, 99], [3, 99]]}
    )
    jobs = []
    for name, group in groups.items():
        (folder / name).mkdir()
        for file in REGISTRY:
            shutil.copy(folder / ("promoted" if "rollback" in name else "home") / file, folder / name)
        jobs.append(
            [
                [str(folder / name), name.split()[0], yes[number].to_dict() if number else None, write]
                for number, write in group
            ]
        )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, folder / "jobs.json", folder / "home"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(groups, json.loads(done.stdout), strict=True)), done.stderr


def aliases(store):
    return {alias: v.version for v in list_versions(store) for alias in v.aliases}


def test_a_promotion_killed_before_every_write(template, ends):
    (folder, yes), (ended, said) = template, ends
    # three files, four tags (report, gain, signature and last the status), three aliases
    assert [ended[f"promote {write}"] for write in range(12)] == [[-9]] * 10 + [[0]] * 2, said
    for write in range(11):
        store = Store(folder / f"promote {write}")
        assert resolve("fern-x2", store).version.version == (1 if write < 9 else 3), f"killed before write {write}"
        assert promote(store, "fern-x2", yes[3]).status == "passed"
        assert aliases(store) == {"champion": 3, "previous": 1} and resolve("fern-x2", store).version.version == 3


def test_a_rollback_killed_before_every_write(template, ends):
    (folder, _), (ended, said) = template, ends
    assert [ended[f"rollback {write}"] for write in range(4)] == [[-9], [-9], [-9], [0]], said
    for write in range(4):
        store = Store(folder / f"rollback {write}")
        assert resolve("fern-x2", store).version.version == (3 if write < 2 else 1), f"killed before write {write}"
        if write < 3:
            assert rollback(store, "fern-x2").version == 1
        assert aliases(store) == {"champion": 1} and resolve("fern-x2", store).version.version == 1


def test_two_processes_promote_at_once(template, ends):
    "Both passed the gate against the same champion: one becomes champion, the other must be judged again."
    (folder, _), (ended, said) = template, ends
    assert sorted(ended["both"]) == [0, 1] and "judge it again" in said, said
    found = aliases(Store(folder / "both"))
    assert found["champion"] == (2, 3)[ended["both"].index(0)] and found["previous"] == 1
    assert resolve("fern-x2", Store(folder / "both")).version.version == found["champion"]


def test_a_version_that_did_not_pass_the_gate_is_not_served(template):
    "Even if somebody moves the alias by hand in MLflow's pages: the status is checked again when weights are read."
    store = Store(template[0] / "home")
    connect_client(store).set_registered_model_alias("srsys-fern-x2", "champion", "2")
    try:
        with pytest.raises(RuntimeError, match="gate status is 'missing': not served"):
            resolve("fern-x2", store)
    finally:
        connect_client(store).set_registered_model_alias("srsys-fern-x2", "champion", "1")
