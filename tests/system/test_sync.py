"""Protects generated files and the package: they match the notebooks, and the wheel holds what it needs."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest
import skimage.data
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def git(*args):
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True).stdout


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    "The project's files as they are in the working tree."
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    folder = tmp_path_factory.mktemp("copy")
    for name in git("ls-files", "-co", "--exclude-standard", "-z").decode().split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def files(folder, *patterns):
    return {str(path.relative_to(folder)): path.read_bytes() for pattern in patterns for path in folder.glob(pattern)}


def test_package_tests_and_readme_match_the_notebooks(copy):
    kinds = "srsys/**/*.py", "tests/*/test_*.py", "tests/test_*.py", "README.md", "nbs/**/*.ipynb", "scheduled/*.ipynb"
    before = files(copy, *kinds)
    (copy / "srsys/stale.py").write_text("")
    (copy / "tests/test_stale.py").write_text("")
    for command in (
        ["python", "tests/generate.py"],
        ["nbdev_export"],
        ["ruff", "check", "-q", "--fix", "--select", "I", "srsys", "tests"],
        ["ruff", "format", "-q", "srsys", "tests"],
        ["python", "nbs/_pages/readme.py"],
        ["nbdev_clean"],
        ["nbdev_clean", "--fname", "scheduled"],
    ):
        subprocess.run([BIN / command[0], *command[1:]], cwd=copy, check=True)
    after = files(copy, *kinds)
    assert sorted(after) == sorted(before)
    assert [name for name in after if after[name] != before[name]] == [], (
        "run `make export`, or `make check` for notebooks"
    )


def test_the_code_and_the_lessons_are_free_of_lint(copy):
    "Above all of F821: a lesson that uses a name from another section."
    subprocess.run([BIN / "ruff", "check"], cwd=copy, check=True)


def test_cleaning_keeps_the_tag_of_the_parameters_cell(copy):
    cell = nbformat.v4.new_code_cell("n = 1", id="parameters", metadata={"tags": ["parameters"], "collapsed": True})
    page = copy / "scheduled/tagged.ipynb"
    page.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), page)
    subprocess.run([BIN / "nbdev_clean", "--fname", "scheduled"], cwd=copy, check=True)
    kept = nbformat.read(page, 4).cells[0].metadata
    page.unlink()
    assert kept == {"tags": ["parameters"]}


@pytest.mark.timeout(900)  # half a minute, but much longer on a busy machine
def test_the_docs_are_complete_and_ask_no_other_host(copy, browser):
    "Sphinx is strict here: a broken link fails."
    subprocess.run([BIN / "python", "nbs/_pages/docs.py"], cwd=copy, check=True)
    pages = sorted((copy / "_docs").glob("**/*.html"))
    made = {page.relative_to(copy / "_docs").with_suffix("") for page in pages}
    notebooks = {page.relative_to(copy / "nbs").with_suffix("") for page in (copy / "nbs").glob("**/[!.]*.ipynb")}
    assert notebooks and notebooks <= made
    tab, asked = browser.new_page(), []
    tab.on("request", lambda request: asked.append(request.url))
    for page in pages:
        tab.goto(page.as_uri())
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_the_lock_holds_hashes_and_names_no_host():
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock and "--index" not in lock and "--find-links" not in lock
    pinned = {re.match(r"[\w.-]+", entry)[0]: entry for entry in re.split(r"\n(?=\S)", lock)}
    assert [name for name, entry in pinned.items() if "--hash=sha256:" not in entry] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {re.match(r"[\w.-]+", name)[0] for name in asked} <= set(pinned)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "A wheel of the committed files, without whatever else lies in the working tree."
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source.tar").write_bytes(git("archive", "HEAD"))
    shutil.unpack_archive(folder / "source.tar", folder / "source", filter="data")
    subprocess.run(
        [
            BIN / "uv",
            "build",
            "-q",
            "--wheel",
            "--no-build-isolation",
            "--python",
            sys.executable,
            "--out-dir",
            folder,
            folder / "source",
        ],
        check=True,
    )
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_its_data(wheel):
    data = (".py", ".safetensors", ".toml", ".json", ".css", ".js")
    committed = {
        name for name in git("ls-tree", "-r", "--name-only", "HEAD", "srsys/").decode().split() if name.endswith(data)
    }
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("srsys/")} == committed


def test_the_wheel_installed_elsewhere_restores_a_picture(wheel, tmp_path):
    site, small = tmp_path / "site", tmp_path / "small.jpg"
    subprocess.run(
        [BIN / "uv", "pip", "install", "-q", "--no-deps", "--target", site, "--python", sys.executable, wheel],
        check=True,
    )
    Image.fromarray(skimage.data.astronaut()[:48, :64]).save(small)
    there = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(site)}, "check": True}
    found = subprocess.run(
        [sys.executable, "-c", "import srsys; print(srsys.__file__)"], capture_output=True, text=True, **there
    )
    assert Path(found.stdout.strip()).is_relative_to(site)
    subprocess.run(
        [sys.executable, site / "bin/srsys", "restore", small, "-o", "out", "--model", "fast", "--scale", "2"], **there
    )
    with Image.open(tmp_path / "out/small.png") as restored:
        assert restored.size == (128, 96)
