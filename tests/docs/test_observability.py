"""What the observability guide, the alerts and the dashboard say of metrics, held against the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.metrics import MetricWrapperBase

from services.api.access.observation import RequestMetrics
from services.averager import telemetry as averager
from services.notifier import telemetry as notifier
from services.predictor import telemetry as predictor
from services.runtime.metrics import StoreMetrics
from services.trainer import telemetry as runner

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "observability.md"
DEPLOY = ROOT / "deploy" / "observability"
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "weight-averaging.json").read_text())


def exposed() -> dict[str, set[str]]:
    """Metric -> labels, as the code has them."""
    owners: list[Any] = [RequestMetrics(), StoreMetrics(registry=CollectorRegistry())]
    found = [value for owner in (*owners, averager, runner, predictor, notifier) for value in vars(owner).values()]
    metrics = [value for value in found if isinstance(value, MetricWrapperBase)]
    told = {
        metric._name + ("_total" if isinstance(metric, Counter) else ""): set(metric._labelnames)
        for metric in metrics
    }
    return told | {"wa_build_info": {"service", "version", "format"}}


def documented() -> dict[str, set[str]]:
    """Metric -> labels, as the guide's tables have them."""
    rows = re.findall(r"^\| `(wa_\w+)(?:\{([\w,]+)\})?` \|", GUIDE.read_text(), re.MULTILINE)
    return {name: set(labels.split(",")) if labels else set() for name, labels in rows}


def expressions() -> list[tuple[str, str]]:
    """(where, PromQL) of every alert and every line of the dashboard."""
    alerts = [(rule["alert"], rule["expr"]) for group in ALERTS for rule in group["rules"]]
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    return alerts + [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    """The guide has a row for each metric, with its labels, and no other."""
    assert documented() == exposed()


def test_metrics_are_named_as_prometheus_wants_it() -> None:
    """Base units at the end of the name, a prefix for what they are of, and no label without a bound."""
    for name, labels in exposed().items():
        assert re.fullmatch(r"wa_(build|store|api|averager|runner|predictor|notifier)_[a-z_]+", name)
        assert not re.search(r"_(ms|milliseconds|minutes|mb|percent)(_|$)", name)
        assert not labels & {"run_id", "run", "path", "url", "average", "name", "owner", "key"}


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_alerts_and_dashboard_ask_for_metrics_that_exist(where: str, expression: str) -> None:
    """Nothing is asked for that no process tells, and no label that a metric has not."""
    known = exposed()
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bwa_\w+", expression)}
    labels = set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expression))
    labels |= {word for by in re.findall(r"by \(([^)]*)\)", expression) for word in re.split(r",\s*", by)}

    assert bases <= known.keys(), where
    assert labels <= {"job", "instance", "le"}.union(*(known[base] for base in bases)), where
    assert expression.count("(") == expression.count(")")


def test_every_alert_says_what_to_do() -> None:
    """An alert has a severity, a summary and a description, as its reader is asleep."""
    rules = [rule for group in ALERTS for rule in group["rules"]]

    assert {rule["labels"]["severity"] for rule in rules} == {"page", "ticket"}
    assert all(rule["annotations"]["summary"] and rule["annotations"]["description"] for rule in rules)
    assert len({rule["alert"] for rule in rules}) == len(rules)


def test_what_is_scraped_is_what_the_compose_file_serves() -> None:
    """Every target is a service of the compose file, on the port that its settings give it."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    jobs = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in jobs for known in job.get("static_configs", []) for target in known["targets"]}
    targets |= {f"{known['names'][0]}:{known['port']}" for job in jobs for known in job.get("dns_sd_configs", [])}
    ports = ("WA_API_PORT", "WA_AVERAGER_PORT", "WA_RUNNER_PORT", "WA_PREDICTOR_PORT", "WA_NOTIFIER_PORT")
    served = {
        f"{name}:{service['environment'][port]}"
        for name, service in services.items()
        for port in ports
        if port in service["environment"]
    }

    assert targets == served
