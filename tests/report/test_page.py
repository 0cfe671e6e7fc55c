import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.report.page import MAX_CURVES, render_page
from tlrunner.report.rundir import RunDir
from tlrunner.report.summary import leaderboard, summarise

WriteTrial = Callable[..., TrialConfig]


class Reader(HTMLParser):
    """Counts the tags of a page and collects its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: RunDir) -> Reader:
    records = run.records()
    summary = summarise(run, records, "ok", wall_seconds=12.0)
    return Reader(render_page(summary, leaderboard(records), records))


@pytest.fixture
def run(tmp_path: Path, write_trial: WriteTrial) -> RunDir:
    run = RunDir(tmp_path / "mine", "")
    write_trial(run.trials / "0000-aaaaaa", [0.25, 0.5])
    write_trial(run.trials / "0001-bbbbbb", [0.75, 0.5])
    write_trial(run.trials / "0002-cccccc", [], "diverged")
    return run


def test_the_page_says_what_won_and_shows_every_trial(run: RunDir) -> None:
    page = page_of(run)
    assert "Best: trial 0001-bbbbbb, val_acc 0.7500 after epoch 1" in page.text
    assert "2 completed, 0 stopped, 1 diverged, 0 failed" in page.text
    assert page.tags["tr"] == 1 + 3
    assert page.tags["polyline"] == 2, "a curve for each trial with an epoch"
    assert page.attributes.count(("class", "best")) == 1


def test_curves_stay_inside_their_frame(run: RunDir) -> None:
    points = [value for name, value in page_of(run).attributes if name == "points"]
    for x, y in (pair.split(",") for line in points for pair in line.split()):
        assert 0 <= float(x) <= 900
        assert 0 <= float(y) <= 300


def test_the_page_needs_no_network(run: RunDir) -> None:
    page = page_of(run)
    assert not page.tags.keys() & {"script", "link", "img", "iframe"}
    addresses = [value or "" for name, value in page.attributes if name in ("src", "href")]
    assert not addresses
    assert not any(re.search(r"https?:|//", value or "") for _, value in page.attributes)


def test_only_so_many_curves_are_drawn(tmp_path: Path, write_trial: WriteTrial) -> None:
    run = RunDir(tmp_path, "")
    for number in range(MAX_CURVES + 3):
        write_trial(run.trials / f"{number:04d}-a", [0.5])
    page = page_of(run)
    assert page.tags["polyline"] == MAX_CURVES
    assert page.tags["tr"] == 1 + MAX_CURVES + 3


@pytest.mark.parametrize("val_accs", [[], [[]], [[0.5]], [[0.5, 0.5]]])
def test_few_and_equal_figures_are_a_page_as_well(
    tmp_path: Path, write_trial: WriteTrial, val_accs: list[list[float]]
) -> None:
    run = RunDir(tmp_path, "")
    for number, accs in enumerate(val_accs):
        write_trial(run.trials / f"{number:04d}-a", accs)
    page = page_of(run)
    assert page.tags["tr"] == 1 + len(val_accs)
    assert page.tags["polyline"] == sum(bool(accs) for accs in val_accs)
    assert "nan" not in page.text.lower()


@given(st.text(alphabet="<>&\"'/ascript=;x", min_size=1, max_size=30))
def test_text_from_outside_never_becomes_markup(
    tmp_path_factory: pytest.TempPathFactory,
    write_trial: WriteTrial,
    tiny_trial: TrialConfig,
    text: str,
) -> None:
    def page(name: str) -> Reader:
        run = RunDir(tmp_path_factory.mktemp("run"), "")
        config = with_values(tiny_trial, {"backbone.name": name})
        write_trial(run.trials / "0000-a", [0.5, 0.6], config=config)
        return page_of(run)

    plain, odd = page("name"), page(text)
    assert odd.tags == plain.tags
    assert [name for name, _ in odd.attributes] == [name for name, _ in plain.attributes]
    assert text in odd.text
