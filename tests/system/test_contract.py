"""The server against its own OpenAPI document: whatever schemathesis thinks of is answered as the document says."""

import io
from collections import Counter

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies
from PIL import Image
from schemathesis import GenerationMode

pytestmark = pytest.mark.timeout(600)


def picture(side):
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_schemathesis_finds_no_violation(served):
    for kind in ("png", "jpeg", "webp", "tiff", "avif", "bmp", "gif"):  # what a picture is; everything else it makes up
        schemathesis.openapi.media_type(
            f"image/{kind}", strategies.sampled_from([picture(side) for side in (1, 8, 20)])
        )
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
    assert (
        tried["POST /v1/restore", 200] > 10
        and tried["POST /v1/restore", 422] + tried["POST /v1/restore", 415] > 10
        and tried["POST /v1/feedback", 201] > 10
    )
