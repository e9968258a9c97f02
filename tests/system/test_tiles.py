"""Protects tiling with the shipped networks: tiled equals whole. The lessons of `restore` show it for stand-ins."""

import numpy as np
import pytest
from skimage import data

from srsys.image import Picture
from srsys.models.weights import load, shipped_weights
from srsys.restore.restorer import Restorer

#        height, width, channels, depth, scale (None: the model's), tile
CASES = [
    (1, 1, 3, 8, None, 7),
    (1, 1, 4, 16, 1.5, 1),
    (1, 90, 2, 8, 3, 13),
    (47, 2, 1, 16, None, 5),
    (61, 83, 4, 8, None, 33),
    (90, 71, 1, 8, 1.5, 41),
    (64, 64, 3, 16, 2, 37),
    (77, 120, 2, 16, 3, 51),
    (200, 300, 3, 8, None, 151),
    (83, 97, 3, 8, 1.5, 49),
]


def part(height, width, channels, depth):
    "A piece of a photograph, with its luma as grey and a soft disk as alpha."
    photo = data.astronaut()[30 : 30 + height, 100 : 100 + width]
    y, x = np.mgrid[:height, :width]
    disk = np.clip((height / 2 - np.hypot(y - height / 2, x - width / 2)) * 40 + 128, 0, 255)
    planes = np.dstack([photo if channels > 2 else photo.mean(2), *[disk] * (channels % 2 == 0)])
    return Picture(
        np.round(planes.astype(float) * (257 if depth == 16 else 1)).astype(np.uint16 if depth == 16 else np.uint8)
    )


def decibels(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


@pytest.mark.parametrize("height, width, channels, depth, scale, tile", CASES)
@pytest.mark.parametrize("name", sorted(shipped_weights()))
def test_tiled_equals_whole(name, height, width, channels, depth, scale, tile):
    "At most one level of 255 apart in float32, at least 48 dB in bfloat16."
    model, picture = load(shipped_weights()[name]), part(height, width, channels, depth)
    whole = Restorer(model, "cpu", "float32").restore(picture, scale).pixels
    tiled = Restorer(model, "cpu", "float32", tile).restore(picture, scale).pixels
    factor = scale or model.scale
    assert whole.shape == (max(round(height * factor), 1), max(round(width * factor), 1), channels)
    assert whole.dtype == picture.pixels.dtype
    assert np.abs(whole.astype(int) - tiled).max() <= 2**depth // 255
    if depth == 8:
        low_whole, low_tiled = (
            Restorer(model, "cpu", "bfloat16", t).restore(picture, scale).pixels for t in (None, tile)
        )
        assert decibels(low_whole, low_tiled) >= 48 and decibels(low_tiled, whole) >= 48
