"""report.html: one page, without a network, that one can decide from."""

from collections.abc import Sequence
from html import escape
from typing import Any

from tlrunner.train.trial_dir import EpochReport, TrialRecord

MAX_CURVES = 12
COLOURS = ("#2563eb", "#dc2626", "#16a34a", "#9333ea", "#ea580c", "#0891b2")
COLUMNS = (
    "rank",
    "trial_id",
    "backbone.name",
    "freeze.strategy",
    "freeze.num_stages",
    "optim.lr",
    "val_acc",
    "val_loss",
    "epoch",
    "trainable_params",
    "latency_seconds",
    "seconds",
    "state",
)
WHERE_ANY = (
    "pareto",
    "num_repeats",
    "mean_val_acc",
    "std_val_acc",
    "detail",
)  # shown if any has it
LEFT, RIGHT, TOP, BOTTOM = 60, 700, 20, 280  # of the curves, in units of the drawing
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; width: 100% }
td, th { border-bottom: 1px solid #ddd; padding: .3rem .4rem; text-align: left }
td, th { white-space: nowrap }
tr.best { background: #ecfdf5; font-weight: 600 }
svg { background: #fafafa; width: 100%; max-height: 22rem }
"""


def render_page(
    summary: dict[str, Any], rows: Sequence[dict[str, Any]], records: Sequence[TrialRecord]
) -> str:
    """The page as a string; everything that came from outside is escaped."""
    best = summary["best"]
    headline = (
        f"Best: trial {best['trial_id']}, val_acc {best['val_acc']:.4f} after epoch "
        f"{best['epoch']}; {best['trainable_params']:,} of {best['total_params']:,} parameters "
        f"trained{over_seeds(best)}"
        if best
        else "No trial finished an epoch."
    )
    states = ", ".join(f"{number} {state}" for state, number in summary["trials"].items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{escape(summary["run"])}</title>
<style>{STYLE}</style>
<h1>{escape(summary["run"])}: {summary["status"]}</h1>
<p>{escape(headline)}</p>
<p>Trials: {states}. Wall time {summary["wall_seconds"]:.0f} s, compute
{summary["compute_seconds"]:.0f} s. Frozen stages: {summary["reuse"]["fill_seconds"]:.0f} s spent on
what is kept of them, {summary["reuse"]["saved_seconds"]:.0f} s of computing saved.</p>
<h2>Validation accuracy by epoch</h2>
{_curves(records[:MAX_CURVES])}
<h2>Leaderboard</h2>
{_table(rows)}
</html>
"""


def over_seeds(best: dict[str, Any]) -> str:
    """What repeats of the winner with other seeds reached; nothing if there are none."""
    repeats = best.get("repeats")
    if not repeats:
        return ""
    spread = repeats["std_val_acc"]
    return (
        f"; over {repeats['num_repeats']} other seeds {repeats['mean_val_acc']:.4f}"
        f"{'' if spread is None else f' +- {spread:.4f}'}"
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    extra = [column for column in WHERE_ANY if any(row.get(column) for row in rows)]
    columns = [*COLUMNS, *extra]
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join(
        f'<tr class="{"best" if row["rank"] == 1 else ""}">'
        + "".join(f"<td>{escape(_cell(row[column]))}</td>" for column in columns)
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _curves(records: Sequence[TrialRecord]) -> str:
    """val_acc over epochs, one labelled line for each of the best trials."""
    drawn = [record for record in records if record.epochs]
    if not drawn:
        return "<p>None.</p>"
    last = max(record.epochs[-1].epoch for record in drawn)
    accuracies = [report.val_acc for record in drawn for report in record.epochs]
    lowest, highest = min(accuracies), max(accuracies)

    def place(report: EpochReport) -> tuple[float, float]:
        across = (report.epoch - 1) / max(1, last - 1)
        up = (report.val_acc - lowest) / ((highest - lowest) or 1.0)
        return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    lines = [
        _line(record, [place(report) for report in record.epochs], COLOURS[i % len(COLOURS)])
        for i, record in enumerate(drawn)
    ]
    return (
        f'<svg viewBox="0 0 {RIGHT + 200} {BOTTOM + 40}" font-size="12">{"".join(lines)}'
        f'<text x="4" y="{TOP + 4}">{highest:.3f}</text>'
        f'<text x="4" y="{BOTTOM + 4}">{lowest:.3f}</text>'
        f'<text x="{LEFT}" y="{BOTTOM + 30}">epoch 1</text>'
        f'<text x="{RIGHT - 45}" y="{BOTTOM + 30}">epoch {last}</text></svg>'
    )


def _line(record: TrialRecord, places: list[tuple[float, float]], colour: str) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places)
    x, y = places[-1]
    label = escape(f"{record.trial_id} {record.config.freeze}")
    return (
        f'<g fill="{colour}"><polyline points="{points}" fill="none" stroke="{colour}" '
        f'stroke-width="2"/>{dots}<text x="{x + 8:.1f}" y="{y + 4:.1f}">{label}</text></g>'
    )
