"""A backbone in two parts: a prefix that nothing trains in, and the suffix that takes its outputs.

By graph, not by family: torch.fx follows the forward pass through the modules that span several
stages, and takes each module within one stage as a whole. Such a module keeps its own way of
training and evaluating, and both parts are made of the backbone's own modules and parameters.
"""

import hashlib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tlrunner.model.stages import Stages, module_spans

Spans = Mapping[str, tuple[int, ...]]  # module -> the stages it reaches into
WHOLE = "backbone"


class SplitError(Exception):
    """A backbone cannot be split; the message says why."""


@dataclass(frozen=True)
class Split:
    """The two parts of a backbone.

    Attributes:
        prefix: images (B, 3, S, S) -> the values that cross, tensors of shape (B, ...); to be run
            in eval mode, without gradients.
        suffix: these values -> features, as the backbone gives them.
        trace: the whole, whose nodes are named in `inside`, those of the prefix, and in `crossing`.
    """

    prefix: fx.GraphModule
    suffix: fx.GraphModule
    trace: fx.GraphModule
    inside: frozenset[str]
    crossing: tuple[str, ...]


def split(
    backbone: nn.Module, stages: Stages, frozen: Collection[int], example_BCHW: Tensor
) -> Split:
    """Split a backbone above everything that depends on frozen stages alone.

    Args:
        frozen: numbers of the stages in which nothing trains, counted from the stem.
        example_BCHW: some images, more than one; the parts are compared on them with the whole.

    Raises:
        SplitError: the backbone cannot be followed, or something else than tensors with the images
            as their first dimension would cross.
    """
    with _evaluating(backbone):
        spans: Spans = module_spans(backbone, stages)
        try:
            trace = _traced(backbone, spans)
            values = _values_of_nodes(trace, example_BCHW)
        except SplitError:
            if len(set(frozen)) < len(stages.names):
                raise
            trace, spans = _as_one(backbone, spans)  # nothing in it has to be told apart
            values = _values_of_nodes(trace, example_BCHW)
        inside = _frozen_nodes(trace.graph, spans, stages, frozen)
        crossing = _crossing(trace.graph, inside, values, len(example_BCHW))
        output = next(node for node in trace.graph.nodes if node.op == "output")
        images = [node for node in trace.graph.nodes if node.op == "placeholder"]
        prefix = _part(trace, images, tuple(crossing), frozenset(), values)
        suffix = _part(trace, crossing, output.args[0], frozenset(inside), values)
        found = Split(
            prefix,
            suffix,
            trace,
            frozenset(node.name for node in inside),
            tuple(node.name for node in crossing),
        )
        _compare(found, backbone, example_BCHW)
    return found


def between(shallower: Split, deeper: Split, example_BCHW: Tensor) -> fx.GraphModule:
    """What leads from the values at one cut to those at another above it, of the same backbone.

    The module takes the values of the shallower cut and gives those of the deeper one.
    """
    trace = deeper.trace
    by_name = {node.name: node for node in trace.graph.nodes}
    entries = [by_name[name] for name in shallower.crossing]
    outputs = tuple(by_name[name] for name in deeper.crossing)
    closed = frozenset(by_name[name] for name in shallower.inside)
    with _evaluating(trace):
        values = _values_of_nodes(trace, example_BCHW)
        return _part(trace, entries, outputs, closed, values)


