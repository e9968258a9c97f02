"""Protects the use of other people's networks at their published sizes, from the authors' files to the API."""

import hashlib
import json
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from skimage import data
from typer.testing import CliRunner

from srsys.cli.main import main
from srsys.files import sha256
from srsys.image import Picture, open_picture
from srsys.models import external, weights
from srsys.models.architectures import RRDBNet, SwinIR, initialise_from
from srsys.registry.store import Store, register_shipped, resolve
from srsys.restore.restorer import Restorer
from srsys.train import configs
from tests.system.conftest import PATIENCE, encoded

pytestmark = pytest.mark.timeout(600)  # the files have up to 67 MB, and the machine may be busy
SMALL = np.ascontiguousarray(data.astronaut()[60:80, 200:224])
NAMES = {
    "model.0.": "conv_first.",
    "model.1.sub.23.": "conv_body.",
    "model.3.": "conv_up1.",
    "model.6.": "conv_up2.",
    "model.8.": "conv_hr.",
    "model.10.": "conv_last.",
}  # ESRGAN's, and what Real-ESRGAN calls them


def as_real_esrgan(state):
    "The weights of an RRDBNet under the names that Real-ESRGAN's files use."
    state = {
        re.sub(r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0", r"body.\1.rdb\2.conv\3", name): value
        for name, value in state.items()
    }
    for ours, theirs in NAMES.items():
        state = {theirs + name[len(ours) :] if name.startswith(ours) else name: value for name, value in state.items()}
    return state


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    "Files as the authors publish them, by the name of the model."
    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    made = {
        "swinir-m-x4": {"params": SwinIR().build(4).state_dict()},
        "swinir-light-x2": {"params": configs.swinir_light(2).network.build(2).state_dict()},
        "rrdbnet-x4": {"params_ema": as_real_esrgan(RRDBNet().build(4).state_dict())},
    }
    for name, content in made.items():
        torch.save(content, folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in made}


@pytest.fixture(scope="module")
def real_checkpoint(shared):
    "A file as its authors published it."
    return shared("weights/realesr-general-x4v3.from_ncnn_fp16.pth")


@pytest.fixture(scope="module")
def converted(checkpoints, tmp_path_factory):
    "The same as safetensors with a card."
    folder = tmp_path_factory.mktemp("ours")
    return {name: external.convert_checkpoint(path, folder, name, trust=True) for name, path in checkpoints.items()}


@pytest.mark.parametrize(
    "name, parameters, block",
    [
        ("swinir-m-x4", 11_900_199, 16),
        ("swinir-light-x2", 910_152, 16),
        ("rrdbnet-x4", 16_697_987, 2),
        ("realesr-x4", 1_213_296, 1),
    ],
)
def test_a_checkpoint_is_refused_until_trusted_and_converts_without_change(
    checkpoints, request, tmp_path, name, parameters, block
):
    path = checkpoints[name] if name in checkpoints else request.getfixturevalue("real_checkpoint")
    with pytest.raises(weights.WeightsError, match=f"--trust {sha256(path)}"):
        weights.load(path)
    model, again = (
        weights.load(path, trust=sha256(path)),
        weights.load(external.convert_checkpoint(path, tmp_path, name, trust=True)),
    )
    assert (model.parameters, model.multiple_of, f"x{model.scale}") == (parameters, block, name.rpartition("-")[2])
    results = [Restorer(each, "cpu", "float32").restore(Picture(SMALL)).pixels for each in (model, again)]
    assert results[0].shape == (20 * model.scale, 24 * model.scale, 3) and np.array_equal(*results)
    assert again.card.terms == "unknown" and sha256(path) in again.card.notes


def test_the_authors_names_are_kept(converted):
    keys = {name: set(weights.read_weights(path)[0]) for name, path in converted.items()}
    assert len(keys["rrdbnet-x4"]) == 702
    assert {"body.22.rdb3.conv5.bias", "conv_up2.weight"} <= keys["rrdbnet-x4"]
    bias_table = "layers.5.residual_group.blocks.5.attn.relative_position_bias_table"
    assert {bias_table, "conv_before_upsample.0.weight"} <= keys["swinir-m-x4"]
    assert "upsample.0.weight" in keys["swinir-light-x2"]
    assert "conv_last.weight" not in keys["swinir-light-x2"]


def test_a_checkpoint_of_another_size_is_refused_in_a_few_lines(checkpoints):
    content = weights.read_weights(checkpoints["swinir-light-x2"], trust=True)[0]
    with pytest.raises(weights.WeightsError) as told:
        initialise_from(SwinIR().build(2), content, "theirs.pth")
    lines = str(told.value).splitlines()
    assert 3 < len(lines) <= 13 and "theirs.pth does not fit" in lines[0]
    assert any(
        re.search(r"another shape: conv_first\.weight, \(60, 3, 3, 3\) where \(180, 3, 3, 3\) is wanted", line)
        for line in lines
    )
    assert any("missing: conv_last" in line for line in lines)


def test_registered_checkpoints_are_served_and_can_be_trained(converted, tmp_path, serve):
    store = Store(tmp_path / "home")
    register_shipped(store, converted)
    for name in converted:
        net = resolve(f"models:/srsys-{name}/1", store).model.net.requires_grad_(True).train()
        net(torch.rand(1, 3, 16, 16)).mean().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters()), name

    running = serve(tmp_path / "home")
    listed = {model["name"]: model for model in httpx.get(running.page + "/v1/models").json()["models"]}
    assert set(converted) < set(listed)
    assert listed["swinir-m-x4"]["seconds_per_megapixel"] > listed["fast-x4"]["seconds_per_megapixel"]
    for name in converted:
        answer = httpx.post(
            running.page + "/v1/restore",
            files={"file": ("a.png", encoded(SMALL))},
            data={"model": name},
            timeout=PATIENCE,
        )
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-model-version"] == f"srsys-{name}/1"
        assert open_picture(answer.content).width == 24 * listed[name]["scale"]
    assert running.end() == 0


