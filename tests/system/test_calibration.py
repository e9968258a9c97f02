"""Protects the measure and the shipped models: published LR images and bicubic scores are reproduced, and scores hold.

Reads the development images in ../shared (DESIGN §5), which are not part of the repository.
"""

from pathlib import Path

import numpy as np
import pytest

from srsys.degrade.resize import imresize
from srsys.evaluate.measure import evaluate
from srsys.evaluate.tables import read_scores, select_rows
from srsys.image import open_picture
from srsys.models.weights import load, shipped_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench(shared):
    "The benchmark images."
    return shared("data/bench")


@pytest.mark.parametrize("scale", [2, 4])
def test_imresize_is_matlabs(bench, scale):
    "Every pixel of the LR images that MATLAB made."
    published = sorted((bench / f"Set5_LR_bicubic/X{scale}").iterdir())
    assert len(published) == 5
    for path in published:
        hr = open_picture(next((bench / "Set5").glob(path.name.split("x")[0] + ".*"))).pixels
        h, w = (n - n % scale for n in hr.shape[:2])
        assert np.array_equal(imresize(hr[:h, :w], 1 / scale), open_picture(path).pixels), path.name


@pytest.fixture(scope="module")
def measured(bench):
    "Each measurement once, however many tests look at it."
    seen = {}

    def measure(name, folder, scale, degrade="bicubic"):
        key = name, folder, scale, degrade
        if key not in seen:
            seen[key] = evaluate(load(shipped_weights()[name]), bench / folder, scale, degrade, device="cpu")
        return seen[key]

    return measure


def test_bicubic_scores_as_published(measured):
    bicubic = measured("fast-x4", "Set5", 4).bicubic
    assert bicubic.psnr_y == pytest.approx(28.42, abs=0.01)
    assert bicubic.ssim_y == pytest.approx(0.810, abs=0.001)


@pytest.mark.parametrize(
    "name, folder, scale, score, least",
    [
        ("fast-x4", "Set5", 4, "psnr_y", 31.3),
        ("fast-x4", "DIV2K_valid_crop256", 4, "psnr_rgb", 26.8),
        ("fast-x2", "Set5", 2, "psnr_y", 37.0),
        ("fast-x3", "Set5", 3, "psnr_y", 32.5),
    ],
)
def test_shipped_models_reach_their_required_scores(measured, name, folder, scale, score, least):
    assert getattr(measured(name, folder, scale).mean, score) >= least


def test_the_photo_model_undoes_jpeg(measured):
    report = measured("photo-x4", "Set14", 4, "jpeg50")
    assert report.mean.psnr_rgb - report.bicubic.psnr_rgb >= 0.65


@pytest.mark.parametrize("name", sorted(shipped_weights()))
def test_a_row_of_the_table_is_measured_again(bench, name):
    "The scores that the pages show are those of the shipped weights."
    document = read_scores(ROOT / "nbs/measured/scores.json")
    found = [report for folder in ("Set5", "Set14") for _, report, _ in select_rows(document, name=name, data=folder)]
    assert found, "the table has no row of these weights: make tables"
    row = found[0]
    again = evaluate(load(shipped_weights()[name]), bench / row.data, row.scale, row.degrade, device="cpu")
    assert (again.data_sha256, again.weights_sha256) == (row.data_sha256, row.weights_sha256)
    assert again.mean.psnr_rgb == pytest.approx(row.mean.psnr_rgb, abs=0.01)
    assert again.mean.ssim_y == pytest.approx(row.mean.ssim_y, abs=0.001)
