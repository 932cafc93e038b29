"""`bench` on the screen and as a chart: each variant's step beside the limit of the cost formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable


def print_bench(document: dict[str, Any], console: Console) -> None:
    """Print a bench document."""
    console.print(
        f"[bold]{document['experiment']}[/bold]: forward and backward of {document['rows']} samples, "
        f"{document['visual_tokens']} visual + {document['text_tokens']} text tokens each; {document['device']}, "
        f"{document['threads']} threads, {document['dtype']}, {document['attn_implementation']}; medians of "
        f"{document['repeats']}",
        highlight=False,
    )
    grid = RichTable(box=None, header_style="bold", padding=(0, 2, 0, 0))
    grid.add_column("variant", overflow="fold")
    names = ("step s", "tokens/s", "peak GiB", "speed-up", "by formula", "ratio", "overhead")
    for name in names:
        grid.add_column(name, justify="right")
    for row in document["variants"]:
        overhead = row["overhead"]
        grid.add_row(
            row["name"],
            f"{row['step_seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_memory_gib']:.2f}",
            f"{row['speedup_measured']:.2f}",
            f"{row['speedup_predicted']:.2f}",
            f"{row['ratio']:.2f}",
            "–" if overhead is None else f"{overhead:.1%}",
        )
    console.print(grid)
    console.print(
        "speed-up: against full tokens; by formula: from operations alone; overhead: beyond dropping "
        "as many tokens by position, as a share of the full step",
        highlight=False,
    )


def bench_figure(document: dict[str, Any], path: Path) -> None:
    """Draw measured and predicted speed-up of every variant as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = document["variants"]
    figure, panel = pyplot.subplots(figsize=(7, 0.45 * len(rows) + 1.8), layout="constrained")
    places = range(len(rows))
    panel.barh(places, [row["speedup_measured"] for row in rows], height=0.6, color="tab:blue", label="measured")
    predicted = [row["speedup_predicted"] for row in rows]
    panel.scatter(predicted, places, marker="|", s=300, color="black", label="by formula", zorder=3)
    panel.set_yticks(places, [row["name"] for row in rows])
    panel.invert_yaxis()
    panel.axvline(1, color="0.7", linewidth=1, zorder=0)
    panel.set_xlabel("speed-up of forward and backward against full tokens")
    panel.legend(fontsize=8, frameon=False)
    panel.set_title(f"{document['experiment']} on {document['device']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
