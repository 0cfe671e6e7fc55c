"""What the jobs print, for a terminal and for a log alike."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress

from tlrunner.report.page import over_seeds


@contextmanager
def preparing(out: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar that appears with the first image written; a log gets a line at the end instead."""
    with Progress(console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("preparing images", total=None, visible=False)
        last = (0, 0)

        def progress(done: int, total: int) -> None:
            nonlocal last
            last = done, total
            bar.update(task, completed=done, total=total, visible=True)

        yield progress
    if last[1]:
        out.print(f"prepared {last[0]} of {last[1]} images", highlight=False)


def show_summary(summary: dict[str, Any], where: str, out: Console) -> None:
    """The few lines with which a run ends."""
    states = ", ".join(f"{number} {state}" for state, number in summary["trials"].items() if number)
    out.print(f"{summary['status']}: {states}; {summary['wall_seconds']:.0f} s", highlight=False)
    best = summary["best"]
    if best is None:
        out.print(f"no trial is usable; see {where}/leaderboard.csv", soft_wrap=True)
        return
    config = best["config"]
    out.print(
        f"best: {config['backbone']['name']}, {config['freeze']['strategy']}, "
        f"lr {config['optim']['lr']:.2e}: val_acc {best['val_acc']:.4f} after epoch "
        f"{best['epoch']} (trial {best['trial_id']}){over_seeds(best)}",
        highlight=False,
        soft_wrap=True,
    )
    out.print(f"model: {where}/best", highlight=False, soft_wrap=True)
    out.print(f"report: {where}/report.html", highlight=False, soft_wrap=True)