def fingerprint(prefix: fx.GraphModule) -> str:
    """SHA-256 of what a prefix computes: its graph, its modules, and every number in them."""
    digest = hashlib.sha256()
    for node in prefix.graph.nodes:
        digest.update(f"{node.op} {node.target} {node.args} {node.kwargs}\n".encode())
        if node.op == "call_module":
            module = prefix.get_submodule(str(node.target))
            digest.update(f"{type(module).__qualname__} {module!r}\n".encode())
            for name, tensor in module.state_dict().items():
                digest.update(name.encode())
                digest.update(_bytes_of(tensor))
        elif node.op == "get_attr":
            digest.update(_bytes_of(_attribute(prefix, str(node.target))))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def _attribute(module: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


# -- Following the forward pass ------------------------------------------------------------------


class _StageTracer(fx.Tracer):
    """Takes a module that lies within one stage as a whole."""

    def __init__(self, spans: Spans) -> None:
        super().__init__()
        self.spans = spans

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        within_one = len(self.spans[module_qualified_name]) == 1
        return within_one or super().is_leaf_module(m, module_qualified_name)


@contextmanager
def _evaluating(backbone: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside this block; afterwards each module is in its mode again."""
    modes = {module: module.training for module in backbone.modules()}
    try:
        with torch.no_grad():
            backbone.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _traced(backbone: nn.Module, spans: Spans) -> fx.GraphModule:
    """The graph of the layers between and around stages, the same in training and evaluation."""
    _, *others = inspect.signature(backbone.forward).parameters.values()
    fixed = {other.name: other.default for other in others}
    graphs = []
    for mode in (True, False):
        backbone.train(mode)
        try:
            graphs.append(_of_images(_StageTracer(spans).trace(backbone, fixed or None)))
        except Exception as err:  # whatever a model's code does with what only stands for tensors
            raise SplitError(f"its forward pass cannot be traced: {_reason(err)}") from err
    if str(graphs[0]) != str(graphs[1]):
        raise SplitError("its layers around stages differ between training and evaluation")
    return fx.GraphModule(backbone, graphs[1])


def _of_images(graph: fx.Graph) -> fx.Graph:
    """Without the options that a forward pass has beside the images; they have their defaults."""
    _, *options = [node for node in graph.nodes if node.op == "placeholder"]
    checks = set(options)  # and what checks that they are what they were traced with
    for node in graph.nodes:
        if any(source in checks for source in node.all_input_nodes):
            checks.add(node)
    for node in reversed(list(graph.nodes)):
        if node in checks:
            graph.erase_node(node)
    return graph


def _as_one(backbone: nn.Module, spans: Spans) -> tuple[fx.GraphModule, Spans]:
    """The graph of a backbone as one module, which spans all stages."""
    whole = nn.ModuleDict({WHOLE: backbone})
    graph = fx.Graph()
    graph.output(graph.call_module(WHOLE, (graph.placeholder("images_BCHW"),)))
    return fx.GraphModule(whole, graph), {WHOLE: spans[""]}


def _values_of_nodes(trace: fx.GraphModule, example_BCHW: Tensor) -> dict[fx.Node, Any]:
    interpreter = fx.Interpreter(trace, garbage_collect_values=False)
    try:
        interpreter.run(example_BCHW)
    except Exception as err:  # stages that change the lists they are given, for one
        raise SplitError(f"its graph cannot be run: {_reason(err)}") from err
    return dict(interpreter.env)


def _reason(err: Exception) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:200]


def _frozen_nodes(
    graph: fx.Graph,
    spans: Spans,
    stages: Stages,
    frozen: Collection[int],
) -> set[fx.Node]:
    """The nodes that depend on the images, and besides on frozen stages alone."""
    still: set[fx.Node] = set()  # nothing that trains is behind them
    seeing: set[fx.Node] = set()  # they depend on the images
    for node in graph.nodes:
        if node.op == "output":
            continue
        if node.op == "call_module":
            is_own = set(spans[str(node.target)]) <= set(frozen)
        elif node.op == "get_attr":
            is_own = stages.of_parameter.get(str(node.target), min(frozen)) in frozen
        else:
            is_own = True
        if is_own and all(source in still for source in node.all_input_nodes):
            still.add(node)
        if node.op == "placeholder" or any(n in seeing for n in node.all_input_nodes):
            seeing.add(node)
    return still & seeing


def _crossing(
    graph: fx.Graph, inside: set[fx.Node], values: Mapping[fx.Node, Any], num_images: int
) -> list[fx.Node]:
    """The tensors inside that something outside takes, in the order they are computed in."""
    needed = _behind([node for node in graph.nodes if node.op == "output"], inside)
    crossing = [node for node in graph.nodes if node in needed and node in inside]
    for node in crossing:
        value = values[node]
        if isinstance(value, Tensor) and (value.ndim == 0 or len(value) != num_images):
            raise SplitError(f"{node.name} has not the images as its first dimension")
        if not isinstance(value, Tensor | int | float | bool | torch.Size | tuple):
            raise SplitError(f"{node.name}, a {type(value).__name__}, would have to cross")
    return [node for node in crossing if isinstance(values[node], Tensor)]


def _behind(nodes: Sequence[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """The nodes that these depend on, down to the first ones inside."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if node not in inside:
                waiting += node.all_input_nodes
    return found


# -- Putting a part together ---------------------------------------------------------------------


def _part(
    trace: fx.GraphModule,
    entries: Sequence[fx.Node],
    outputs: Any,
    closed: frozenset[fx.Node],
    values: Mapping[fx.Node, Any],
) -> fx.GraphModule:
    """The module that computes `outputs` from `entries`.

    Args:
        closed: nodes that are not to be computed again; numbers among them are taken as they were,
            but for the number of images.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {entry: graph.placeholder(entry.name) for entry in entries}
    num_images = len(values[entries[0]])

    def number(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(number(item) for item in value)
        is_batch = isinstance(value, int) and not isinstance(value, bool) and value == num_images
        return graph.call_method("size", (copies[entries[0]], 0)) if is_batch else value

    def copy(node: fx.Node) -> Any:
        if node not in copies:
            if node in closed:
                copies[node] = number(values[node])
            else:
                copies[node] = graph.node_copy(node, lambda source: copies[source])
        return copies[node]

    wanted: list[fx.Node] = []
    fx.map_arg(outputs, wanted.append)
    behind = _behind(wanted, set(entries) | closed)
    for node in trace.graph.nodes:
        if node in behind:
            copy(node)
    graph.output(fx.map_arg(outputs, lambda node: copies[node]))
    return fx.GraphModule(trace, graph)


def _compare(found: Split, backbone: nn.Module, example_BCHW: Tensor) -> None:
    """A model that changes in place what another layer still reads would differ."""
    for images_BCHW in (example_BCHW, example_BCHW[1:]):  # and any number of images
        whole = backbone(images_BCHW)
        if not torch.equal(whole, found.suffix(*found.prefix(images_BCHW))):
            raise SplitError("its parts do not compute what the whole does")
