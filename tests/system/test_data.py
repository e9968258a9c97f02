"""Protects `srsys data`: servers that stall, lie or change, malicious archives, and a kill during a download."""

import hashlib
import io
import json
import os
import resource
import signal
import stat
import subprocess
import tarfile
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data as photos

from srsys.data.datasets import DataError, check_dataset, dataset_pictures
from srsys.data.leaks import build_index, find_copies, read_grey
from srsys.data.patches import ShardedTiles
from srsys.files import FetchError, download
from tests.system.conftest import SRSYS, wait_until

pytestmark = pytest.mark.timeout(300)  # each start reads NumPy and SciPy, which takes a while on a busy machine


def png(picture, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, quality=75)
    return file.getvalue()


def zipped(entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return file.getvalue()


def tarred(entries):
    "A .tgz; content that is no bytes is the type of a link or a device to a file of the system's."
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            if isinstance(content, str):
                entry.type, entry.linkname = content.encode(), "/etc/passwd"
                archive.addfile(entry)
            else:
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


CAT = photos.chelsea()
CATS = tarred({"HR/chelsea.png": png(CAT)})
STREET = zipped(
    {
        "street/a.png": png(photos.astronaut()),
        "street/b.png": png(photos.coffee()),
        "street/c.png": png(photos.rocket()),
        "street/d.jpg": png(photos.camera(), "JPEG"),
    }
)


class Mirror(ThreadingHTTPServer):
    "A server of `files`, with a list of `faults` for the answers to come; `asked` are the ranges that were."

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.faults, self.asked, self.goes_on = {}, [], [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # those who hang up on us


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        content, fault = self.server.files[self.path[1:]], self.server.faults.pop(0) if self.server.faults else ""
        asked, etag = self.headers.get("Range"), f'"{hashlib.md5(content).hexdigest()}"'
        self.server.asked.append(asked)
        whole = not asked or "no ranges" in fault or self.headers.get("If-Range", etag) != etag
        start = 0 if whole else int(asked.removeprefix("bytes=").rstrip("-"))
        if start >= len(content):
            return self.send_error(416)
        self.send_response(200 if whole else 206)
        self.send_header(
            "Content-Length",
            str(len(content) - start + (1000 if "longer" in fault else -1000 if "shorter" in fault else 0)),
        )
        self.send_header("ETag", etag)
        if not whole:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        rest = content[start:]
        self.wfile.write(
            bytes(len(rest))
            if "wrong" in fault
            else rest[: len(rest) // 2]
            if "half" in fault or "stall" in fault or "wait" in fault
            else rest
        )
        if "stall" in fault:
            time.sleep(3)
        if "wait" in fault:
            self.server.goes_on.wait(60)
            self.wfile.write(rest[len(rest) // 2 :])

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path):
    server = Mirror()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.files |= {"street.zip": STREET, "cats.tgz": CATS}
    yield server
    server.goes_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def start(mirror, tmp_path, home):
    "`srsys data …` with this mirror's catalog."

    def begin(*args, name="street.zip", sources=2, **options):
        entries = [
            {
                "name": name,
                "url": f"{mirror.url}/{name}",
                "sha256": hashlib.sha256(mirror.files[name]).hexdigest(),
                "sources": sources,
                "set": "street",
                "split": "train",
                "holdout": 4,
            },
            {
                "name": "cats.tgz",
                "url": f"{mirror.url}/cats.tgz",
                "sources": 0,
                "set": "cats",
                "split": "benchmark",
                "pictures": 1,
            },
        ]
        catalog = tmp_path / "catalog.toml"
        if not catalog.exists():
            catalog.write_text(
                "\n".join(
                    "[[dataset]]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in entry.items()) for entry in entries
                )
            )
        env = os.environ | {"SRSYS_CATALOG": str(catalog), "SRSYS_HOME": str(home)}
        return subprocess.Popen(
            [SRSYS, "data", *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            **options,
        )

    return begin


@pytest.fixture
def run(start):
    def finish(*args, **options):
        process = start(*args, **options)
        out, err = process.communicate(timeout=200)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    return finish


def left(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "faults, asked",
    [
        (["stall", "half", "half"], ["bytes="] * 3),
        (["longer"], ["bytes="]),
        (["shorter"], ["bytes="]),
        (["half", "no ranges longer"], ["bytes=", "bytes="]),
        (["half", "wrong"], ["bytes=", None]),
    ],
)
def test_a_download_survives_a_bad_connection(mirror, tmp_path, faults, asked):
    mirror.faults = list(faults)
    fetch = partial(
        download, f"{mirror.url}/street.zip", tmp_path / "street.zip", hashlib.sha256(STREET).hexdigest(), pause=0.01
    )
    if faults == ["half", "wrong"]:  # a wrong second half is found by the digest, and nothing is kept
        with pytest.raises(FetchError, match="expected SHA-256"):
            fetch(timeout=0.5)
        assert not left(tmp_path)
        got = fetch()
    else:
        got = fetch(size=len(STREET), timeout=0.5)
    assert got.read_bytes() == STREET and left(tmp_path) == ["street.zip"] and not mirror.faults
    assert [a and a[:6] for a in mirror.asked] == [None, *asked]


def test_parts_of_two_versions_of_a_file_are_not_joined(mirror, tmp_path):
    mirror.faults = ["half"]
    with pytest.raises(FetchError, match="are kept"):
        download(f"{mirror.url}/street.zip", tmp_path / "street.zip", attempts=1)
    mirror.files["street.zip"] = CATS  # no digest is known, and yet
    assert download(f"{mirror.url}/street.zip", tmp_path / "street.zip").read_bytes() == CATS
    assert mirror.asked[1].startswith("bytes=")


def test_a_server_that_only_stalls_is_given_up(mirror, tmp_path):
    mirror.faults, begun = ["stall", "stall no ranges", "stall no ranges"], time.monotonic()
    with pytest.raises(FetchError, match="timed out"):
        download(f"{mirror.url}/street.zip", tmp_path / "street.zip", timeout=0.2, attempts=3, pause=0.01)
    assert time.monotonic() - begun < 60 and left(tmp_path) == ["street.zip.part", "street.zip.part.from"]


def test_a_killed_download_is_resumed(mirror, start, run, home):
    mirror.faults = ["wait"]
    process = start("fetch", "street", stdin=subprocess.DEVNULL)
    part = home / "data/street/archives/street.zip.part"
    wait_until(lambda: part.exists() and part.stat().st_size >= len(STREET) // 2)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    size = part.stat().st_size
    assert size < len(STREET)
    status, output, errors = run("fetch", "street", "--json")
    assert status == 0, errors
    assert mirror.asked == [None, f"bytes={size}-"] and json.loads(output)[0]["pictures"] == {
        "train": 3,
        "validation": 1,
    }
    assert left(home / "data/street") == [
        "about.json",
        "manifest.jsonl",
        *(f"street/street/{n}" for n in ("a.png", "b.png", "c.png", "d.jpg")),
    ]
    assert run("fetch", "street")[0] == 0 and len(mirror.asked) == 2  # once more: there is nothing to do


MARK_LOCK = """
import os, sys
def mark(event, args):
    if event == "open" and str(args[0]).endswith("street.lock"):
        open(f"{args[0]}.{os.getpid()}", "w").close()
sys.addaudithook(mark)
"""


def test_two_processes_download_a_file_once(mirror, start, home, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(MARK_LOCK)  # each process leaves a mark when it asks for the lock
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".strip(os.pathsep))
    mirror.faults = ["wait"]
    both = [start("fetch", "street") for _ in range(2)]
    wait_until(lambda: mirror.asked)
    wait_until(lambda: len(list(home.glob("data/street.lock.*"))) == 2)  # one has it, the other waits for it
    mirror.goes_on.set()
    for process in both:
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert "3 train, 1 validation" in output or "1 validation, 3 train" in output
    assert mirror.asked == [None] and check_dataset(home / "data/street").sound


def test_from_a_name_to_tiles(mirror, run, home, tmp_path):
    crop = CAT[80:240, 100:260]
    mirror.files["street.zip"] = zipped(
        {
            "street/a.png": png(photos.astronaut()),
            "street/b.png": png(photos.coffee()),
            "street/cat.jpg": png(crop, "JPEG"),
        }
    )
    status, output, errors = run("fetch", "street", "cats", "--timeout", 5)
    assert (
        status == 1
        and "cats.tgz cannot be verified: fewer than two sources" in errors
        and output.startswith("street: ")
    )
    status, output, errors = run("fetch", "cats", "street", "--accept")
    assert status == 1 and len(errors.splitlines()) == 2
    assert errors.count("street/street/cat.jpg holds cats/chelsea.png") == 2
    with pytest.raises(DataError, match="cat.jpg holds cats/chelsea.png"):
        dataset_pictures(home, "street")
    out = tmp_path / "tiles"
    status, output, errors = run("fetch", "street", "--drop-leaks", "--json")
    assert status == 0 and json.loads(output)[0]["left_out"] == {"street/street/cat.jpg": "cats/chelsea.png"}
    status, output, errors = run("cut", "street", "-o", out, "--side", 128, "--overlap", 8, "--json")
    assert status == 0 and json.loads(output)["digest"] == ShardedTiles(out).digest, errors
    assert ShardedTiles(out).draw(64, 4, np.random.default_rng(0)).shape == (4, 3, 64, 64)

    assert check_dataset(home / "data/street").sound
    victim = home / "data/street/street/street/a.png"
    victim.write_bytes(victim.read_bytes()[:-1])
    status, output, errors = run("check", "--json")
    found = json.loads(output)
    assert status == 1 and found["street"]["changed"] == ["street/street/a.png"] and found["cats"]["sound"]


@pytest.mark.parametrize(
    "name, archive, says",
    [
        ("up.zip", zipped({"../../../../evil.png": b"gotcha"}), "outside of its folder"),
        ("root.zip", zipped({"/tmp/srsys-evil.png": b"gotcha"}), "outside of its folder"),
        ("up.tgz", tarred({"a/../../evil.png": b"gotcha"}), "outside of its folder"),
        ("link.tgz", tarred({"link": "2"}), "a link or a device"),
        ("hard.tgz", tarred({"link": "1"}), "a link or a device"),
        ("device.tgz", tarred({"null": "3"}), "a link or a device"),
        ("bomb.zip", zipped({"zeros.png": bytes(40_000_000)}), "bytes come out of"),
        ("bomb.tgz", tarred({"zeros.png": bytes(40_000_000)}), "bytes come out of"),
        ("half.zip", STREET[: len(STREET) // 2], "cannot be unpacked"),
        ("text.tgz", b"Dear Sir or Madam,", "cannot be unpacked"),
    ],
)
def test_malicious_and_broken_archives_are_refused(mirror, home, name, archive, says):
    from srsys.data.datasets import dataset_catalog, fetch_dataset

    mirror.files[name] = archive
    toml = home.parent / "catalog.toml"
    entry = {
        "name": name,
        "url": f"{mirror.url}/{name}",
        "sha256": hashlib.sha256(archive).hexdigest(),
        "sources": 9,
        "set": "harm",
        "split": "train",
    }
    toml.write_text("[[dataset]]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in entry.items()))
    with pytest.raises(FetchError, match=says):
        fetch_dataset("harm", home, sets=dataset_catalog(toml))
    assert left(home / "data") == [f"harm/archives/{name}"]
    assert not list(home.parent.glob("**/evil*")) and not Path("/tmp/srsys-evil.png").exists()


def test_a_link_in_a_zip_is_refused(tmp_path):
    from srsys.files import unpack

    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(FetchError, match="a link or a device"):
        unpack(tmp_path / "link.zip", tmp_path / "out")
    assert left(tmp_path) == ["link.zip"]


def test_a_full_disk_is_one_line(mirror, run, home):
    little = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (300_000, 300_000))
    status, output, errors = run("fetch", "street", preexec_fn=little)
    assert status == 1 and len(errors.splitlines()) == 1 and "street.zip cannot be written: File too large" in errors
    assert not left(home / "data/street")


def test_leaks_are_found_and_other_pictures_are_not_taken_for_leaks(shared):
    "A sample of what the notebook of `leaks` reports on whole collections."
    benchmark = {p: read_grey(p) for p in sorted(shared("data/bench/BSD100").iterdir())[::20]}
    assert len(benchmark) == 5
    library, rng = build_index(benchmark), np.random.default_rng(0)
    for collection, every in (("BSD400", 40), ("T91", 18), ("SunHays80", 40)):
        pictures = sorted(shared(f"data/train/{collection}").iterdir())[::every]
        assert len(pictures) >= 2
        for path in pictures:
            assert not find_copies(library, read_grey(path)), path
    for path in benchmark:
        picture = Image.open(path).convert("RGB")
        x, y = (int(rng.integers(n - 159)) for n in picture.size)
        piece = picture.crop((x, y, x + 160, y + 160)).resize((144, 144), Image.Resampling.BICUBIC)
        found = find_copies(
            library, np.asarray(Image.open(io.BytesIO(png(np.asarray(piece), "JPEG"))).convert("L"), np.float32)
        )
        assert [copy.name for copy in found] == [path], path
