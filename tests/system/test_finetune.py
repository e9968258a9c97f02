"""Protects fine-tuning of other people's checkpoints: loaded, trained, saved, registered, and served through the API.

The weights are random, in the official shapes and the authors' file layout; the compact network's are a real file.
"""

from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch
from skimage import data

from srsys.data.patches import InMemoryPatches
from srsys.degrade.resize import bicubic_downscale
from srsys.image import Picture, encode_picture, open_picture
from srsys.models import weights
from srsys.registry.store import Store, register, resolve
from srsys.restore.restorer import Restorer
from srsys.train import configs
from srsys.train.loop import TrainingProgress, fit, make_fabric, set_up_run, validation_pairs

KINDS = {  # the configuration, and the key under which the authors keep the weights
    "swinir-m-x4": (configs.swinir_m(), "params"),
    "swinir-light-x4": (configs.swinir_light(), "params"),
    "esrgan-psnr-x4": (configs.esrgan_psnr(), "params_ema"),
    "compact": (replace(configs.photo_x4(), network=configs.Compact(64, 32, width=0)), "params"),
}


@pytest.fixture(scope="module")
def album():
    return InMemoryPatches([data.astronaut(), data.coffee(), data.chelsea()])


class Losses(TrainingProgress):
    def __init__(self):
        self.curve = []

    def step(self, step, losses):
        self.curve.append(losses["l1"])


def checkpoint_of(kind, folder, shared):
    "A file as its authors publish it."
    if kind == "compact":
        return shared("weights/realesr-general-x4v3.from_ncnn_fp16.pth")
    torch.manual_seed(0)
    config, wrapper = KINDS[kind]
    path = folder / f"{kind}.pth"
    torch.save({wrapper: config.network.build(4).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("finetuned")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_fine_tuned_and_registered(kind, album, home, tmp_path, shared):
    path, picture = checkpoint_of(kind, tmp_path, shared), Picture(data.astronaut()[:24, :32])
    with pytest.raises(weights.WeightsError, match="--trust"):
        weights.load(path)
    start = weights.load(path, trust=True)
    assert start.scale == 4 and Restorer(start, "cpu", "float32").restore(picture).pixels.shape == (96, 128, 3)

    config = replace(
        KINDS[kind][0],
        name=f"{kind}-tuned",
        steps=20,
        batch=2,
        patch=16,
        lr=1e-4,
        halve_at=(),
        recipe=None,
        start=str(path),
        precision="32-true",
        validate_every=20,
    )
    run, seen = set_up_run(config, make_fabric(config, "cpu"), start), Losses()
    fit(run, album, validation_pairs([data.chelsea()[:96, :96]], config), tmp_path / "run.ckpt", seen)
    assert len(seen.curve) == 20
    assert np.mean(seen.curve[-5:]) < np.mean(seen.curve[:5]), seen.curve

    best = config.network.build(4)
    best.load_state_dict(run.state.best_weights)
    weights.save(best, configs.make_card(config, 20, album.digest, {}), tuned := tmp_path / f"{kind}-tuned.safetensors")
    again = weights.load(tuned)
    assert again.architecture == start.architecture and again.parameters == start.parameters
    lr = torch.from_numpy(bicubic_downscale(data.astronaut()[:64, :64], 4)).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        assert torch.allclose(again.net(lr), best.eval()(lr), atol=1e-5)
    version = register(Store(home), tuned)
    assert resolve(f"{kind}-tuned", Store(home)).label == version.label == f"srsys-{kind}-tuned/1"


@pytest.mark.timeout(600)
def test_the_api_serves_fine_tuned_models(serve, home):
    page = serve(home).page
    offered = {m["name"]: m for m in httpx.get(page + "/v1/models", timeout=60).json()["models"]}
    tuned = [name for name in offered if name.endswith("-tuned")]
    assert len(tuned) >= 3, offered
    for name in tuned:
        answer = httpx.post(
            page + "/v1/restore",
            files={"file": ("a.png", encode_picture(Picture(data.astronaut()[:24, :32])))},
            data={"model": name},
            timeout=120,
        )
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Model-Version"] == f"srsys-{name}/1"
        assert open_picture(answer.content).pixels.shape == (96, 128, 3)
