"""Protects monitoring: rules tested by promtool, a real Prometheus and Alertmanager around a server, and its log."""

import io
import json
import logging
import re
import shutil
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import httpx
import pytest
import yaml
from skimage import data

from srsys.jobs.timetable import read_timetable
from srsys.monitor import telemetry
from srsys.monitor.dashboards import MODELS, SERVICE
from srsys.serve import api
from srsys.serve.engine import Engine
from srsys.serve.model_table import ModelTable
from srsys.serve.server import bind_port
from srsys.serve.shutdown import DrainingServer
from tests.system.conftest import PATIENCE, ROOT, encoded, wait_until

pytestmark = pytest.mark.timeout(600)
MONITORING = ROOT / "docker/monitoring"
TIMETABLE = ROOT / "scheduled/timetable.toml"
QUERIES = [
    query for rows in (SERVICE, MODELS) for row in rows.values() for panel in row for query in panel.queries.values()
]


def promtool(system_package, *words):
    done = subprocess.run(
        [system_package("promtool"), *map(str, words)], capture_output=True, text=True, cwd=MONITORING, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_accepts_configuration_and_rules(system_package):
    promtool(system_package, "check", "config", "prometheus.yml")


def test_alerts_fire_when_they_should_and_only_then(system_package):
    files = sorted(path.relative_to(MONITORING) for path in MONITORING.glob("tests/*.yml"))
    assert files
    promtool(system_package, "test", "rules", *files)


def test_every_alert_is_unit_tested():
    named = set(re.findall(r"alert: (\w+)", (MONITORING / "rules/alerts.yml").read_text()))
    tested = "".join(path.read_text() for path in MONITORING.glob("tests/*.yml"))
    assert len(named) == 9
    assert not [name for name in named if name not in tested]


def test_the_stack_mounts_the_files_where_they_are_read():
    services = yaml.safe_load((MONITORING.parent / "compose.yaml").read_text())["services"]
    mounted = {
        volume.split(":")[1]: volume.split(":")[0]
        for name in ("prometheus", "alertmanager", "grafana")
        for volume in services[name]["volumes"]
    }
    [provider] = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/srsys.yml").read_text())["providers"]
    assert mounted[provider["options"]["path"]] == "./monitoring/grafana/dashboards"
    assert mounted["/etc/grafana/provisioning"] == "./monitoring/grafana/provisioning"
    assert mounted["/etc/prometheus"] == "./monitoring"
    addressed = set(re.findall(r"\b([a-z]+):\d{4}\b", "".join(path.read_text() for path in MONITORING.rglob("*.yml"))))
    assert addressed == {"app", "alertmanager", "prometheus"} and addressed < set(services)


def test_a_job_counts_as_stale_soon_after_it_should_have_run():
    "The limit of each notebook is longer than its period in the timetable, and at most three periods."
    limits = {
        job: int(seconds)
        for seconds, job in re.findall(
            r"vector\((\d+)\).*\n.*job: (\w+)", (MONITORING / "rules/recording.yml").read_text()
        )
    }
    periods, noon = {}, datetime(2026, 3, 3, 12, tzinfo=UTC)
    for row in read_timetable(TIMETABLE).values():
        first = row.trigger.get_next_fire_time(None, noon)
        period = (row.trigger.get_next_fire_time(first, first + timedelta(seconds=1)) - first).total_seconds()
        periods |= {notebook.stem: min(period, periods.get(notebook.stem, period)) for notebook in row.notebooks}
    assert periods and set(periods) == set(limits)
    for job, period in periods.items():
        assert period < limits[job] <= 3 * period, job


@pytest.fixture
def started(tmp_path):
    "Starts programs that log where they listen; returns the address. Ends them with the test."
    running = []

    def start(name, *command):
        log = tmp_path / f"{name}.log"
        with open(log, "wb") as said:
            running.append(
                subprocess.Popen(
                    [*map(str, command), "--web.listen-address=127.0.0.1:0"], stdout=said, stderr=said, cwd=tmp_path
                )
            )
        return "http://" + wait_until(lambda: re.search(r'msg="Listening on" address=(\S+)', log.read_text()))[1]

    yield start
    for process in running:
        process.kill()
        process.wait(30)


@pytest.fixture
def watched(system_package, started, served, tmp_path):
    "Queries a real Prometheus that scrapes a real server, with a real Alertmanager beside it."
    folder, here = shutil.copytree(MONITORING, tmp_path / "monitoring"), urlsplit(served.metrics).netloc

    def adapt(name, **changes):
        text = (folder / name).read_text()
        for old, new in changes.values():
            assert old in text
            text = text.replace(old, new)
        (folder / name).write_text(text)

    (folder / "alert_token").write_text("a-token-of-alertmanager")
    secret = ("/run/secrets/alert_token", str(folder / "alert_token"))
    adapt("alertmanager.yml", host=("app:9464", here), token=secret)
    adapt("rules/alerts.yml", patience=("for: 2h", "for: 0s"))
    alertmanager = started(
        "alertmanager",
        system_package("prometheus-alertmanager"),
        f"--config.file={folder}/alertmanager.yml",
        "--storage.path=alerts",
        "--cluster.listen-address=",
    )
    adapt(
        "prometheus.yml",
        host=("app:9464", here),
        other=("alertmanager:9093", urlsplit(alertmanager).netloc),
        pace=(": 15s", ": 1s"),
    )
    prometheus = started(
        "prometheus",
        system_package("prometheus"),
        f"--config.file={folder}/prometheus.yml",
        "--storage.tsdb.path=series",
    )

    def ask(query):
        answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}, timeout=60).json()
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    return ask


