"""A population is kept as it is, and nothing else is taken for one."""

import json
from pathlib import Path
from typing import Any

import pytest

from tlrunner.errors import StorageError
from tlrunner.train.place import Place
from tlrunner.tune.members import POPULATION, Member, Members, as_member, kept_members

COPY = {"index": 1, "point": {"optim.lr": 0.02}, "copied": ["0000-abcdef", 3, "00000012-0"]}


def test_a_member_that_became_another_is_found_so(tmp_path: Path) -> None:
    run = Place(tmp_path)
    assert kept_members(run) == []
    members = Members(run, [Member(0, {"optim.lr": 0.1}), Member(1, {"optim.lr": 0.01})])
    copy = as_member({"trial": COPY})
    members.become(copy)
    assert kept_members(run) == [Member(0, {"optim.lr": 0.1}), copy]


@pytest.mark.parametrize(
    "change",
    [
        {"copied": ["../../etc", 3, "00000012-0"]},
        {"copied": ["0000-abcdef", 3, "../../x"]},
        {"copied": ["0000-abcdef", 0, "00000012-0"]},
        {"index": -1},
        {"point": None},
    ],
)
def test_what_is_no_member_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / POPULATION).write_text(json.dumps([{**COPY, **change}]))
    with pytest.raises(StorageError, match=r"population\.json cannot be read"):
        kept_members(Place(tmp_path))
