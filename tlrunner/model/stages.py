"""Stages: the groups of layers, counted from the stem up, that a freeze strategy speaks of.

Each parameter and each buffer of a backbone is in exactly one stage. That an uncovered parameter is
an error follows big_vision (https://github.com/google-research/big_vision).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import nn


@dataclass(frozen=True)
class Stages:
    """Names of the stages from the stem up, and the stage of each parameter and buffer."""

    names: tuple[str, ...]
    of_parameter: Mapping[str, int]


def tensor_names(backbone: nn.Module) -> list[str]:
    """Names of all parameters and buffers, saved ones or not."""
    named = chain(backbone.named_parameters(), backbone.named_buffers())
    return [name for name, _ in named]


def stages_of(backbone: nn.Module, prefixes: Mapping[str, Sequence[str]]) -> Stages:
    """Stages given as the paths of their modules and parameters.

    Args:
        prefixes: stage name -> dotted paths of what it holds, in order from the stem up.
    """
    owners = [(path, stage) for stage, paths in enumerate(prefixes.values()) for path in paths]
    of_parameter = {}
    for name in tensor_names(backbone):
        stages = [stage for path, stage in owners if f"{name}.".startswith(f"{path}.")]
        assert len(stages) == 1, f"{name} is in {len(stages)} stages, not in one"
        of_parameter[name] = stages[0]
    empty = set(range(len(prefixes))) - set(of_parameter.values())
    assert not empty, f"nothing in the stages {[list(prefixes)[stage] for stage in empty]}"
    return Stages(tuple(prefixes), of_parameter)


def module_spans(backbone: nn.Module, stages: Stages) -> dict[str, tuple[int, ...]]:
    """The stages that each module of a backbone reaches into, by the module's name.

    A module without parameters (dropout, stochastic depth, pooling) belongs to the stage around it,
    or, where its parent spans several, to the stage of the sibling registered before it.
    """
    reached: dict[str, set[int]] = defaultdict(set)
    for name, stage in stages.of_parameter.items():
        parts = name.split(".")[:-1]
        for depth in range(len(parts) + 1):
            reached[".".join(parts[:depth])].add(stage)
    spans: dict[str, tuple[int, ...]] = {}

    def visit(name: str, module: nn.Module, before: int) -> None:
        spans[name] = tuple(sorted(reached[name])) or (before,)
        before = spans[name][0]
        for child_name, child in module._modules.items():
            if child is not None:
                path = f"{name}.{child_name}" if name else child_name
                visit(path, child, before)
                before = spans[path][-1]

    visit("", backbone, 0)
    return spans


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises, whichever library it is from.

    By name, since timm has a dozen norms of its own; a block that merely contains one has
    parameters in its children.
    """
    direct = list(chain(module.parameters(recurse=False), module.buffers(recurse=False)))
    everything = list(chain(module.parameters(), module.buffers()))
    return len(direct) == len(everything) > 0 and "norm" in type(module).__name__.lower()


def norm_parameters(backbone: nn.Module) -> set[str]:
    """Names of the parameters of norm layers."""
    return {
        name
        for name, _ in backbone.named_parameters()
        if is_norm(backbone.get_submodule(name.rpartition(".")[0]))
    }
