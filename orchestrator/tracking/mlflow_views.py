"""Saved views of an experiment in MLflow's dashboard, and the address that opens one: numbers without a click.

A view is a tag of the experiment, `mlflow.sharedViewState.ID`, in a format that MLflow keeps to itself (3.15 and
later): tests/integration/tracking/test_dashboard.py opens each in a real dashboard. An older server ignores them.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.plan.cell_record import CELL_ID
from orchestrator.tracking.mlflow_state import SUMMARY_OF, accepted_name

_TAG = "mlflow.sharedViewState."
CELLS, SCATTER, CURVES, SUMMARY = "cells", "accuracy-against-cost", "curves", "summary"
_MOST_CHARTS = 12


@dataclass(frozen=True)
class Shown:
    """What the views show.

    Attributes:
        params: Params that tell the cells apart, those of the axes.
        scores: Metrics of evaluations, the headline first.
        costs: Metrics of costs; the first is the one that scores are drawn against.
        curves: Metrics over steps.
        group_by: Params that runs are grouped by, which then show means; none where every cell stands for itself.
    """

    params: Sequence[str] = ()
    scores: Sequence[str] = ()
    costs: Sequence[str] = ()
    curves: Sequence[str] = ()
    group_by: Sequence[str] = ()


def view_tags(shown: Shown) -> dict[str, str]:
    """Return the tags of the saved views: the table of cells, accuracy against cost, curves, the summary."""
    metrics = [accepted_name(name) for name in (*shown.scores, *shown.costs)]
    columns = [
        *(f"params.`{accepted_name(name)}`" for name in shown.params),
        *(f"metrics.`{name}`" for name in metrics),
    ]
    grouped = {
        "aggregateFunction": "average",
        "groupByKeys": [{"mode": "param", "groupByData": accepted_name(name)} for name in shown.group_by],
    }
    common = {
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": dict.fromkeys(columns, 130),  # else their names are cut off
        "runsHiddenMode": "SHOW_ALL",  # not the first ten only
        "searchFilter": f"tags.{CELL_ID} != ''",  # not the summary
        "groupBy": grouped if shown.group_by else None,
    }
    scores, costs = metrics[: len(shown.scores)], metrics[len(shown.scores) :]
    scatter = [_scatter(costs[0], score) for score in scores[:_MOST_CHARTS]] if costs else []
    bars = [_chart("BAR", metricKey=name) for name in metrics[:_MOST_CHARTS]]
    curves = [_chart("LINE", metricKey=name, selectedMetricKeys=[name]) for name in map(accepted_name, shown.curves)]
    final = {"final values": bars}
    return {
        f"{_TAG}{CELLS}": _view("cells", common | _charts(final)),
        f"{_TAG}{SCATTER}": _view(
            "accuracy against cost", common | _charts({"accuracy against cost": scatter, **final})
        ),
        f"{_TAG}{CURVES}": _view("curves", common | _charts({"curves": curves})),
        f"{_TAG}{SUMMARY}": _view("summary", {"searchFilter": f"tags.{SUMMARY_OF} != ''"}),
    }


def dashboard_address(server: str, experiment_id: str, view: str = CELLS) -> str:
    """Return the address of an experiment's runs in the dashboard's view for model training, as a saved view.

    Args:
        server: The server's address.
        experiment_id: MLflow's number of the experiment.
        view: Id of the saved view.
    """
    mode = "" if view == CELLS else "&compareRunsMode=CHART"
    query = f"workflowType=machine_learning&viewStateShareKey={view}{mode}"
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{query}"


def _scatter(cost: str, score: str) -> dict[str, Any]:
    axes = {"xaxis": {"key": cost, "type": "METRIC"}, "yaxis": {"key": score, "type": "METRIC"}}
    return _chart("SCATTER", **axes, runsCountToCompare=500)


def _chart(kind: str, **fields: Any) -> dict[str, Any]:
    # Not `isGenerated`: the dashboard changes charts that it believes to be its own.
    return {"type": kind, "deleted": False, "isGenerated": False, "runsCountToCompare": 100, **fields}


def _charts(sections: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Return charts by section; the dashboard adds one of every other metric in sections of its own."""
    return {
        "compareRunCharts": [
            {**chart, "uuid": f"{name}-{number}", "metricSectionId": name}
            for name, charts in sections.items()
            for number, chart in enumerate(charts)
        ],
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "columns": 2, "isReordered": True, "isGenerated": False}
            for name in sections
        ],
        "isAccordionReordered": True,  # else the sections are sorted by name
    }


def _view(name: str, state: Mapping[str, Any]) -> str:
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    # Times of nothing: a view that says the same is the same text.
    return json.dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})
