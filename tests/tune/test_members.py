"""A population is kept as it is, and nothing else is taken for one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tlrunner.configfile import validate
from tlrunner.errors import StorageError
from tlrunner.jobconfig import JobConfig
from tlrunner.train.place import Place
from tlrunner.train.trial_dir import TrialDir
from tlrunner.tune.members import POPULATION, Member, Members, able, as_member, kept_members

COPY = {"index": 1, "point": {"optim.lr": 0.02}, "copied": ["0000-abcdef", 3, "00000012-0"]}


def test_a_member_that_became_another_is_found_so(tmp_path: Path) -> None:
    run = Place(tmp_path)
    assert kept_members(run) == []
    members = Members(run, [Member(0, {"optim.lr": 0.1}), Member(1, {"optim.lr": 0.01})])
    copy = as_member({"trial": COPY})
    members.become(copy)
    assert kept_members(run) == [Member(0, {"optim.lr": 0.1}), copy]


def checkpoint_of(trials: Place, trial_id: str, name: str) -> None:
    directory = trials.path / trial_id / "checkpoints" / name
    directory.mkdir(parents=True)
    (directory / "state.safetensors").touch()
    (directory / "COMMIT.json").touch()


def test_a_copy_with_nothing_left_to_go_on_from_begins_anew(
    tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    space = {"optim.lr": {"uniform": [0.01, 0.1]}}
    job = validate(JobConfig, {**tiny_tree, "search": {"scheduler": "pbt", "space": space}})
    trials = Place(tmp_path)
    first, copy = Member(0, {"optim.lr": 0.1}), as_member({"trial": COPY})
    assert able(job, trials, [first, copy]) == [first, Member(1, {"optim.lr": 0.02})]
    own = TrialDir(trials.below(copy.planned(job).trial_id))
    own.begin(copy.planned(job).config)
    assert able(job, trials, [copy]) != [copy]
    checkpoint_of(trials, own.path.name, "00000015-0")
    assert able(job, trials, [copy]) == [copy]
    shutil.rmtree(own.checkpoints)
    own.end("completed")
    assert able(job, trials, [copy]) == [copy], "it ended"
    shutil.rmtree(own.path)
    checkpoint_of(trials, "0000-abcdef", "00000012-0")
    assert able(job, trials, [copy]) == [copy]


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
