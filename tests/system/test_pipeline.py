"""Protects CI: GitLab accepts the pipeline, its scripts are commands of the Makefile, and the scripts in .ci work."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from srsys.models.weights import shipped_weights
from srsys.registry.store import Store, register

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = yaml.safe_load((ROOT / ".gitlab-ci.yml").read_text())
JOBS = {name: job for name, job in PIPELINE.items() if isinstance(job, dict) and "script" in job}


def run_script(name):
    return runpy.run_path(str(ROOT / name))


def test_gitlab_accepts_it():
    subprocess.run(
        [
            Path(sys.executable).with_name("check-jsonschema"),
            "--builtin-schema",
            "vendor.gitlab-ci",
            ROOT / ".gitlab-ci.yml",
        ],
        check=True,
    )


def test_stages_are_in_order_and_promotion_and_deployment_are_manual():
    in_order = ("lint", "test", "gate", "images", "pages", "promote", "deploy")
    assert [PIPELINE["stages"].index(JOBS[name]["stage"]) for name in in_order] == list(range(7))
    for name in ("promote", "deploy"):
        assert JOBS[name]["rules"][0]["when"] == "manual" and not JOBS[name]["interruptible"], name
    assert not any(job.get("allow_failure") for job in JOBS.values()), "a failed job blocks the pipeline"


def test_every_job_runs_commands_of_the_makefile():
    verbs = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for name, job in JOBS.items():
        lines = job["script"] if isinstance(job["script"], list) else [job["script"]]
        used = {verb for line in lines for verb in re.findall(r"make ([a-z]+)", line)}
        files = {path for line in lines for path in re.findall(r"(?:^| )(\.ci/\w+|docker/\w+\.sh)", line)}
        assert used <= verbs and (used or files), name
        assert all(os.access(ROOT / path, os.X_OK) for path in files), name
    reports = JOBS["test"]["artifacts"]["reports"]
    options = JOBS["test"]["variables"]["PYTEST_ADDOPTS"]
    assert f"--junitxml={reports['junit']}" in options and f"xml:{reports['coverage_report']['path']}" in options


def test_the_report_lists_failures_and_missing_files(tmp_path):
    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.a" name="good" time="1.5"/>'
        '<testcase classname="tests.a" name="bad" time="2"><failure message="no"/></testcase>'
        '<testcase classname="tests.a" name="left" time="0"><skipped/></testcase></testsuite></testsuites>'
    )
    (tmp_path / "coverage.xml").write_text('<coverage line-rate="0.991" branch-rate="0.97"/>')
    said = subprocess.run(
        [sys.executable, ROOT / ".ci/report.py", "junit.xml", "coverage.xml", "gate.md"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == (
        "**1 passed, 1 failed, 1 skipped** in 4 s.\n- `tests.a::bad`\n\nLines covered: 99.1%, branches: 97.0%.\n\n"
        "`gate.md` is missing: the job that writes it failed earlier or did not run.\n"
    )


def test_the_gate_passes_without_a_challenger_and_fails_for_one_that_was_not_measured(home, tmp_path):
    judge = run_script(".ci/gate.py")["judge"]
    register(Store(home), shipped_weights()["fast-x4"])
    assert judge("fast-x4", tmp_path / "gate.md") == 0
    assert (tmp_path / "gate.md").read_text() == "srsys-fast-x4 has no challenger: nothing to judge.\n"
    register(Store(home), shipped_weights()["fast-x4"], alias="challenger")
    with pytest.raises(FileNotFoundError, match="fast-x4.evidence.json"):
        judge("fast-x4", tmp_path / "gate.md")


def test_a_deployment_is_checked_with_a_picture(served):
    smoke = run_script("docker/smoke.py")["smoke"]
    assert re.fullmatch(r"srsys-\w+-x\d/\d+, srsys [\d.]+", smoke(served.page))
    with pytest.raises(OSError):
        smoke(served.metrics.removesuffix("/metrics") + "/nothing-here", patience=0)


def test_a_deployment_that_requires_a_token_is_tried_with_it(serve, tmp_path):
    running = serve(tmp_path, SRSYS_TOKENS=(secret := "the-token-of-this-deployment"))
    for token, status in (("", 1), (secret, 0)):
        done = subprocess.run(
            [sys.executable, ROOT / "docker/smoke.py", running.page],
            env=os.environ | {"TOKEN": token},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status and ("401" in done.stderr) == bool(status), done.stderr


KUBECTL = """#!/bin/sh
echo "kubectl $*" >>"$SAID"
case $1 in kustomize) printf 'image: srsys-app:latest\\nimage: srsys-worker:latest-rocm\\nimage: other:latest\\n';; esac
case "$*" in *"apply -f -") cat >>"$SAID";; esac
"""


def test_a_deployment_that_restores_nothing_is_undone(tmp_path):
    "The script of the deploy job, with a kubectl that only records its arguments and a check that fails."
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SAID": str(tmp_path / "said"),
        "ADDRESS": "http://127.0.0.1:1",
        "PYTHON": "false",
        "IMAGE": "registry.example/srsys",
        "TAG": "abc",
        "MAKEFLAGS": "-e -s",
        "KUBE_CONTEXT": "",
        "OVERLAY": "cpu",
    }
    done = subprocess.run(
        ["sh", "-c", JOBS["deploy"]["script"]], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert (tmp_path / "said").read_text().splitlines() == [
        "kubectl kustomize docker/k8s/overlays/cpu",
        "kubectl -n srsys apply -f -",
        "image: registry.example/srsys-app:abc",
        "image: registry.example/srsys-worker:abc-rocm",
        "image: other:latest",
        "kubectl -n srsys rollout status deployment/srsys --timeout=15m",
        "kubectl -n srsys rollout undo deployment/srsys",
        "kubectl -n srsys rollout status deployment/srsys --timeout=15m",
    ]