def run(home, *args, **environment):
    done = CliRunner().invoke(
        main, [str(arg) for arg in args], env={"SRSYS_HOME": str(home), "MLFLOW_TRACKING_URI": None, **environment}
    )
    return done.exit_code, done.stdout, done.stderr


def test_import_at_the_command_line(checkpoints, tmp_path):
    file = checkpoints["swinir-light-x2"]
    status, _, said = run(tmp_path, "models", "import", file)
    assert status == 1 and f"--trust {sha256(file)}" in said and len(said.splitlines()) == 1
    status, output, _ = run(
        tmp_path,
        "models",
        "import",
        file,
        "--trust",
        sha256(file),
        "--name",
        "mine-x2",
        "--terms",
        "CC0",
        "-o",
        tmp_path / "out",
    )
    assert status == 0 and Path(output.strip()) == tmp_path / "out/mine-x2.safetensors"
    card = weights.load(tmp_path / "out/mine-x2.safetensors").card
    assert (card.name, card.architecture, card.scale, card.terms) == ("mine-x2", "swinir", 2, "CC0")
    status, output, _ = run(tmp_path, "models", "show", tmp_path / "out/mine-x2.safetensors", "--json")
    assert json.loads(output)["parameters"] == 910_152


def test_fetch_at_the_command_line(checkpoints, tmp_path):
    file = checkpoints["swinir-light-x2"]
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(file.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    entry = (
        '[[checkpoint]]\nname = "{0}.pth"\nregister = "{0}"\nurl = "http://127.0.0.1:{1}/{2}"\nsources = {3}\n'
        'scale = 2\nlicence = "MIT"\n{4}\n'
    )
    digest, wrong = f'sha256 = "{sha256(file)}"', f'sha256 = "{hashlib.sha256(b"").hexdigest()}"'
    (tmp_path / "catalog.toml").write_text(
        "".join(
            entry.format(name, server.server_port, file.name, sources, line)
            for name, sources, line in (
                ("sure-x2", 2, digest),
                ("hearsay-x2", 1, digest),
                ("rumour-x2", 0, ""),
                ("forged-x2", 2, wrong),
            )
        )
    )
    fetch = partial(run, tmp_path / "home", "models", "fetch", SRSYS_CATALOG=str(tmp_path / "catalog.toml"))
    try:
        status, output, said = fetch("sure-x2", "--register")
        assert status == 0 and output.split() == [
            str(tmp_path / "home/weights/sure-x2.pth"),
            sha256(file),
            "srsys-sure-x2/1",
        ], said
        assert fetch("sure-x2", "--register", "--json")[0] == 0
        found = resolve("sure-x2", Store(tmp_path / "home"))
        assert (found.label, found.model.card.terms, found.version.status) == ("srsys-sure-x2/1", "MIT", "bootstrap")
        for name, why in (
            ("hearsay-x2", "only one source states its digest"),
            ("rumour-x2", "nobody states its digest"),
        ):
            status, _, said = fetch(name)
            assert status == 1 and why in said and "--accept" in said
            assert not (tmp_path / f"home/weights/{name}.pth").exists()
        assert fetch("hearsay-x2", "--accept")[0] == 0 and fetch("rumour-x2", "--trust", sha256(file))[0] == 0
        status, _, said = fetch("forged-x2")
        assert status == 1 and "SHA-256" in said and not list((tmp_path / "home/weights").glob("forged*"))
    finally:
        server.shutdown()
        server.server_close()
