"""Protects the server against hostile requests: broken and forged files, bombs, endless forms, names that are headers.

After each test the server still answers and has not grown.
"""

import http.client
import io
import random
import socket
import struct
import time
import zlib
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image, ImageCms
from skimage import data

from srsys.image import open_picture
from tests.system.conftest import PATIENCE, encoded

pytestmark = pytest.mark.timeout(900)
ROUTES = ("/v1/restore", "/page/pictures")
EXPECTED = {200, 408, 413, 415, 422, 429}
SMALL = data.astronaut()[30:54, 200:232].copy()


GOOD = {kind: encoded(SMALL, kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")}


class Target:
    "A server, what it answered so far, and how much it has grown since."

    def __init__(self, served):
        self.client, self.process = (
            httpx.Client(base_url=served.page, timeout=PATIENCE),
            psutil.Process(served.process.pid),
        )
        self.address, self.codes, self.slowest = (urlsplit(served.page).hostname, urlsplit(served.page).port), {}, 0.0
        for route in ROUTES:  # what is loaded on first use does not count as growth
            for good in GOOD.values():
                assert self.post(route, good).status_code == 200
        self.size = self.memory()

    def memory(self):
        return sum(one.memory_info().rss for one in [self.process, *self.process.children(recursive=True)]) / 1e6

    def post(self, route, content, name="cat.png", **more):
        fields = {"model": "fast-x2", "scale": "2"} if route == "/v1/restore" else {}
        return self.check(lambda: self.client.post(route, files={"file": (name, content)}, data=fields, **more))

    def check(self, do):
        "Make a request and check its answer, which is an expected one in the expected form."
        start, answer = time.monotonic(), do()
        self.slowest = max(self.slowest, time.monotonic() - start)
        self.codes[answer.status_code] = self.codes.get(answer.status_code, 0) + 1
        assert answer.status_code in EXPECTED, (answer.status_code, answer.text)
        if answer.status_code != 200:
            assert set(answer.json()) == {"error", "detail", "request_id"}, answer.text
            assert "\n" not in answer.json()["detail"], answer.text
        return answer

    def check_health(self, what=""):
        "The next good picture is restored, and the server has not grown by more than 300 MB."
        for route in ROUTES:
            assert self.post(route, GOOD["PNG"]).status_code == 200
        grown = self.memory() - self.size
        print(
            f"{what}{sum(self.codes.values())} answers {dict(sorted(self.codes.items()))}, "
            f"the slowest after {self.slowest:.1f} s, {grown:+.0f} MB"
        )
        assert grown < 300


@pytest.fixture
def target(served):
    return Target(served)


def mutations(n, seed=0):
    "Good files with flipped bits, cut short, or with the head of another."
    chance = random.Random(seed)
    for _ in range(n):
        kind = chance.choice(list(GOOD))
        whole = bytearray(GOOD[kind])
        how = chance.choice(("flip", "flip", "cut", "splice"))
        if how == "flip":
            for _ in range(chance.randrange(1, 9)):
                whole[chance.randrange(len(whole) if chance.random() < 0.5 else 120)] ^= 1 << chance.randrange(8)
        elif how == "cut":
            whole = whole[: chance.randrange(len(whole))]
        else:
            other, at = GOOD[chance.choice(list(GOOD))], chance.randrange(4, 120)
            whole = other[:at] + whole[chance.choice((at, 0, 2 * at)) :]
        yield f"{kind.lower()} {how}", bytes(whole)


def try_mutations(target, n):
    for i, (name, content) in enumerate(mutations(n)):
        target.post(ROUTES[i % 2], content, name)
    target.check_health(f"{n:,} mutations: ")


def test_three_hundred_mutations_of_good_files(target):
    try_mutations(target, 300)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_mutations_of_good_files(target):
    try_mutations(target, 10_000)


def test_every_malformed_file(target, shared):
    files = sorted(path for path in shared("data/malformed").rglob("*") if path.is_file())
    assert len(files) >= 175
    for path in files:
        for route in ROUTES:
            answer = target.post(route, path.read_bytes(), path.name)
            if path.name.startswith("x"):  # the broken files of PngSuite
                assert answer.status_code != 200, path.name
    target.check_health()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(*chunks, good=GOOD["PNG"]):
    "A PNG with more chunks after its head."
    return good[:33] + b"".join(chunks) + good[33:]


def many_frames(n=30_000):
    "A GIF and an APNG of two colours and many frames."
    head = b"GIF89a" + struct.pack("<HHBBB", 2, 2, 0x80, 0, 0) + bytes(3) + b"\xff\xff\xff"
    frame = b"\x21\xf9\x04\0\1\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 2, 2, 0) + b"\x02\x03\x44\x34\x05\0"
    yield "frames.gif", head + n * frame + b";"
    image = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0)) + chunk(b"acTL", struct.pack(">II", n, 0))
    pixels, later = zlib.compress(bytes(6)), b""
    for i in range(1, n):
        control = struct.pack(">IIIIIHHBB", 2 * i - 1, 2, 2, 0, 0, 1, 10, 0, 0)
        later += chunk(b"fcTL", control) + chunk(b"fdAT", struct.pack(">I", 2 * i) + pixels) if i < 3000 else b""
    first = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 2, 2, 0, 0, 1, 10, 0, 0))
    yield "frames.png", b"\x89PNG\r\n\x1a\n" + image + first + chunk(b"IDAT", pixels) + later + chunk(b"IEND", b"")


