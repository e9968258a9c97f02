"""Protects `srsys restore` as a process: what a kill, an interruption or a full disk leaves, and what it prints."""

import json
import os
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from skimage import data

from srsys.image import Header, Picture, RowWriter, open_picture, save_picture
from tests.system.conftest import SRSYS, wait_until

pytestmark = pytest.mark.timeout(300)  # each start reads PyTorch, which takes a while on a busy machine
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")


def start(*args, **options):
    return subprocess.Popen(
        [SRSYS, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def run(*args, **options):
    process = start(*args, **options)
    out, err = process.communicate(timeout=250)
    return process.returncode, out, err


def pictures(folder):
    return sorted(path.name for path in Path(folder).rglob("*") if path.suffix in IMAGES)


def messages(errors):
    "The lines on stderr, without the one that says that there is no registry."
    return [line for line in errors.splitlines() if "no registry" not in line]


@pytest.fixture
def album(tmp_path):
    "A small picture, and one that takes a while."
    photos = tmp_path / "photos"
    photos.mkdir()
    save_picture(Picture(data.astronaut()[::4, ::4]), photos / "a small.jpg")
    with RowWriter(photos / "b large.png", Header(3000, 2000, 3)) as writer:
        for _ in range(10):
            writer.write(np.tile(data.astronaut(), (1, 6, 1))[:200, :3000])
    return photos


def reads(process, path):
    "Whether a process has a file open."
    return str(path) in [file.path for file in psutil.Process(process.pid).open_files()]


@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_restore_leaves_no_half_result_and_continues(album, tmp_path, with_signal):
    command = ["restore", album, "-o", tmp_path / "out", "--model", "fast-x2"]
    # jobs in a shell's background ignore SIGINT, and so does what they start; this process may be one
    heed_sigint = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = start(*command, "--tile", "64", preexec_fn=heed_sigint)
    wait_until(lambda: reads(process, album / "b large.png"), process)  # the small one is done
    process.send_signal(with_signal)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (-9 if with_signal == signal.SIGKILL else 1)
    assert pictures(tmp_path / "out") == ["a small.png"] and "Traceback" not in errors
    if with_signal == signal.SIGINT:
        assert messages(errors)[-1] == "srsys: interrupted; nothing half-done is left"

    (album / "b large.png").unlink()  # a smaller one in its place, to be done quickly
    save_picture(Picture(data.astronaut()[::4, ::4]), album / "b large.png")
    status, output, errors = run(*command, "--json")
    report = json.loads(output)
    assert status == 0 and [file["status"] for file in report["files"]] == ["kept", "done"]
    assert open_picture(tmp_path / "out" / "b large.png").width == 256
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(left) == ["a small.png", "b large.png", "lock", "manifest.jsonl", "report.json"]


def test_a_full_disk_is_one_line(album, tmp_path):
    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    status, output, errors = run("restore", album, "-o", tmp_path / "out", "--model", "fast-x2", preexec_fn=little_room)
    (message,) = messages(errors)
    assert status == 1 and "b large.png: cannot be written: File too large" in message
    assert pictures(tmp_path / "out") == ["a small.png"]


def test_each_bad_file_is_one_line_and_the_others_are_restored(tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    save_picture(Picture(data.astronaut()[::4, ::4]), photos / "whole.png")
    (photos / "half.png").write_bytes((photos / "whole.png").read_bytes()[:9000])
    (photos / "text.jpg").write_text("Dear Sir or Madam,")
    (photos / "nothing.webp").touch()
    (photos / "drawing.tif").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    (photos / "bell\a\x1b[2J.png").write_bytes(b"")
    # a name that is no UTF-8, as old archives have:
    Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.jpg")).write_bytes((photos / "whole.png").read_bytes())
    status, output, errors = run("restore", photos, photos / "missing.png", "-o", out, "--model", "fast-x2")
    failed = messages(errors)
    assert status == 1 and len(failed) == 6 and all(line.startswith("failed  ") for line in failed), errors
    for name in ("half.png", "text.jpg", "nothing.webp", "drawing.tif", "bell��[2J.png", "missing.png"):
        assert sum(name in line for line in failed) == 1, name
    assert "\x1b" not in output + errors and output.count("done  ") == 2 and "2 done, 0 kept, 6 failed" in output
    assert len(pictures(out)) == 2


def test_a_job_that_cannot_start_says_so_in_one_line(tmp_path):
    picture = tmp_path / "picture.png"
    save_picture(Picture(data.astronaut()[::8, ::8]), picture)
    (tmp_path / "weights.safetensors").write_bytes(bytes(100))
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'touch /tmp/srsys-was-here'\ntR.")
    for args in (
        [tmp_path, "-o", picture],
        [picture, "-o", tmp_path / "o", "--model", "nosuch"],
        [picture, "-o", tmp_path / "o", "--model", tmp_path / "weights.safetensors"],
        [picture, "-o", tmp_path / "o", "--model", tmp_path / "code.pth"],
    ):
        status, output, errors = run("restore", *args)
        assert status == 1 and len(messages(errors)) == 1 and messages(errors)[0].startswith("srsys: "), errors
        assert not (tmp_path / "o").exists() and not Path("/tmp/srsys-was-here").exists()


def test_help_does_not_wait_for_pytorch():
    code = "import sys, srsys.cli.main; print({'torch', 'mlflow', 'gradio', 'pyvips', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
