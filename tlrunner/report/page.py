"""report.html: one page, without a network, that one can decide from."""

from collections.abc import Sequence
from html import escape
from typing import Any

from tlrunner.train.trial_dir import TrialRecord

MAX_CURVES = 12
COLOURS = ("#2563eb", "#dc2626", "#16a34a", "#9333ea", "#ea580c", "#0891b2")
COLUMNS = (
    "rank",
    "trial_id",
    "backbone.name",
    "freeze.strategy",
    "freeze.num_stages",
    "optim.lr",
    "optim.weight_decay",
    "val_acc",
    "val_loss",
    "epoch",
    "trainable_params",
    "seconds",
    "state",
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; width: 100% }
td, th { border-bottom: 1px solid #ddd; padding: .3rem .5rem; text-align: left }
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
        "trained"
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
{summary["compute_seconds"]:.0f} s.</p>
<h2>Validation accuracy by epoch</h2>
{_curves(records[:MAX_CURVES])}
<h2>Leaderboard</h2>
{_table(rows)}
</html>
"""


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    body = "\n".join(
        f'<tr class="{"best" if row["rank"] == 1 else ""}">'
        + "".join(f"<td>{escape(_cell(row[column]))}</td>" for column in COLUMNS)
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _curves(records: Sequence[TrialRecord]) -> str:
    """val_acc over epochs, one line for each of the best trials."""
    drawn = [record for record in records if record.epochs]
    if not drawn:
        return "<p>None.</p>"
    width, height, margin = 900, 300, 40
    last = max(record.epochs[-1].epoch for record in drawn)
    lowest = min(report.val_acc for record in drawn for report in record.epochs)
    highest = max(report.val_acc for record in drawn for report in record.epochs)
    span = (highest - lowest) or 1.0
    lines = []
    for number, record in enumerate(drawn):
        points = " ".join(
            f"{margin + (width - 2 * margin) * report.epoch / last:.1f},"
            f"{height - margin - (height - 2 * margin) * (report.val_acc - lowest) / span:.1f}"
            for report in record.epochs
        )
        colour = COLOURS[number % len(COLOURS)]
        title = escape(f"{record.trial_id} {record.config.backbone.name} {record.config.freeze}")
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" '
            f'marker-mid="url(#dot)" marker-end="url(#dot)"><title>{title}</title></polyline>'
        )
    return (
        f'<svg viewBox="0 0 {width} {height}"><defs><marker id="dot" markerWidth="6" '
        'markerHeight="6" refX="3" refY="3"><circle cx="3" cy="3" r="2" fill="#444"/></marker>'
        f"</defs>{''.join(lines)}"
        f'<text x="4" y="{margin}" font-size="12">{highest:.3f}</text>'
        f'<text x="4" y="{height - margin}" font-size="12">{lowest:.3f}</text>'
        f'<text x="{width - margin}" y="{height - 8}" font-size="12">epoch {last}</text></svg>'
    )
