"""A backbone in two parts: a prefix that nothing trains in, and the suffix that takes its outputs.

By graph, not by family: torch.fx follows the forward pass through the modules that span several
stages, and takes each module within one stage as a whole. Such a module keeps its own way of
training and evaluating, and both parts are made of the backbone's own modules and parameters.
"""

import hashlib
import inspect
import operator
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_list

from tlrunner.model.stages import Stages, module_spans
from tlrunner.model.weights import bytes_of

Spans = Mapping[str, tuple[int, ...]]  # module -> the stages it reaches into
Pairs = dict[fx.Node, tuple[Any, Any]]  # its value for the example, and for one image fewer
Nodes = Collection[fx.Node]
PLAIN = int | float | bool | str | None


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

    The suffix follows the backbone's training and, as `Classifier` sets them, its modes: modules
    that reach into a frozen stage only evaluate. It does not follow a move to another device.

    Args:
        frozen: numbers of the stages in which nothing trains, counted from the stem; not none.
        example_BCHW: some images, more than one; the parts are compared on them with the whole.

    Raises:
        SplitError: the backbone cannot be followed, or something else than tensors with the images
            as their first dimension would cross, or nothing is frozen.
    """
    still = set(frozen)
    if not still:
        raise SplitError("nothing in it is frozen")
    with _evaluating(backbone, example_BCHW.device):
        spans: Spans = module_spans(backbone, stages)
        try:
            trace = _traced(backbone, spans, still)
            values = _values_of_nodes(trace, example_BCHW)
        except SplitError:
            if len(still) < len(stages.names):
                raise
            trace, spans = _as_one(backbone, spans)  # nothing in it has to be told apart
            values = _values_of_nodes(trace, example_BCHW)
        for node in trace.graph.nodes:  # and those that this adds
            _unpack(node, values)
        inside = _frozen_nodes(trace.graph, spans, stages, still)
        crossing = _crossing(trace.graph, inside, values, len(example_BCHW))
        output = next(node for node in trace.graph.nodes if node.op == "output")
        images = [node for node in trace.graph.nodes if node.op == "placeholder"]
        prefix = _part(trace, images, tuple(crossing), frozenset(), values)
        suffix = _part(trace, crossing, output.args[0], frozenset(inside), values)
        for images_BCHW in (example_BCHW, example_BCHW[1:]):  # any number of them
            _compare(suffix, prefix(images_BCHW), (backbone(images_BCHW),))
    return Split(prefix, suffix, trace, frozenset(map(str, inside)), tuple(map(str, crossing)))


def between(shallower: Split, deeper: Split, example_BCHW: Tensor) -> fx.GraphModule:
    """The part from the values at one cut to those at another above it, of the same backbone.

    Raises:
        SplitError: the one cut is not below the other.
    """
    trace = deeper.trace
    by_name = {node.name: node for node in trace.graph.nodes}
    entries = [by_name[name] for name in shallower.crossing]
    outputs = tuple(by_name[name] for name in deeper.crossing)
    closed = frozenset(by_name[name] for name in shallower.inside)
    with _evaluating(trace, example_BCHW.device):
        part = _part(trace, entries, outputs, closed, _values_of_nodes(trace, example_BCHW))
        _compare(part, shallower.prefix(example_BCHW), deeper.prefix(example_BCHW))
    return part


def fingerprint(prefix: fx.GraphModule) -> str:
    """SHA-256 of a prefix: graph, modules, every number in them. The same in every process."""
    digest = hashlib.sha256()
    for node in prefix.graph.nodes:
        digest.update(f"{node.format_node()}\n".encode())  # functions by their names
        if node.op == "call_module":
            module = prefix.get_submodule(str(node.target))
            digest.update(_description(module).encode())
            for name, tensor in chain(module.named_parameters(), module.named_buffers()):
                digest.update(name.encode() + bytes_of(tensor))
        elif node.op == "get_attr":
            digest.update(bytes_of(operator.attrgetter(str(node.target))(prefix)))
    return digest.hexdigest()


def _description(module: nn.Module) -> str:
    """What is in a module; also what its repr leaves out, such as a number of heads."""
    lines = [re.sub(r" at 0x[0-9a-f]+", "", repr(module))]
    for name, part in module.named_modules():
        public = {key: value for key, value in vars(part).items() if not key.startswith("_")}
        options = {k: v for k, v in public.items() if k != "training" and _is_plain(v)}
        lines.append(f"{name} {type(part).__module__}.{type(part).__qualname__} {options}")
    return "\n".join(lines)


def _is_plain(value: Any) -> bool:
    is_sequence = isinstance(value, tuple | list)
    return all(map(_is_plain, value)) if is_sequence else isinstance(value, PLAIN)


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
def _evaluating(backbone: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode and no gradients in this block; after it, modes and generators are as before."""
    modes = {module: module.training for module in backbone.modules()}
    try:
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            backbone.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _traced(backbone: nn.Module, spans: Spans, frozen: set[int]) -> fx.GraphModule:
    """The graph of the layers between and around stages, the same in training and evaluation."""
    _, *others = inspect.signature(backbone.forward).parameters.values()
    fixed = {other.name: other.default for other in others}
    training = [  # the others are leaves, whose modes stay their own, or only ever evaluate
        module
        for name, module in backbone.named_modules(remove_duplicate=False)
        if len(spans[name]) > 1 and frozen.isdisjoint(spans[name])
    ]
    graphs = []
    for mode in (True, False):
        for module in training:
            module.training = mode
        with _refusing("its forward pass cannot be traced"):
            graphs.append(_of_images(_StageTracer(spans).trace(backbone, fixed or None)))
    if str(graphs[0]) != str(graphs[1]):
        raise SplitError("its layers around stages differ between training and evaluation")
    return fx.GraphModule(backbone, graphs[1])


