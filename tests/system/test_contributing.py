"""The worked changes in CONTRIBUTING.md: each diff applies, touches at most two notebooks, and does what it says."""

import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CHECKS = {  # section → a program that fails unless the change works
    "A degradation": "from srsys.degrade.kinds import degradation_help, parse_degradation\n"
    "assert parse_degradation('noise15').name == 'noise15' and 'noise15' in degradation_help()",
    "An architecture": "from srsys.train.configs import span_x4\n"
    "assert sum(p.numel() for p in span_x4().network.build(4).parameters()) > 100_000",
    "The overlap of tiles": "from srsys.models.weights import load, shipped_weights\n"
    "from srsys.restore.restorer import tile_overlap\n"
    "model = load(shipped_weights()['fast-x4'])\nassert tile_overlap(model) >= model.overlap + 8",
    "A field of POST /v1/restore": "from srsys.serve.admission import RestoreRequest\n"
    "from srsys.serve.admission import RestoreFields\n"
    "assert RestoreFields(max_scale=2).max_scale == 2 and RestoreRequest('a.png').max_scale is None",
    "A rule of the gate": "from srsys.registry.gating import RULES, GateRules\n"
    "assert RULES[-1].__name__ == '_hostile_count_rule' and GateRules().min_hostile == 5",
    "A metric": "from srsys.monitor.telemetry import Metrics\n"
    "metrics = Metrics()\nmetrics.cancelled.inc()\n"
    "assert metrics.registry.get_sample_value('srsys_cancelled_jobs_total') == 1",
}


def sections():
    "The worked changes: heading → diffs."
    parts = re.split(r"^### (.+)$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M)[1:]
    bodies = dict(zip(parts[::2], parts[1::2], strict=True))
    return {heading: re.findall(r"```diff\n(.*?)```", body, re.S) for heading, body in bodies.items()}


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    "A copy of the notebooks, and of what their export needs."
    folder = tmp_path_factory.mktemp("project")
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z", "nbs", "srsys", "settings.ini", "README.md"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def test_every_worked_change_has_a_check():
    assert sections().keys() == CHECKS.keys()


@pytest.mark.parametrize("heading", CHECKS)
def test_a_worked_change_applies_and_works(notebooks, heading):
    diffs = sections()[heading]
    paths = [re.search(r"^\+\+\+ b/(nbs/\S+)\.py$", diff, re.M)[1] for diff in diffs]
    assert 1 <= len(set(paths)) == len(paths) <= 2, "a change touches at most two notebooks"
    before = {path: (notebooks / f"{path}.ipynb").read_bytes() for path in paths}
    kept = {file: file.read_bytes() for file in notebooks.glob("srsys/**/*.py")}
    try:
        for path, diff in zip(paths, diffs, strict=True):
            notebook, text = notebooks / f"{path}.ipynb", notebooks / f"{path}.py"
            text.write_text(jupytext.writes(nbformat.read(notebook, 4), "py:percent"))
            subprocess.run(["git", "apply", "-"], cwd=notebooks, input=diff, text=True, check=True)
            nbformat.write(jupytext.reads(text.read_text(), "py:percent"), notebook)
            text.unlink()
        subprocess.run([BIN / "nbdev_export"], cwd=notebooks, check=True)
        subprocess.run([sys.executable, "-c", CHECKS[heading]], cwd=notebooks, check=True)
    finally:
        for path, content in before.items():
            (notebooks / f"{path}.ipynb").write_bytes(content)
        for file, content in kept.items():
            file.write_bytes(content)