def bombs():
    zeros = zlib.compress(bytes(200 * 2**20), 9)
    yield "text.png", with_chunks(chunk(b"zTXt", b"Comment\0\0" + zeros))
    yield "itxt.png", with_chunks(chunk(b"iTXt", b"Comment\0\1\0\0\0" + zeros))
    yield "icc.png", with_chunks(chunk(b"iCCP", b"profile\0\0" + zeros))
    yield "texts.png", with_chunks(*[chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**20), 9))] * 500)
    yield "words.png", with_chunks(chunk(b"tEXt", b"Comment\0" + b"a" * 25 * 2**20))
    yield (
        "pixels.png",
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zeros),
    )
    yield "tail.jpg", GOOD["JPEG"] + bytes(25 * 2**20)
    yield (
        "app.jpg",
        GOOD["JPEG"][:2] + (b"\xff\xe2\xff\xff" + b"ICC_PROFILE\0\1\1" + bytes(65519)) * 300 + GOOD["JPEG"][2:],
    )
    yield from many_frames()


@pytest.mark.parametrize("route", ROUTES)
def test_decompression_bombs(target, route):
    for name, content in bombs():
        answer = target.post(route, content, name)
        if name in ("frames.gif", "frames.png", "tail.jpg"):  # harmless: the first frame, the picture before the tail
            assert answer.status_code == 200, (name, answer.text)
        if name == "pixels.png":
            assert answer.status_code == 413, answer.text
    target.check_health()


STRANGE = {
    "picture.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file showpage\n",
    "picture.pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n%%EOF",
    "picture.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'>"
    b"<image href='http://127.0.0.1:1/x.png'/></svg>",
    "picture.msl": b"<?xml version='1.0'?><image><read filename='/etc/passwd'/></image>",
    "picture.mvg": b"push graphic-context\nimage over 0,0 0,0 'http://127.0.0.1:1/'\n",
    "picture.ppm": b"P6\n1 1\n255\nabc",
    "picture.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
}


@pytest.mark.parametrize("route", ROUTES)
def test_other_files_under_the_name_of_a_picture_are_refused(target, route):
    for content in STRANGE.values():
        for name in ("cat.png", "cat.jpg"):
            assert target.post(route, content, name).status_code == 415
    target.check_health()


def parts(*pieces):
    return b"".join(b"--x\r\n" + piece + b"\r\n" for piece in pieces) + b"--x--\r\n"


def field(name, body=b"", more=b""):
    return b'Content-Disposition: form-data; name="' + name + b'"' + more + b"\r\n\r\n" + body


