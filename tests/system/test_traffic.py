"""Protects the throughput of HTTP on the shipped fast-x4, and what happens under three times the load it can take.

The exact figures are those of `make bench`.
"""

import pytest

from srsys.evaluate import speed
from srsys.serve.admission import RestoreRequest, ServerLimits
from srsys.serve.engine import Engine
from srsys.serve.load_test import PICTURE_SIZE, compare_throughput, make_form, measure_overload, running_server
from srsys.serve.model_table import load_table

pytestmark = pytest.mark.timeout(1800)


def loaded(folder, size, count, rounds):
    "The throughput, the outcome of three times that load, and how many pictures were restored meanwhile."
    content, table = speed.benchmark_photo(*size), load_table(None)
    (source := folder / "a.jpg").write_bytes(content)
    with running_server(engine := Engine(lambda: table), folder) as port:
        form = make_form(content, model="fast-x4", format="jpeg", quality="90")
        pace = compare_throughput(
            engine, port, RestoreRequest(source, "a.jpg", "fast-x4", None, "jpeg", 90), form, count, rounds
        )
        value = engine.metrics.registry.get_sample_value
        before = value("srsys_batch_size_sum")
        seen = measure_overload(port, form, pace.http, ServerLimits(), count=2 * count)
        print(pace, seen)
        return pace, seen, value("srsys_batch_size_sum") - before


def test_overload_is_refused_and_accepted_requests_are_served_in_time(tmp_path):
    _, seen, tiles = loaded(tmp_path, (64, 36), 40, 1)
    assert seen.restored >= 1 and seen.wait_p95 <= seen.deadline
    assert tiles == seen.restored, "a refused request was worked on"


@pytest.mark.slow
def test_through_http_it_is_as_fast_as_the_engine(tmp_path):
    pace, seen, _ = loaded(tmp_path, PICTURE_SIZE, 60, 5)
    assert pace.ratio >= 0.95 and seen.wait_p95 <= seen.deadline
    assert seen.refused > 0 and seen.refusal_p95 < 0.05
