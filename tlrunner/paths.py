"""Places in a config made absolute: trials run in directories of their own."""

from typing import TypeVar

from tlrunner.config import TrialConfig
from tlrunner.searchconfig import SearchConfig
from tlrunner.uris import absolute, is_weights_file, local_path

AnyTrial = TypeVar("AnyTrial", bound=TrialConfig)


def with_absolute_paths(job: AnyTrial) -> AnyTrial:
    """Trials run in directories of their own, so relative paths are settled here."""
    weights = job.backbone.weights
    settled: dict[str, str | None] = {}
    if is_weights_file(weights):
        settled["weights"] = absolute(weights)
    data = job.data.model_copy(
        update={
            "uri": absolute(job.data.uri),
            "cache_dir": str(local_path(job.data.cache_dir)),
        }
    )
    staged, shared = job.backbone.weights_uri, job.reuse.uri
    settled["weights_uri"] = staged and absolute(staged)
    backbone = job.backbone.model_copy(update=settled)
    reuse = job.reuse.model_copy(update={"uri": shared and absolute(shared)})
    return job.model_copy(update={"data": data, "backbone": backbone, "reuse": reuse})


def with_absolute_weights(search: SearchConfig) -> SearchConfig:
    """Likewise for the files among the weights that are searched, and an earlier run."""
    if search.warm_start:
        search = search.model_copy(update={"warm_start": absolute(search.warm_start)})
    space = dict(search.space)
    if "backbone.weights" in space:
        space["backbone.weights"] = tuple(
            entry.model_copy(
                update={
                    entry.kind: tuple(
                        absolute(w) if is_weights_file(w) else w for w in entry.values
                    )
                }
            )
            for entry in space["backbone.weights"]
        )
    return search.model_copy(update={"space": space})
