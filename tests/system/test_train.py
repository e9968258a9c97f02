"""Protects training as processes: several at once, on a node without pyvips and MLflow, and through Ctrl-C."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from functools import partial

import pytest
from PIL import Image
from skimage import data

from tests.system.conftest import PATIENCE, SRSYS

TORCHRUN = SRSYS.with_name("torchrun")

RUN = """
import json, sys
from functools import partial
from pathlib import Path
import numpy as np
from skimage import data
from srsys.train.configs import Compact, TrainConfig
from srsys.data.patches import InMemoryPatches
from srsys.train.loop import TrainingProgress, fit, make_fabric, set_up_run, validation_pairs

config = TrainConfig(
    "pair", 2, Compact(8, 1, width=16), steps=8, batch=4, accumulate=2, patch=16, lr=5e-3, validate_every=4,
    precision="32-true",
)
losses = []

class Losses(TrainingProgress):
    def step(self, step, found):
        losses.append(found["l1"])

fabric, folder = make_fabric(config, "cpu"), Path(sys.argv[1])
run = set_up_run(config, fabric)
pairs = validation_pairs([data.chelsea()], config)
fit(run, InMemoryPatches([data.astronaut()]), pairs, folder / "pair.ckpt", Losses())
weights = {k: v.double().sum().item() for k, v in run.ema.state_dict().items()}
result = {"losses": losses, "weights": weights, "world": fabric.world_size}
(folder / f"rank{fabric.global_rank}.json").write_text(json.dumps(result))
"""


def run_in(folder, *command):
    folder.mkdir()
    (folder / "run.py").write_text(RUN)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
    }
    subprocess.run([*map(str, command), folder / "run.py", folder], check=True, env=environment, timeout=280)
    return [json.loads(p.read_text()) for p in sorted(folder.glob("rank*.json"))]


def test_two_processes_compute_what_one_does(tmp_path):
    "torchrun with two CPU processes, a batch of four each, against one process at twice the batch."
    (alone,) = run_in(tmp_path / "one", sys.executable)
    first, second = run_in(tmp_path / "two", TORCHRUN, "--standalone", "--nproc-per-node", "2")
    assert (alone["world"], first["world"], second["world"]) == (1, 2, 2)
    assert first["weights"] == second["weights"], "the processes hold different networks"
    assert first["weights"] == pytest.approx(alone["weights"], rel=1e-4, abs=1e-5)
    together = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert together == pytest.approx(alone["losses"], rel=1e-4)
    assert first["losses"] != pytest.approx(second["losses"], rel=1e-4), "both processes drew the same patches"
    assert len((tmp_path / "two/pair.jsonl").read_text().splitlines()) == 2, "only one process writes"


BARE = """
import sys
sys.modules.update({name: None for name in ("pyvips", "mlflow", "gradio", "fastapi", "typer", "papermill", "spandrel")})
from dataclasses import replace
from srsys.degrade import operations
from srsys.metrics import scores
from srsys.models import weights
from srsys.train import losses
from srsys.degrade.recipes import PhotoRecipe
from srsys.train.configs import Compact, fast_x2, photo_x4
from srsys.train.loop import train
small = replace(
    photo_x4(), start="", network=Compact(8, 1, width=16), steps=4, batch=2, patch=16, validate_every=4, shrink=(),
    holdout=(("Photos", 3),),
)
print(train(small, sys.argv[1], sys.argv[2], accelerator="cpu"))
"""


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "Photos").mkdir(parents=True)
    for name in ("astronaut", "chelsea", "coffee"):
        Image.fromarray(getattr(data, name)()).save(folder / f"Photos/{name}.png")
    return folder


def test_a_bare_gpu_node_trains(photographs, tmp_path):
    "With PyTorch, Fabric, NumPy and Pillow only: no pyvips, MLflow, spandrel, server or command line."
    done = subprocess.run(
        [sys.executable, "-c", BARE, photographs, tmp_path / "out"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    from srsys.models.weights import load

    assert load(done.stdout.strip()).card.steps == 4


def test_an_interrupted_training_is_resumed(photographs, tmp_path):
    "On a terminal, with a progress bar and the time left: Ctrl-C after some of 300 steps, then the same command again."
    small = [
        SRSYS,
        "train",
        "fast-x4",
        "--data",
        photographs,
        "-o",
        tmp_path / "out",
        "--accelerator",
        "cpu",
        "--steps",
        "300",
    ]
    code = (
        "import sys; from dataclasses import replace; from srsys.train import configs\n"
        "small = dict(network=configs.Compact(8, 1, width=16), batch=2, patch=16, shrink=(),\n"
        "             holdout=(('Photos', 3),))\n"
        "configs.CONFIGS['fast-x4'] = lambda: replace(configs.fast_x4(), **small)\n"
        "from srsys.cli.main import main; main(sys.argv[1:], prog_name='srsys')"
    )
    command = [sys.executable, "-c", code, *map(str, small[1:])]
    terminal, inside = pty.openpty()
    heed_sigint = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command,
        stdout=inside,
        stderr=inside,
        env=os.environ | {"COLUMNS": "120", "TERM": "xterm", "OMP_NUM_THREADS": "1"},
        preexec_fn=heed_sigint,
    )
    os.close(inside)
    shown = ""
    while "loss" not in shown:
        shown += os.read(terminal, 4096).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    try:
        while more := os.read(terminal, 4096):
            shown += more.decode(errors="replace")
    except OSError:
        pass  # the other end is closed
    assert process.wait(PATIENCE) == 1
    assert "interrupted; nothing half-done is left" in shown and "Traceback" not in shown
    assert "fast-x4" in shown
    assert re.search(r"-:--:--|\d:\d\d:\d\d", shown), "the time left"
    import torch

    done = torch.load(tmp_path / "out/fast-x4.ckpt", weights_only=True)["state"]["step"]
    assert 1 <= done < 300
    again = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert again.returncode == 0 and again.stdout.strip() == str(tmp_path / "out/fast-x4.safetensors"), again.stderr
