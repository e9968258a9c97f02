"""Protects reading and writing of image files: PngSuite, damaged and truncated files, bombs, and other files."""

import os
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from skimage import data

from srsys.image import FormatError, Header, ImageError, RowWriter, SizeError, open_picture, open_rows
from tests.system.conftest import encoded


@pytest.fixture(scope="module")
def suite(shared):
    "PngSuite: 14 broken files, whose names begin with x, and 161 good ones."
    return shared("data/malformed/pngsuite")


def test_pngsuite_broken_files_are_refused(suite):
    broken = sorted(suite.glob("x*.png"))
    assert len(broken) == 14
    for path in broken:
        with pytest.raises(ImageError, match=path.name) as caught:
            open_picture(path)
        assert "\n" not in str(caught.value)


def test_pngsuite_good_files_have_the_right_pixels(suite):
    good = sorted(set(suite.glob("*.png")) - set(suite.glob("x*.png")))
    assert len(good) == 161
    for path in good:
        picture = open_picture(path)
        assert picture.format == "png" and picture.depth == (16 if path.stem.endswith("16") else 8), path.name
        with Image.open(path) as image:
            deep_grey = image.mode == "I;16"
            expected = np.asarray(image)[..., None] if deep_grey else np.asarray(image.convert("RGBA"))
        found, bands = picture.pixels, {1: [0], 2: [0, 3], 3: [0, 1, 2], 4: [0, 1, 2, 3]}[picture.bands]
        if picture.depth == 16 or path.stem == "tbbn0g04":  # Pillow does not read their transparency
            bands = bands[: picture.header.colours]
        if picture.depth == 16 and not deep_grey:  # Pillow keeps the upper 8 bits
            found = found >> 8
        assert np.array_equal(found[..., : len(bands)], expected[..., bands]), path.name


def png(width, height, pixels=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def huge_files():
    yield "png", png(40_000, 40_000)
    small = encoded(data.astronaut()[:8, :8], "JPEG")
    i = small.index(b"\xff\xc0")
    yield "jpeg", small[: i + 5] + struct.pack(">HH", 40_000, 40_000) + small[i + 9 :]
    small = bytearray(encoded(data.astronaut()[:8, :8], "BMP"))
    small[18:26] = struct.pack("<ii", 40_000, 40_000)
    yield "bmp", bytes(small)
    small = encoded(data.astronaut()[:8, :8], "TIFF")
    for tag in (256, 257):
        i = small.index(struct.pack("<HHI", tag, 4, 1))
        small = small[: i + 8] + struct.pack("<I", 40_000) + small[i + 12 :]
    yield "tiff", small


def test_a_header_that_claims_1600_megapixels_is_refused():
    for kind, file in huge_files():
        with pytest.raises(SizeError, match="1600 megapixels"):
            open_picture(file, f"bomb.{kind}")


@pytest.mark.parametrize(
    "content",
    [
        b"Dear Sir or Madam,\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        b"%PDF-1.7\n",
        b"<svg/>",
        b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"1 2 3\n4 5 6\n",
        b"P6\n1 1\n255\nabc",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
        b"\x08\xf2\xa6\xb6" + bytes(64),
        b"\xb6\xa6\xf2\x08" + bytes(64),
        bytes(100),
        b"BM",
        b"8BPS\0\1" + bytes(64),
        b"\0\0\1\0\1\0" + bytes(64),
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_files_that_are_no_images_are_refused_whatever_their_suffix(tmp_path, content, suffix):
    path = tmp_path / f"picture.{suffix}"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=str(path)):
        open_picture(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a file"):
        open_picture(tmp_path / "pipe.png")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "BMP", "GIF"])
def test_a_damaged_file_gives_a_whole_picture_or_an_image_error(format):
    "No other exception, no error of several lines, no picture of another shape."
    whole, chance = encoded(data.astronaut()[:96, :128], format), random.Random(format)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 6)):
            damaged[chance.randrange(len(damaged) if chance.random() < 0.5 else 80)] = chance.randrange(256)
        damaged = bytes(damaged[: chance.randrange(1, len(damaged))]) if chance.random() < 0.3 else bytes(damaged)
        try:
            picture = open_picture(damaged, "damaged", max_pixels=1_000_000)
        except ImageError as error:
            assert str(error).startswith("damaged: ") and "\n" not in str(error)
        else:
            assert picture.pixels.shape == (picture.height, picture.width, picture.bands)
            continue
        refused += 1
    assert refused


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "BMP", "GIF"])
def test_a_truncated_file_is_read_whole_or_not_at_all(format):
    whole = encoded(data.astronaut()[:96, :128], format)
    pixels, refused = open_picture(whole).pixels, 0
    for length in range(1, len(whole), max(1, len(whole) // 97)):
        try:
            found = open_picture(whole[:length]).pixels
        except ImageError:
            refused += 1
            continue
        assert np.array_equal(found, pixels), f"{format} cut to {length} of {len(whole)} bytes"
    assert refused > 50


MEASURE = """
import resource, sys
import numpy as np
from srsys.image import open_rows, RowWriter
with open_rows(sys.argv[1]) as reader, RowWriter(sys.argv[2], reader.header) as writer:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while len(rows := reader.read(64)):
        writer.write(rows)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_is_bounded(tmp_path):
    "48 megapixels go from file to file in far less memory than they would fill (144 MB)."
    header, stripe = Header(8000, 6000, 3), np.tile(data.astronaut(), (1, 16, 1))[:, :8000]
    with RowWriter(tmp_path / "large.png", header) as writer:
        for _ in range(12):
            writer.write(stripe[:500])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "large.png", tmp_path / "copy.png"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100
    with open_rows(tmp_path / "copy.png") as reader:
        assert reader.header.height == 6000 and np.array_equal(reader.read(500), stripe[:500])
