"""Protects the API's contract: schemathesis makes requests from the OpenAPI document, and every answer must fit it."""

from collections import Counter

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies
from schemathesis import GenerationMode

from tests.system.conftest import encoded

pytestmark = pytest.mark.timeout(600)


def test_every_answer_is_as_documented(served):
    pictures = [encoded(np.full((side, side, 3), 90, np.uint8)) for side in (1, 8, 20)]
    for kind in ("png", "jpeg", "webp", "tiff", "avif", "bmp", "gif"):  # it cannot make pictures itself
        schemathesis.openapi.media_type(f"image/{kind}", strategies.sampled_from(pictures))
    tried = Counter()

    def check(case):
        answer = case.call(timeout=120)
        tried[case.operation.label, answer.status_code] += 1
        case.validate_response(answer)

    for found in schemathesis.openapi.from_url(served.page + "/openapi.json").get_all_operations():
        operation = found.ok()
        for mode in [GenerationMode.POSITIVE, GenerationMode.NEGATIVE][: 2 if operation.method == "post" else 1]:
            few = settings(
                max_examples=40 if operation.method == "post" else 3,
                derandomize=True,
                deadline=None,
                database=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            few(given(case=operation.as_strategy(generation_mode=mode))(check))()
    print(*[f"{label}: {n} × {code}" for (label, code), n in sorted(tried.items())], sep="\n")
    assert tried["POST /v1/restore", 200] > 10
    assert tried["POST /v1/restore", 422] + tried["POST /v1/restore", 415] > 10
    assert tried["POST /v1/feedback", 404] > 10  # its ids are made up; real votes are in test_security_votes
    assert tried["POST /v1/feedback", 422] > 10
    assert not [answer for answer in tried if answer[1] >= 500 and answer[1] != 503]