def _of_images(graph: fx.Graph) -> fx.Graph:
    """Without the options that a forward pass has beside the images; they have their defaults."""
    _, *options = [node for node in graph.nodes if node.op == "placeholder"]
    checks = set(options)  # and what checks that they are what they were traced with
    for node in graph.nodes:
        if not checks.isdisjoint(node.all_input_nodes):
            checks.add(node)
    for node in reversed(list(graph.nodes)):
        if node in checks:
            graph.erase_node(node)
    return graph


def _as_one(backbone: nn.Module, spans: Spans) -> tuple[fx.GraphModule, Spans]:
    """The graph of a backbone as one module, which spans all stages."""
    whole = nn.ModuleDict({"whole": backbone})
    graph = fx.Graph()
    graph.output(graph.call_module("whole", (graph.placeholder("images_BCHW"),)))
    return fx.GraphModule(whole, graph), {"whole": spans[""]}


class _Interpreter(fx.Interpreter):
    """Gives modules lists that they may change."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        args = tuple(list(arg) if isinstance(arg, immutable_list) else arg for arg in args)
        return args, kwargs


def _values_of_nodes(trace: fx.GraphModule, example_BCHW: Tensor) -> Pairs:
    all_of_them, fewer = [_Interpreter(trace, garbage_collect_values=False) for _ in range(2)]
    with _refusing("its graph cannot be run"):
        all_of_them.run(example_BCHW)
        fewer.run(example_BCHW[1:])
    return {node: (all_of_them.env[node], fewer.env[node]) for node in trace.graph.nodes}


def _unpack(node: fx.Node, values: Pairs) -> None:
    """Have what is in a list or tuple taken one by one, so that its tensors can cross."""
    packed, fewer = values[node]
    users = [user for user in node.users if user.target is not operator.getitem]
    if not users or not isinstance(packed, tuple | list) or _is_plain(packed):
        return
    items: list[fx.Node] = []
    for place in reversed(range(len(packed))):
        with node.graph.inserting_after(node):
            items.insert(0, node.graph.call_function(operator.getitem, (node, place)))
        values[items[0]] = packed[place], fewer[place]
    for user in users:
        user.args = fx.map_arg(user.args, lambda n: items if n is node else n)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever a model's code does with what it was not written for ends in a SplitError."""
    try:
        yield
    except Exception as err:
        first_line = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise SplitError(f"{what}: {first_line[:200]}") from err