@pytest.fixture
def left(served):
    "Metrics of jobs: `etl` ran just now, `monitor` ran four hours ago and found that the noise had drifted."
    files = [
        telemetry.write_job_metrics(served.home / "metrics", "etl"),
        telemetry.write_job_metrics(served.home / "metrics", "monitor", {"noise": 0.4}, time.time() - 4 * 3600),
    ]
    yield
    for file in files:
        file.unlink()


def test_every_dashboard_query_has_data_and_the_drift_alert_reaches_the_server(left, watched, served):
    answer = httpx.post(
        served.page + "/v1/restore",
        files={"file": ("cat.png", encoded(data.astronaut()[:64, 180:260]))},
        data={"model": "fast-x2"},
        timeout=PATIENCE,
    )
    assert answer.status_code == 200
    wait_until(lambda: any(float(one["value"][1]) for one in watched("srsys_images_processed_total")))
    missing = {re.sub(r"\$instance", ".*", query.replace("$__rate_interval", "30s")) for query in QUERIES}
    assert len(missing) > 30

    def all_drawn():
        missing.difference_update([query for query in missing if watched(query)])
        return not missing

    try:
        wait_until(all_drawn)
    except AssertionError:
        raise AssertionError(f"nothing to draw for {missing}") from None
    [stale] = wait_until(lambda: watched('ALERTS{alertname="SrsysJobStale", alertstate="firing"}'))
    assert stale["metric"]["job"] == "monitor"
    assert not watched('ALERTS{alertname=~"SrsysDown|SrsysModelAbsent|SrsysNoChampion|SrsysQueueFilling"}')
    [asking] = wait_until(lambda: telemetry.firing_alerts(served.home / "alerts.db"))
    assert asking.name == "SrsysDrift" and "noise, D = 0.40" in asking.summary


def test_the_log_is_json_without_file_names_or_contents(tmp_path):
    "Requests that succeed, are refused, and meet an internal error; each line has the request id of its answer."
    before, written, stop = (logging.root.handlers[:], logging.root.level), io.StringIO(), threading.Event()
    engine = Engine(lambda: ModelTable(broken={"photo-x4": "lost"}))
    claimed = bind_port("127.0.0.1", 0, "--port")
    address = "http://{}:{}".format(*claimed.getsockname())
    telemetry.configure_logging("json", written)
    server = threading.Thread(
        target=DrainingServer(api.create_api(engine, tmp_path / "feedback.db"), engine, stop).run, args=[[claimed]]
    )
    server.start()
    try:
        wait_until(lambda: engine.table)
        answers = [
            httpx.get(f"{address}/v1/models"),
            httpx.get(f"{address}/livez"),
            httpx.post(
                f"{address}/v1/restore",
                files={"file": ("grandmother.jpg", b"not a picture, sent from 52.5200 N 13.4050 E")},
            ),
        ]
        engine.table = ModelTable(served={"photo-x4": (None, None)})
        answers.append(httpx.get(f"{address}/v1/models"))
    finally:
        stop.set()
        server.join(60)
        logging.root.handlers[:], logging.root.level = before
        claimed.close()
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    listed, alive, refused, failed = [
        [line for line in lines if line["request_id"] == answer.headers["x-request-id"]] for answer in answers
    ]
    assert [(line["route"], line["code"]) for line in listed] == [("/v1/models", 200)] and alive == []
    assert [(line["route"], line["code"], line["error"]) for line in refused] == [
        ("/v1/restore", answers[2].status_code, answers[2].json()["error"])
    ]
    assert answers[3].status_code == 500 and {line["level"] for line in failed} == {"WARNING", "ERROR"}
    assert any("AttributeError" in line.get("exc_info", "") for line in failed)
    assert all(line["seconds"] > 0 for line in listed + refused)
    assert "grandmother" not in written.getvalue() and "13.4050" not in written.getvalue()
