"""What every test shares: plots that need no screen, a home of their own, and a plain word about what is missing."""

import os
import shutil
import sys

import pytest

os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # lessons are small: on a busy machine threads only wait for one another
os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["MLFLOW_ENABLE_TELEMETRY"] = "false"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the lessons tagged `#| slow` too")


def pytest_runtest_setup(item):
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("slow: `make test SLOW=1` runs it")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    "A state folder for each test, so that none writes beside the project."
    monkeypatch.setenv("SRSYS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def figures():
    "A lesson shows its plots, and nobody closes what nobody saw."
    yield
    if plots := sys.modules.get("matplotlib.pyplot"):
        plots.close("all")


@pytest.fixture(scope="session")
def system_package():
    "A program of the system's by name: its path, or a skip, which `.ci/run` turns into a failure."

    def find(program):
        if path := shutil.which(program):
            return path
        missing = pytest.fail if os.environ.get("REQUIRE_SYSTEM_PACKAGES") else pytest.skip
        return missing(f"needs the system package {program}")

    return find


@pytest.fixture
def browser(system_package):
    "A headless Chromium, as Playwright's `Browser`."
    from playwright.sync_api import sync_playwright

    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=system_package("chromium"), args=flags)
        yield chromium
        chromium.close()
