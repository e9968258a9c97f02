"""Protects the votes: only those who were given a result may vote on it, and not without limit."""

import httpx
import pytest
from skimage import data

from tests.system.conftest import PATIENCE, encoded

pytestmark = pytest.mark.timeout(900)
SMALL = encoded(data.astronaut()[:60, 180:240])
TOKENS = ("the-token-of-ann-0001", "the-token-of-bob-0002")


@pytest.fixture(scope="module")
def running(serve_long, tmp_path_factory):
    "One server for this file, with a token for Ann and one for Bob."
    return serve_long(tmp_path_factory.mktemp("votes"), SRSYS_TOKENS=" ".join(TOKENS))


@pytest.fixture(scope="module")
def clients(running):
    found = [httpx.Client(headers={"authorization": f"Bearer {token}"}, timeout=PATIENCE) for token in TOKENS]
    yield found
    for client in found:
        client.close()


def restore(running, client):
    fields = {"files": {"file": ("a.png", SMALL)}, "data": {"model": "fast-x2"}}
    answer = client.post(running.page + "/v1/restore", **fields)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-request-id"]


def vote(running, client, request_id, choice="up"):
    answer = client.post(running.page + "/v1/feedback", json={"request_id": request_id, "vote": choice})
    return answer.status_code, answer.json().get("error", "")


def test_only_its_owner_votes_on_a_result_and_not_without_limit(running, clients):
    ann, bob = clients
    request_id = restore(running, ann)
    assert vote(running, bob, request_id, "down") == (404, "unknown_result")
    assert vote(running, ann, "f" * 32) == (404, "unknown_result"), "never issued"
    assert vote(running, ann, request_id[:8]) == (404, "unknown_result"), "the beginning of an id"
    assert vote(running, ann, request_id, "down") == (201, "")
    assert vote(running, ann, request_id, "up") == (201, ""), "the last vote counts"
    answers = {vote(running, bob, f"{number:032x}", "down") for number in range(40)}
    assert answers == {(404, "unknown_result"), (429, "too_often")}
    assert vote(running, ann, request_id) == (201, ""), "others are not limited by that"
