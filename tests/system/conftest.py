"""`srsys serve` as a real process, for tests with a browser and for tests that kill it."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

SRSYS = Path(sys.executable).with_name("srsys")


class Served:
    "A running `srsys serve`: its addresses, by what they are called on the screen, and its end."

    def __init__(self, home, *options, within=240, **environment):
        self.home = home
        self.process = subprocess.Popen(
            [SRSYS, "serve", "--port", "0", "--metrics-port", "0", *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"SRSYS_HOME": str(home), "OMP_NUM_THREADS": "2"} | environment,
        )
        self.home, lines, self.said = home, queue.Queue(), []
        threading.Thread(
            target=lambda: [lines.put(line) for line in iter(self.process.stdout.readline, "")] and lines.put(""),
            daemon=True,
        ).start()
        end = time.monotonic() + within
        while "Ctrl-C" not in "".join(self.said):
            try:
                self.said.append(lines.get(timeout=max(end - time.monotonic(), 0)))
            except queue.Empty:
                self.process.kill()
                raise AssertionError(f"not ready within {within} s: {self.said}") from None
            assert self.said[-1], f"it ended: {self.said}"
        found = dict(re.findall(r"^(.+?): +(http://\S+)", "".join(self.said), re.M))
        self.page, self.metrics, self.mlflow = found["The page"], found["Metrics"], found.get("MLflow")

    def end(self, how=signal.SIGINT, within=60):
        "End it as Ctrl-C does, and wait; its exit status."
        self.process.send_signal(how)
        return self.process.wait(within)


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    "One server for the tests that do it no harm."
    running = Served(tmp_path_factory.mktemp("served"))
    yield running
    assert running.end() == 0


def _serve():
    "Start servers that end with the test, whatever it did to them."
    started = []

    def start(*args, **options):
        started.append(Served(*args, **options))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait(30)


serve = pytest.fixture(_serve)
serve_long = pytest.fixture(_serve, scope="module")  # for a whole file


@pytest.fixture
def processes_of():
    "The processes that work for a home, whoever started them."

    def find(home):
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SRSYS_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    return find