def _frozen_nodes(graph: fx.Graph, spans: Spans, stages: Stages, frozen: set[int]) -> set[fx.Node]:
    """The nodes that depend on the images, and besides on frozen stages alone."""
    still: set[fx.Node] = set()  # nothing that trains is behind them
    seeing: set[fx.Node] = set()  # they depend on the images
    for node in graph.nodes:
        within: tuple[int, ...] = ()
        if node.op == "call_module":
            within = spans[str(node.target)]
        elif node.op == "get_attr" and node.target in stages.of_parameter:
            within = (stages.of_parameter[str(node.target)],)
        if frozen.issuperset(within) and still.issuperset(node.all_input_nodes):
            still.add(node)
        if node.op == "placeholder" or not seeing.isdisjoint(node.all_input_nodes):
            seeing.add(node)
    return {node for node in still & seeing if node.op != "output"}


def _crossing(graph: fx.Graph, inside: Nodes, values: Pairs, num_images: int) -> list[fx.Node]:
    """The tensors inside that something outside takes, in the order they are computed in."""
    needed = _behind(graph, [node for node in graph.nodes if node.op == "output"], inside)
    taken = [node for node in graph.nodes if node in needed and node in inside]
    crossing = [node for node in taken if isinstance(values[node][0], Tensor)]
    for node in crossing:
        if [value.shape[:1] for value in values[node]] != [(num_images,), (num_images - 1,)]:
            raise SplitError(f"{node.name} has not the images as its first dimension")
    return crossing


def _behind(graph: fx.Graph, nodes: Nodes, inside: Nodes) -> set[fx.Node]:
    """The nodes that these depend on, down to the first ones inside."""
    found = set(nodes)
    for node in reversed(graph.nodes):
        if node in found and node not in inside:
            found.update(node.all_input_nodes)
    return found


# -- Putting a part together ---------------------------------------------------------------------


def _part(
    trace: fx.GraphModule,
    entries: Sequence[fx.Node],
    outputs: Any,
    closed: frozenset[fx.Node],
    values: Pairs,
) -> fx.GraphModule:
    """The module that computes `outputs` from `entries`.

    Args:
        closed: nodes that are not to be computed again; numbers among them are taken as they were,
            but for those that grow with the number of images.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {entry: graph.placeholder(entry.name) for entry in entries}
    num_images = len(values[entries[0]][0])

    def number(value: Any, fewer: Any) -> Any:
        if not _is_plain(value):
            raise SplitError(f"a {type(value).__name__} would have to cross")
        if isinstance(value, tuple | list):
            items = map(number, value, fewer)
            return list(items) if isinstance(value, list) else tuple(items)
        if value == fewer:
            return value
        if value * (num_images - 1) != fewer * num_images or value % num_images:
            raise SplitError(f"a number that the images change, {value}, would have to cross")
        size = graph.call_method("size", (copies[entries[0]], 0))
        return graph.call_function(operator.mul, (size, value // num_images))

    wanted: list[fx.Node] = []
    fx.map_arg(outputs, wanted.append)
    behind = _behind(trace.graph, wanted, closed.union(entries))
    for node in trace.graph.nodes:
        if node in behind and node in closed and node not in copies:
            copies[node] = number(*values[node])
        elif node in behind and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(outputs, lambda node: copies[node]))
    return fx.GraphModule(trace, graph)


def _compare(part: fx.GraphModule, given: Sequence[Tensor], whole: Sequence[Tensor]) -> None:
    """That a part computes what the whole does, and changes nothing in place that others read."""
    values = [value.clone() for value in given]
    with _refusing("its parts cannot be run"):
        outputs = part(*values)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not all(map(torch.equal, outputs, whole)):
        raise SplitError("its parts do not compute what the whole does")
    if not all(map(torch.equal, values, given)):
        raise SplitError("one of its parts changes the values it is given")
