"""Who the members of a population are now: `population.json` in the run's directory.

A member that gives way to a copy of another keeps its number, and is another trial from then on.
The file is written before the former trial is ended, so whenever the run is broken off, it goes on
with as many members.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from tlrunner.files import write_json
from tlrunner.jobconfig import JobConfig
from tlrunner.train.checkpoint import COMMIT, NAME_PATTERN, TRAINING_STATE
from tlrunner.train.place import CHECKPOINTS, Place
from tlrunner.train.trial_dir import TrialDir
from tlrunner.tune.space import TRIAL_ID, PlannedTrial, Point, trial_at

POPULATION = "population.json"


@dataclass(frozen=True)
class Member:
    """What Ray's values of a trial say.

    `copied`: the trial, its epochs and the checkpoint behind them that it goes on from.
    """

    index: Annotated[int, Field(ge=0)]
    point: Point
    copied: (
        tuple[
            Annotated[str, Field(pattern=TRIAL_ID)],
            Annotated[int, Field(ge=1)],
            Annotated[str, Field(pattern=NAME_PATTERN)],
        ]
        | None
    ) = None

    def planned(self, job: JobConfig) -> PlannedTrial:
        """The trial that a member is now."""
        return trial_at(job, self.index, self.point, self.copied[:2] if self.copied else None)


class Members:
    """The members of a population, kept as they are."""

    def __init__(self, run: Place, members: Iterable[Member]) -> None:
        """`members`: those that go on; others that are kept already stay as they are."""
        self.run = run
        self.by_index = {member.index: member for member in [*kept_members(run), *members]}
        self._save()

    def become(self, member: Member) -> None:
        """The member of that number is another trial now."""
        self.by_index[member.index] = member
        self._save()

    def _save(self) -> None:
        self.run.checked_fence()
        path = self.run.path / POPULATION
        write_json(path, [asdict(member) for _, member in sorted(self.by_index.items())])
        self.run.save(path)


def kept_members(run: Place) -> list[Member]:
    """The members of a run that is continued; none if it has not begun.

    Raises:
        StorageError: the file is not what is written here.
    """
    return run.read(list[Member], POPULATION) or []


def able(job: JobConfig, trials: Place, members: Iterable[Member]) -> list[Member]:
    """Members, of whom those begin anew that have nothing left to go on from.

    A copy that failed, or was lost, before it had a checkpoint is begun once more; its donor may
    have ended since, or have come too far to keep what was copied.
    """
    return [m if _can_go_on(job, trials, m) else replace(m, copied=None) for m in members]


def _can_go_on(job: JobConfig, trials: Place, member: Member) -> bool:
    if member.copied is None:
        return True
    own = TrialDir(trials.below(member.planned(job).trial_id))
    if own.has_begun and own.read().state != "interrupted":
        return True
    donor, _, name = member.copied
    donated = trials.below(donor).below(CHECKPOINTS).below(name).store
    kept = own.place.below(CHECKPOINTS).store.list()
    return donated.size(TRAINING_STATE) is not None or any(
        entry.name.endswith(f"/{COMMIT}") for entry in kept
    )


def epochs_behind(job: JobConfig, trials: Place, member: Member) -> int:
    """How far a member has come."""
    directory = TrialDir(trials.below(member.planned(job).trial_id))
    epochs = directory.read().epochs if directory.has_begun else ()
    if epochs:
        return epochs[-1].epoch
    return member.copied[1] if member.copied else 0


def as_member(values: dict[str, Any]) -> Member:
    """The member that Ray's values stand for."""
    trial = values["trial"]
    copied = trial.get("copied")
    return Member(trial["index"], trial["point"], tuple(copied) if copied else None)
