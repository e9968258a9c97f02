"""Training as it is really run: by several processes at once, on a node without pyvips and MLflow, from the command line and through Ctrl-C."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

SRSYS, TORCHRUN = (Path(sys.executable).with_name(name) for name in ("srsys", "torchrun"))

RUN = """
import json, sys
from pathlib import Path
import numpy as np
from skimage import data
from srsys.recipes import Compact, TrainConfig
from srsys.tiles import InMemory
from srsys.train import Watch, fit, make_fabric, set_up, validation_pairs

config = TrainConfig("pair", 2, Compact(8, 1, width=16), steps=8, batch=4, accumulate=2, patch=16, lr=5e-3, validate_every=4, precision="32-true")
losses = []

class Said(Watch):
    def step(self, step, found): losses.append(found["l1"])

fabric = make_fabric(config, "cpu")
fit(run := set_up(config, fabric), InMemory([data.astronaut()]), validation_pairs([data.chelsea()], config), Path(sys.argv[1])/"pair.ckpt", Said())
weights = {k: v.double().sum().item() for k, v in run.ema.state_dict().items()}
Path(sys.argv[1], f"rank{fabric.global_rank}.json").write_text(json.dumps({"losses": losses, "weights": weights, "world": fabric.world_size}))
"""


def run_in(folder, *command):
    folder.mkdir()
    (folder / "run.py").write_text(RUN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))}
    subprocess.run([*map(str, command), folder / "run.py", folder], check=True, env=environment, timeout=280)
    return [json.loads(p.read_text()) for p in sorted(folder.glob("rank*.json"))]


def test_two_processes_compute_what_one_does(tmp_path):
    "torchrun with two CPU processes, a batch of four each, against one process at twice the batch."
    alone, = run_in(tmp_path / "one", sys.executable)
    first, second = run_in(tmp_path / "two", TORCHRUN, "--standalone", "--nproc-per-node", "2")
    assert (alone["world"], first["world"], second["world"]) == (1, 2, 2)
    assert first["weights"] == second["weights"], "both processes hold the same network"
    assert first["weights"] == pytest.approx(alone["weights"], rel=1e-4, abs=1e-5)
    together = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert together == pytest.approx(alone["losses"], rel=1e-4)
    assert first["losses"] != pytest.approx(second["losses"], rel=1e-4), "each sees patches of its own"
    assert len((tmp_path / "two/pair.jsonl").read_text().splitlines()) == 2, "and one of them writes"


BARE = """
import sys
sys.modules.update({name: None for name in ("pyvips", "mlflow", "gradio", "fastapi", "typer", "papermill", "spandrel")})
from dataclasses import replace
from srsys import degrade, losses, metrics, models
from srsys.chains import PhotoRecipe
from srsys.recipes import Compact, fast_x2, photo_x4
from srsys.train import train
small = replace(photo_x4(), start="", network=Compact(8, 1, width=16), steps=4, batch=2, patch=16, validate_every=4, shrink=(), holdout=(("Photos", 3),))
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
    "Where only PyTorch, Fabric, NumPy and Pillow are: no pyvips, MLflow, spandrel, server or command line."
    done = subprocess.run([sys.executable, "-c", BARE, photographs, tmp_path / "out"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    from srsys.models import load
    assert load(done.stdout.strip()).card.steps == 4
