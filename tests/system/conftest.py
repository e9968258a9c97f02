"""Helpers of the system tests: `srsys serve` as a process, waiting for a condition, pictures, ports.

Test files import the functions by `from tests.system.conftest import …`; the fixtures need no import.
"""

import io
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from skimage import data

ROOT = Path(__file__).resolve().parents[2]
SRSYS = Path(sys.executable).with_name("srsys")
PATIENCE = 300  # seconds: how long a machine that is busy with other things may take for anything


def wait_until(condition, process=None, within=PATIENCE):
    "Wait until `condition()` is true, and return what it returned. Fails after `within` seconds, or if `process` ends."
    end = time.monotonic() + within
    while not (found := condition()):
        assert process is None or process.poll() is None, f"the process ended with status {process.returncode}"
        assert time.monotonic() < end, f"waited {within} s in vain"
        time.sleep(0.05)
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def encoded(pixels, kind="PNG", **options):
    "A picture, an array or Pillow's, as the bytes of a file."
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def kill_children_since(before):
    "Kill all processes below this one that are not in `before`, a list of `psutil.Process`."
    started = [process for process in psutil.Process().children(recursive=True) if process not in before]
    for process in started:
        with suppress(psutil.Error):  # it has ended
            process.kill()
    psutil.wait_procs(started, timeout=60)


def is_alive(process):
    "Whether a `psutil.Process` still runs; a zombie does not."
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


class Served:
    "A running `srsys serve`: the addresses that it prints, and a way to end it."

    def __init__(self, home, *options, within=PATIENCE, **environment):
        self.home = home
        self.process = subprocess.Popen(
            [SRSYS, "serve", "--port", "0", "--metrics-port", "0", *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"SRSYS_HOME": str(home), "OMP_NUM_THREADS": "2"} | environment,
        )
        try:
            output = self._read_until("Ctrl-C", within)
            found = dict(re.findall(r"^(.+?): +(http://\S+)", output, re.M))
            self.page, self.metrics, self.mlflow = found["The page"], found["Metrics"], found.get("MLflow")
        except BaseException:
            self.process.kill()
            raise

    def _read_until(self, word, within):
        "What the server prints until a line with this word; what it prints later is read and dropped."
        lines = queue.Queue()

        def read():
            for line in self.process.stdout:
                lines.put(line)
            lines.put("")  # the end of the output

        threading.Thread(target=read, daemon=True).start()
        output, end = "", time.monotonic() + within
        while word not in output:
            try:
                line = lines.get(timeout=max(end - time.monotonic(), 0))
            except queue.Empty:
                raise AssertionError(f"not ready within {within} s: {output}") from None
            assert line, f"the server ended: {output}"
            output += line
        return output

    def end(self, how=signal.SIGINT, within=PATIENCE):
        "Send a signal, by default as Ctrl-C does, and wait; the exit status."
        self.process.send_signal(how)
        return self.process.wait(within)

    def kill(self):
        "End it in any case."
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(60)


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    "One server for all tests that leave it as it was."
    running = Served(tmp_path_factory.mktemp("served"))
    try:
        yield running
        assert running.end() == 0
    finally:
        running.kill()


def _serve():
    "Starts servers that end with the test, whatever it did to them."
    started = []

    def start(*args, **options):
        started.append(Served(*args, **options))
        return started[-1]

    yield start
    for running in started:
        running.kill()


serve = pytest.fixture(_serve)
serve_long = pytest.fixture(_serve, scope="module")  # for a whole file


def noisy_weights(source, out, noise, seed):
    "Write weights with Gaussian noise added to them, relative to the spread of each tensor; returns `out`."
    import torch

    from srsys.models import weights

    model, rng = weights.load(source), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.net.parameters():
            weight += noise * weight.std().nan_to_num(0) * torch.randn(weight.shape, generator=rng)
    weights.save(model.net, replace(model.card, notes=f"noise {noise}"), out)
    return out


def fill_inbox(inbox):
    "Write pieces of photographs into a folder, and two files that are to be quarantined."
    from srsys.image import Picture, save_picture

    inbox.mkdir(parents=True)
    for name in ("astronaut", "coffee", "chelsea"):
        pixels = getattr(data, name)()
        for y in range(0, pixels.shape[0] - 95, 96):
            for x in range(0, pixels.shape[1] - 95, 96):
                save_picture(Picture(pixels[y : y + 96, x : x + 96]), inbox / f"{name}-{y}-{x}.png")
    (inbox / "letter.png").write_text("Dear Sir or Madam,")
    save_picture(Picture(np.full((128, 128, 3), 99, np.uint8)), inbox / "grey.png")


@pytest.fixture
def processes_of():
    "Finds the processes that work for a home, whoever started them."

    def find(home):
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get("SRSYS_HOME") == str(home) and is_alive(process):
                    found.append(process)
        return found

    return find