FORMS = {
    "a thousand fields": parts(
        *[field(b"f%d" % i) for i in range(1000)], field(b"file", GOOD["PNG"], b'; filename="a.png"')
    ),
    "a thousand files": parts(*[field(b"file", GOOD["PNG"], b'; filename="a.png"') for _ in range(1000)]),
    "a head of 25 MB": parts(
        b"X-Long: " + b"a" * 25 * 2**20 + b"\r\n" + field(b"file", GOOD["PNG"], b'; filename="a.png"')
    ),
    "a field of 25 MB": parts(field(b"model", b"a" * 25 * 2**20), field(b"file", GOOD["PNG"], b'; filename="a.png"')),
    "25 MB that are no picture": parts(field(b"file", bytes(25 * 2**20), b'; filename="a.png"')),
    "25 MB that are no form": bytes(25 * 2**20),
    "nothing": b"",
    "no end": parts(field(b"file", GOOD["PNG"], b'; filename="a.png"'))[:-40],
}
BAD_NAMES = [
    b'a";\r\nSet-Cookie: x=y.png',
    b"../../../../etc/passwd",
    b"%0d%0aX-Evil: 1",
    b"a\0b.png",
    b"=?utf-8?q?x?=",
    "\u202egnp.exe\u0085".encode(),
    b"\xff\xfe.png",
    b"a" * 5000,
    b"",
    b"\r",
    b"CON",
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("announced", [True, False], ids=["with a length", "without"])
def test_oversized_and_malformed_forms_are_refused(target, route, announced):
    for what, body in FORMS.items():
        content = body if announced else (body[i : i + 2**20] for i in range(0, len(body), 2**20))
        answer = target.check(
            lambda content=content: target.client.post(
                route, content=content, headers={"content-type": "multipart/form-data; boundary=x"}
            )
        )
        assert answer.status_code != 200, what
    answer = target.check(lambda: target.client.post(route, data={f"f{i}": "" for i in range(10_000)}))
    assert answer.status_code == 415
    target.check_health()


@pytest.mark.parametrize("route", ROUTES)
def test_file_names_never_become_headers(target, route):
    for name in BAD_NAMES:
        body = parts(field(b"file", GOOD["PNG"], b'; filename="' + name + b'"'))
        answer = target.check(
            lambda body=body: target.client.post(
                route, content=body, headers={"content-type": "multipart/form-data; boundary=x"}
            )
        )
        assert not {"set-cookie", "x-evil"} & set(answer.headers), name
        assert answer.headers.get("content-disposition", "").isprintable(), name
    target.check_health()


def test_a_request_that_stalls_is_ended(target):
    "After the 20 seconds that a request has: before its head, within it, and within its body."
    lines = []
    for route in ROUTES:
        head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n".encode()
        for sent in (
            b"",
            head[:30],
            head,
            head + b"Content-Length: 5000\r\n\r\n--x\r\n",
            head + b"Transfer-Encoding: chunked\r\n\r\n5\r\n--x\r\n",
        ):
            lines.append(socket.create_connection(target.address, PATIENCE))
            lines[-1].sendall(sent)
    answers = [line.makefile("rb").read() for line in lines]
    assert len(answers) == 10
    for answer in answers:
        assert answer.startswith(b"HTTP/1.1 408 ") and b'"too_slow"' in answer, answers
    for line in lines:
        line.close()
    target.check_health()


def test_a_wrong_content_length_is_refused(target):
    for length in ("1", "99999999999", "-1", "x"):
        line = http.client.HTTPConnection(*target.address, timeout=PATIENCE)
        line.putrequest("POST", "/v1/restore")
        line.putheader("Content-Length", length)
        line.endheaders(b"--x\r\n")
        answer = line.getresponse()
        assert answer.status in (400, 413, 415, 422) and len(answer.read()) < 1000
        line.close()
    target.check_health()


def upright(orientation):
    "How a picture with an EXIF orientation is to be seen."
    turned = SMALL.transpose(1, 0, 2) if orientation > 4 else SMALL
    return {
        1: turned,
        2: turned[:, ::-1],
        3: turned[::-1, ::-1],
        4: turned[::-1],
        5: turned,
        6: turned[:, ::-1],
        7: turned[::-1, ::-1],
        8: turned[::-1],
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_pixel_by_pixel(target, orientation):
    "Turned by its tag or turned before it was sent, the same picture comes back, without its GPS position."
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 51.0, 29.0), 3: "E", 4: (2.0, 17.0, 40.0)})
    tagged, turned = (
        target.post("/v1/restore", encoded(SMALL, exif=exif)),
        target.post("/v1/restore", encoded(np.ascontiguousarray(upright(orientation)))),
    )
    assert np.array_equal(open_picture(tagged.content).pixels, open_picture(turned.content).pixels)
    found = Image.open(io.BytesIO(tagged.content)).getexif()
    assert not found.get_ifd(0x8825) and found.get(0x0112, 1) == 1


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY = SMALL[..., 0].copy()


@pytest.mark.parametrize(
    "content, bands, depth",
    [
        (encoded(SMALL, icc_profile=SRGB), 3, 8),
        (encoded(Image.fromarray(SMALL).convert("CMYK"), "JPEG"), 3, 8),
        (encoded(Image.fromarray(SMALL).quantize(16), transparency=0), 4, 8),
        (encoded(Image.fromarray(SMALL).quantize(16)), 3, 8),
        (encoded(np.dstack([SMALL, GREY])), 4, 8),
        (encoded(Image.fromarray(np.dstack([GREY, GREY[::-1]]))), 2, 8),
        (encoded(Image.fromarray(GREY).convert("1")), 1, 8),
        (encoded(GREY.astype(np.uint16) * 257), 1, 16),
        (encoded(GREY), 1, 8),
    ],
    ids=["ICC", "CMYK", "palette + tRNS", "palette", "RGBA", "LA", "1 bit", "16 bit", "grey"],
)
def test_every_kind_of_picture(target, content, bands, depth):
    picture = open_picture(target.post("/v1/restore", content).content)
    assert (picture.width, picture.height, picture.bands, picture.depth) == (64, 48, bands, depth)
    if content == encoded(SMALL, icc_profile=SRGB):
        assert picture.icc == SRGB
