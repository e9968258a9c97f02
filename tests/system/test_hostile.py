"""What strangers send, to a real server: broken and forged files, bombs, endless forms, names that are headers. It answers, does not grow, and goes on."""

import http.client
import io
import random
import socket
import struct
import time
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image, ImageCms
from skimage import data

from srsys.image import open_picture

pytestmark = pytest.mark.timeout(900)
SUITE = Path(__file__).parents[2].parent / "shared/data/malformed"
ROUTES = ("/v1/restore", "/page/pictures")
EXPECTED = {200, 408, 413, 415, 422, 429}
PATIENCE = 120  # seconds that any one answer may take on a machine that is busy with other things
SMALL = data.astronaut()[30:54, 200:232].copy()


def encoded(pixels=SMALL, kind="PNG", **options):
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


GOOD = {kind: encoded(kind=kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")}


class Target:
    "A server, what it answered so far, and how much it has grown since."

    def __init__(self, served):
        self.client, self.process = (
            httpx.Client(base_url=served.page, timeout=PATIENCE),
            psutil.Process(served.process.pid),
        )
        self.address, self.codes, self.slowest = (urlsplit(served.page).hostname, urlsplit(served.page).port), {}, 0.0
        for route in ROUTES:  # so that what is loaded on first use is not taken for growth
            for good in GOOD.values():
                assert self.post(route, good).status_code == 200
        self.size = self.memory()

    def memory(self):
        return sum(one.memory_info().rss for one in [self.process, *self.process.children(recursive=True)]) / 1e6

    def post(self, route, content, name="cat.png", **more):
        fields = {"model": "fast-x2", "scale": "2"} if route == "/v1/restore" else {}
        return self.judged(lambda: self.client.post(route, files={"file": (name, content)}, data=fields, **more))

    def judged(self, do):
        start, answer = time.monotonic(), do()
        self.slowest = max(self.slowest, time.monotonic() - start)
        self.codes[answer.status_code] = self.codes.get(answer.status_code, 0) + 1
        assert answer.status_code in EXPECTED, (answer.status_code, answer.text)
        if answer.status_code != 200:
            assert set(answer.json()) == {"error", "detail", "request_id"} and "\n" not in answer.json()["detail"], (
                answer.text
            )
        return answer

    def still_well(self, said=""):
        "The next good picture succeeds, and the server is not much larger than before."
        for route in ROUTES:
            assert self.post(route, GOOD["PNG"]).status_code == 200
        grown = self.memory() - self.size
        print(
            f"{said}{sum(self.codes.values())} answers {dict(sorted(self.codes.items()))}, the slowest after {self.slowest:.1f} s, {grown:+.0f} MB"
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
    target.still_well(f"{n:,} mutations: ")


def test_three_hundred_mutations_of_good_files(target):
    try_mutations(target, 300)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_mutations_of_good_files(target):
    try_mutations(target, 10_000)


@pytest.mark.skipif(not SUITE.is_dir(), reason="the malformed files are not here (../shared/data/malformed)")
def test_every_malformed_file(target):
    files = sorted(path for path in SUITE.rglob("*") if path.is_file())
    assert len(files) >= 175
    for path in files:
        for route in ROUTES:
            answer = target.post(route, path.read_bytes(), path.name)
            assert answer.status_code != 200 or not path.name.startswith("x"), path.name
    target.still_well()


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
def test_bombs(target, route):
    for name, content in bombs():
        answer = target.post(route, content, name)
        assert answer.status_code == 200 or name not in ("frames.gif", "frames.png", "tail.jpg"), (name, answer.text)
    target.still_well()


STRANGE = {
    "picture.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file showpage\n",
    "picture.pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n%%EOF",
    "picture.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><image href='http://127.0.0.1:1/x.png'/></svg>",
    "picture.msl": b"<?xml version='1.0'?><image><read filename='/etc/passwd'/></image>",
    "picture.mvg": b"push graphic-context\nimage over 0,0 0,0 'http://127.0.0.1:1/'\n",
    "picture.ppm": b"P6\n1 1\n255\nabc",
    "picture.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
}


@pytest.mark.parametrize("route", ROUTES)
def test_other_files_by_a_pictures_name(target, route):
    for content in STRANGE.values():
        for name in ("cat.png", "cat.jpg"):
            assert target.post(route, content, name).status_code == 415
    target.still_well()


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
def test_forms_that_are_too_much(target, route, announced):
    for what, body in FORMS.items():
        content = body if announced else (body[i : i + 2**20] for i in range(0, len(body), 2**20))
        answer = target.judged(
            lambda content=content: target.client.post(
                route, content=content, headers={"content-type": "multipart/form-data; boundary=x"}
            )
        )
        assert answer.status_code != 200, what
    assert (
        target.judged(lambda: target.client.post(route, data={f"f{i}": "" for i in range(10_000)})).status_code == 415
    )
    target.still_well()


@pytest.mark.parametrize("route", ROUTES)
def test_file_names_never_become_headers(target, route):
    for name in BAD_NAMES:
        body = parts(field(b"file", GOOD["PNG"], b'; filename="' + name + b'"'))
        answer = target.judged(
            lambda body=body: target.client.post(
                route, content=body, headers={"content-type": "multipart/form-data; boundary=x"}
            )
        )
        assert not {"set-cookie", "x-evil"} & set(answer.headers) and all(
            c.isprintable() for c in answer.headers.get("content-disposition", "")
        ), name
    target.still_well()


def test_who_does_not_go_on_is_given_up(target):
    "After the 20 seconds that a request has: before its head, in it, and in its body."
    lines = []
    for route in ROUTES:
        head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n".encode()
        for sent in (
            b"",
            head[:30],
            head,
            head + b"Content-Length: 5000\r\n\r\n--x\r\n",
            head + b"Transfer-Encoding: chunked\r\n\r\n5\r\n--x\r\n",
        ):
            lines.append(socket.create_connection(target.address, PATIENCE))
            lines[-1].sendall(sent)
    said = [line.makefile("rb").read() for line in lines]
    assert all(answer.startswith(b"HTTP/1.1 408 ") and b'"too_slow"' in answer for answer in said), said
    for line in lines:
        line.close()
    target.still_well()


def test_a_length_that_is_a_lie(target):
    for length in ("1", "99999999999", "-1", "x"):
        line = http.client.HTTPConnection(*target.address, timeout=PATIENCE)
        line.putrequest("POST", "/v1/restore")
        line.putheader("Content-Length", length)
        line.endheaders(b"--x\r\n")
        answer = line.getresponse()
        assert answer.status in (400, 413, 415, 422) and len(answer.read()) < 1000
        line.close()
    target.still_well()


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
    "Turned by its tag, and turned before it was sent: the same picture comes back, with no place on it."
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 51.0, 29.0), 3: "E", 4: (2.0, 17.0, 40.0)})
    tagged, turned = (
        target.post("/v1/restore", encoded(exif=exif)),
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
        (encoded(icc_profile=SRGB), 3, 8),
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
    assert picture.icc == (SRGB if content == encoded(icc_profile=SRGB) else picture.icc)
