"""The shape of the code: who may import whom, and how much one sitting holds."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {
    8: "cli",
    7.75: "replicas",
    7.5: "batch report",
    7: "app archive traffic",
    6: "serve timetable renewal folder makers release drain",
    5: "bench tables door train view card console trial jobs intake",
    4.5: "engine",
    4: "evaluate tracking recipes promotion keeper swap admission dashboards",
    3: "data tiles chains foreign restore registry signals drift votes trust",
    2: "models losses leaks gate monitor workers",
    1: "image fetch metrics degrade",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
# packages that few modules know
ALONE = {"pyvips": {"image"}, "spandrel": {"models", "foreign"}, "mlflow": {"registry", "tracking"}, "gradio": {"app"}, "ray": {"batch", "replicas"}, "fsspec": {"archive"}, "pyarrow": {"archive", "batch"}, "papermill": {"jobs"}, "apscheduler": {"timetable"},
         "typer": {"console", "makers", "release", "cli"}, "pydantic_settings": {"console"}}
MODULES = sorted(path for path in ROOT.glob("srsys/*.py") if not path.stem.startswith("_"))
NOTEBOOKS = sorted(ROOT.glob("nbs/*.ipynb"))


def stem(path):
    return path.stem


def imported(path):
    "Every module that a file imports, at its top or later, by its full name."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield from ([f"srsys.{node.module}"] if node.module else [f"srsys.{alias.name}" for alias in node.names])
        elif isinstance(node, ast.ImportFrom):
            yield from ([f"srsys.{alias.name}" for alias in node.names] if node.module == "srsys" else [node.module])


@pytest.mark.parametrize("path", MODULES, ids=stem)
def test_a_module_stands_on_lower_floors(path):
    assert path.stem in FLOOR, f"{path.name} has no floor: give it one in the table above"
    below = {name.split(".")[1] for name in imported(path) if name.startswith("srsys.")} - {"__version__"}
    level = {name for name in below if FLOOR[name] >= FLOOR[path.stem]}
    assert not level, f"{path.stem} (floor {FLOOR[path.stem]}) imports {level}"


@pytest.mark.parametrize("path", MODULES, ids=stem)
def test_a_module_knows_only_what_is_its_own(path):
    known = {name.split(".")[0] for name in imported(path)}
    strange = {name for name in known & set(ALONE) if path.stem not in ALONE[name]}
    assert not strange, f"{path.stem} imports {strange}, which are for {[ALONE[name] for name in strange]}"


def test_training_needs_neither_pyvips_nor_mlflow():
    "What runs on a bare GPU node imports where both are missing."
    bare = [name for name in "degrade metrics models losses leaks foreign data tiles chains recipes train".split() if (ROOT / f"srsys/{name}.py").exists()]
    code = "import sys; sys.modules.update(pyvips=None, mlflow=None)\n" + "".join(f"import srsys.{name}\n" for name in bare)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", MODULES, ids=stem)
def test_a_module_is_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_a_notebook_is_an_essay(path):
    cells = json.loads(path.read_text())["cells"]
    assert re.match(r"# .+\n\n?> .+", "".join(cells[0]["source"])), "begin with a title and a summary in one line"
    ids = [cell["id"] for cell in cells]
    assert len(set(ids)) == len(ids)
    assert not [i for i in ids if re.fullmatch(r"[0-9a-f]{6,}", i)], "cell ids are written into the package: give them names"
    for cell in cells:
        directive, *lines = "".join(cell["source"]).splitlines() or [""]
        if re.match(r"#\s*\|\s*export", directive):
            assert len(lines) <= 40, f"{cell['id']}: an exported cell holds one idea, in 40 lines at most"
