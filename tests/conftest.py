"""Shared by all tests: plots without a screen, a state folder per test, allowed skips, and the development files."""

import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # lessons are small: on a busy machine threads only wait for one another
os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["MLFLOW_ENABLE_TELEMETRY"] = "false"
# what makes processes that tests start slow to import is replaced
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).with_name("stubs")), os.environ.get("PYTHONPATH")])
)

SHARED = Path(__file__).resolve().parents[2] / "shared"  # development images and weights, not part of the repository
SLOW, GPU, NO_SHARED = "slow: `make test SLOW=1` runs it", "needs a GPU", f"needs the development files in {SHARED}"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests tagged `#| slow` too")


def pytest_runtest_setup(item):
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip(SLOW)
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip(GPU)


def fail_unexpected_skip(report):
    "In CI a skip is a failure, unless the test is slow, needs a GPU, or needs development files where there are none."
    if not (os.environ.get("CI") or os.environ.get("REQUIRE_SYSTEM_PACKAGES")):
        return report
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if reason.removeprefix("Skipped: ") not in (SLOW, GPU, NO_SHARED):
            report.outcome, report.longrepr = "failed", f"skipped, which is not allowed in CI: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return fail_unexpected_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return fail_unexpected_skip((yield))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    "A state folder for each test, so that none writes beside the project."
    monkeypatch.setenv("SRSYS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def figures():
    "Closes the plots that a lesson leaves open."
    yield
    if plots := sys.modules.get("matplotlib.pyplot"):
        plots.close("all")


@pytest.fixture(scope="session")
def shared():
    "Finds a development file by its path below ../shared. Without that folder a test skips; without the file it fails."

    def find(path):
        if not SHARED.is_dir():
            pytest.skip(NO_SHARED)
        if not (SHARED / path).exists():
            pytest.fail(f"{path} is missing in {SHARED}")
        return SHARED / path

    return find


@pytest.fixture(scope="session")
def system_package():
    "Finds a program by name; without it the test skips, which is a failure in CI."

    def find(program):
        return shutil.which(program) or pytest.skip(f"needs the system package {program}")

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
