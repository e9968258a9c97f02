"""Protects the server against locked, damaged and missing state: pictures never wait for what is only measured."""

import re
import sqlite3
import time
from contextlib import closing

import httpx
import pytest
from skimage import data

from tests.system.conftest import PATIENCE, encoded, wait_until

pytestmark = pytest.mark.timeout(900)
SMALL = encoded(data.astronaut()[:60, 180:240])


@pytest.fixture(scope="module")
def running(serve_long, tmp_path_factory):
    "One server for this file."
    return serve_long(tmp_path_factory.mktemp("state"))


def restore(running):
    return httpx.post(
        running.page + "/v1/restore", files={"file": ("a.png", SMALL)}, data={"model": "fast-x2"}, timeout=PATIENCE
    )


def vote_on(running, answer):
    vote = {"request_id": answer.headers["x-request-id"], "vote": "up"}
    return httpx.post(running.page + "/v1/feedback", json=vote, timeout=PATIENCE)


def rows(path, table):
    "The number of rows of a table; 0 if there is no such table yet."
    try:
        with closing(sqlite3.connect(path, timeout=60)) as db:
            return db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]
    except sqlite3.Error:
        return 0


def test_a_locked_monitor_database_delays_no_picture(running):
    path = running.home / "monitor.db"
    assert restore(running).status_code == 200
    wait_until(lambda: rows(path, "pictures"), running.process)
    before = rows(path, "pictures")
    with closing(sqlite3.connect(path, isolation_level=None, timeout=60)) as db:
        db.execute("BEGIN EXCLUSIVE")
        start = time.monotonic()
        assert [restore(running).status_code for _ in range(3)] == [200] * 3
        seconds = time.monotonic() - start
        db.execute("ROLLBACK")
    assert seconds < 20, "each waited for the lock"  # unfixed: 10 s each
    wait_until(lambda: rows(path, "pictures") == before + 3, running.process)
    assert re.search(r'srsys_dropped_records_total\{store="monitor"\} 0', httpx.get(running.metrics).text)


def test_a_vote_does_not_wait_for_a_locked_database(running):
    answer = restore(running)
    assert vote_on(running, answer).status_code == 201
    with closing(sqlite3.connect(running.home / "feedback.db", isolation_level=None, timeout=60)) as db:
        db.execute("BEGIN EXCLUSIVE")
        start = time.monotonic()
        refused = vote_on(running, answer)
        seconds = time.monotonic() - start
        db.execute("ROLLBACK")
    assert (refused.status_code, refused.json()["error"]) == (503, "not_recorded") and refused.headers["retry-after"]
    assert seconds < 8
    assert vote_on(running, answer).status_code == 201
