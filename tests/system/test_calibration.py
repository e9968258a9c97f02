"""The measure itself: the published LR images and bicubic scores come out as they are printed, and the shipped models keep what is promised of them.

Reads the development images (DESIGN §5), which are no part of the repository; without them the tests are skipped.
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
BENCH = ROOT.parent / "shared" / "data" / "bench"
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason=f"needs the development images in {BENCH}")


@pytest.mark.parametrize("scale", [2, 4])
def test_imresize_is_matlabs(scale):
    "Every pixel of the LR images that MATLAB made."
    published = sorted((BENCH / f"Set5_LR_bicubic/X{scale}").iterdir())
    assert len(published) == 5
    for path in published:
        hr = open_picture(next((BENCH / "Set5").glob(path.name.split("x")[0] + ".*"))).pixels
        h, w = (n - n % scale for n in hr.shape[:2])
        assert np.array_equal(imresize(hr[:h, :w], 1 / scale), open_picture(path).pixels), path.name


@pytest.fixture(scope="module")
def measured():
    "Each measurement once, however many tests look at it."
    seen = {}

    def measure(name, folder, scale, degrade="bicubic"):
        key = name, folder, scale, degrade
        if key not in seen:
            seen[key] = evaluate(load(shipped_weights()[name]), BENCH / folder, scale, degrade, device="cpu")
        return seen[key]

    return measure


def test_bicubic_is_where_the_literature_has_it(measured):
    bicubic = measured("fast-x4", "Set5", 4).bicubic
    assert bicubic.psnr_y == pytest.approx(28.42, abs=0.01) and bicubic.ssim_y == pytest.approx(0.810, abs=0.001)


@pytest.mark.parametrize(
    "name, folder, scale, score, least",
    [
        ("fast-x4", "Set5", 4, "psnr_y", 31.3),
        ("fast-x4", "DIV2K_valid_crop256", 4, "psnr_rgb", 26.8),
        ("fast-x2", "Set5", 2, "psnr_y", 37.0),
        ("fast-x3", "Set5", 3, "psnr_y", 32.5),
    ],
)
def test_shipped_models_score_what_was_asked(measured, name, folder, scale, score, least):
    assert getattr(measured(name, folder, scale).mean, score) >= least


def test_the_photo_model_undoes_jpeg(measured):
    report = measured("photo-x4", "Set14", 4, "jpeg50")
    assert report.mean.psnr_rgb - report.bicubic.psnr_rgb >= 0.65


@pytest.mark.parametrize("name", sorted(shipped_weights()))
def test_a_row_of_the_table_comes_out_again(name):
    "What the pages show is what these weights do."
    document = read_scores(ROOT / "nbs/measured/scores.json")
    found = [report for folder in ("Set5", "Set14") for _, report, _ in select_rows(document, name=name, data=folder)]
    if not found:
        pytest.skip("the table has no row of these weights yet: make tables")
    again = evaluate(
        load(shipped_weights()[name]), BENCH / found[0].data, found[0].scale, found[0].degrade, device="cpu"
    )
    assert (again.data_sha256, again.weights_sha256) == (found[0].data_sha256, found[0].weights_sha256)
    assert again.mean.psnr_rgb == pytest.approx(
        found[0].mean.psnr_rgb, abs=0.01
    ) and again.mean.ssim_y == pytest.approx(found[0].mean.ssim_y, abs=0.001)
