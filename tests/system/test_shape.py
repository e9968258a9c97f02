"""Protects the structure of the code: which package may import which, and how every notebook begins."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(ROOT.glob("nbs/**/[!.]*.ipynb"))
assert NOTEBOOKS


def page(path):
    return str(path.relative_to(ROOT / "nbs").with_suffix(""))


def test_packages_import_only_lower_layers():
    "The contracts in pyproject.toml: layers, and the libraries that only one module may know."
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_training_needs_neither_pyvips_nor_mlflow():
    "Modules that run on a bare GPU node can be imported where both are missing."
    code = """import sys; sys.modules.update(pyvips=None, mlflow=None)
import srsys.data.datasets, srsys.data.patches, srsys.degrade.recipes, srsys.metrics.scores, srsys.models.external
import srsys.train.loop
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=page)
def test_a_notebook_has_a_title_a_summary_and_named_cells(path):
    cells = json.loads(path.read_text())["cells"]
    assert re.match(r"# .+\n\n?> .+", "".join(cells[0]["source"])), "it needs a title and a summary of one line"
    ids = [cell["id"] for cell in cells]
    assert len(set(ids)) == len(ids)
    assert not [i for i in ids if re.fullmatch(r"[0-9a-f]{6,}", i)], (
        "cell ids are written into the package: give them names"
    )
