"""Protects against leaks: after thousands of pictures the server holds no more memory, files or threads than before."""

import concurrent.futures
import os
import statistics
import time

import httpx
import numpy as np
import psutil
import pytest
from skimage import data

from tests.system.conftest import encoded

PICTURES = int(os.environ.get("SOAK_PICTURES", "2000"))
WARM = 0.2  # of them: until then caches fill
GROWTH = 64  # MB that the last quarter may hold more than the first after warming up, by their medians


def pictures(seed=0):
    "Small pictures of many sizes and formats, every twentieth truncated."
    chance, source = np.random.default_rng(seed), data.astronaut()
    for number in range(PICTURES):
        (height, width), (top, left) = chance.integers(24, 160, 2), chance.integers(0, 300, 2)
        content = encoded(source[top : top + height, left : left + width], ("PNG", "JPEG", "WEBP")[number % 3])
        yield (
            number,
            content[: None if number % 20 else 100],
            ("fast-x2", "fast-x4")[number % 2],
            ("png", "jpeg", "webp")[number // 3 % 3],
        )


def held(process):
    "What a process and its children hold: MB of their own, open files, threads."
    family = [process, *process.children(recursive=True)]
    return (
        sum(p.memory_full_info().uss for p in family) / 2**20,
        sum(p.num_fds() for p in family),
        sum(p.num_threads() for p in family),
    )


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_memory_files_and_threads_stay_flat(serve, tmp_path):
    server = serve(tmp_path)
    process, answers, seen, begin = psutil.Process(server.process.pid), {}, [], time.monotonic()

    def send(picture):
        number, content, model, format = picture
        answer = client.post(
            server.page + "/v1/restore",
            files={"file": (f"{number}.dat", content)},
            data={"model": model, "format": format},
            timeout=300,
        )
        if number % 10 == 0:
            seen.append((number, *held(process)))
        return number, answer.status_code

    with httpx.Client() as client, concurrent.futures.ThreadPoolExecutor(4) as senders:
        answers = dict(senders.map(send, pictures()))
    rate = PICTURES / (time.monotonic() - begin)
    assert len(answers) == PICTURES
    wrong = {number: code for number, code in answers.items() if code != (200 if number % 20 else 422)}
    assert not wrong
    warm = sorted(one for one in seen if one[0] >= WARM * PICTURES)
    quarter = len(warm) // 4
    first, last = (
        [statistics.median(column) for column in zip(*part, strict=True)][1:]
        for part in (warm[:quarter], warm[-quarter:])
    )
    medians = "; ".join(
        f"{what} {a:.0f} → {b:.0f}" for what, a, b in zip(("MB", "files", "threads"), first, last, strict=True)
    )
    print(
        f"\n{PICTURES} pictures, {60 * rate:.0f} a minute, at most {max(one[1] for one in warm):.0f} MB. "
        f"Medians of the first and last quarter: {medians}"
    )
    assert last[0] - first[0] < GROWTH, medians
    assert last[1] <= first[1] + 8 and last[2] <= first[2] + 4, medians
    assert server.end() == 0
