"""From a YAML or JSON file, flags and `--set key=value` to a validated config, and to its hash.

Every mistake becomes one ConfigError line: the dotted path and value found, the valid set, the
remedy. Called by the jobs (`load`), by the search (`with_values`) and by whoever names a config
(`config_hash`).
"""

import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tlrunner.config import TrialConfig
from tlrunner.errors import ConfigError, nearest
from tlrunner.files import sha256_json
from tlrunner.section import Section

AnySection = TypeVar("AnySection", bound=Section)

MAX_CONFIG_BYTES = 1 << 20
MAX_VALUES = 100_000  # in a config; aliases of YAML can make any number out of a few lines
MAX_DEPTH = 32
MAX_DIGITS = 10_000
MAX_WHOLE = 2**63  # beyond it neither tensors nor Parquet hold a number
OPEN_MAPS = ("search.space",)  # below these, the rest of a dotted path is one key
# Where, with what and how loudly a job runs; a run keeps its identity when it continues elsewhere.
NOT_HASHED: dict[str, Any] = {
    "output": True,
    "log": True,
    "track": True,
    "resources": True,
    "data": {"cache_dir": True, "num_workers": True, "cache_bytes": True},
    "reuse": {"uri": True},
    "train": {"checkpoint_seconds": True, "stall_seconds": True},
    "search": {"max_failures": True},
}
_UNION_MEMBER = re.compile(r"(?<=gpus_per_worker)\.(int|float)$")  # which pydantic names as well

_BOOL = "tag:yaml.org,2002:bool"


class _Yaml(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, 1e-3 is a number, and `on` a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # As written: once `<<` is resolved, a key may rightly be there twice.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        known: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in known:
                    raise yaml.YAMLError(f"key '{key.value}' is given twice")
                known.add((key.tag, key.value))
        return node

    def construct_short_int(self, node: yaml.ScalarNode) -> int:
        # One of 1:59:59:..., to base 60, takes time that grows with the square of its length.
        if len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(f"a number of {len(node.value)} characters")
        return int(self.construct_yaml_int(node))


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Yaml` or another reader of YAML would take for anything but a word."""


# YAML 1.1, which PyYAML reads, takes on, off, yes and no for booleans; YAML 1.2 does not.
_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(
    _BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Yaml.add_constructor("tag:yaml.org,2002:int", _Yaml.construct_short_int)
# It takes 1e-3 for a string as well.
for _class in (_Yaml, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def load(
    config_class: type[AnySection],
    file: str | None = None,
    assignments: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> AnySection:
    """The config of a job: defaults, then the file, then flags, then `--set` assignments.

    A key that is set is searched no more: it leaves the search space, and points.

    Args:
        file: YAML, or JSON where the name ends in .json.
        assignments: `dotted.key=value`, with the value in YAML.
        flags: dotted key -> value; None values are left out.
    """
    tree = _read_tree(file) if file else {}
    for key, value in (flags or {}).items():
        if value is not None:
            _assign(tree, key, value)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"--set {assignment}", "--set dotted.key=value")
        _assign(tree, key.strip(), _parse(text, f"--set {key}"))
        _fix(tree, key.strip())
    _check_plain(tree, "", iter(range(MAX_VALUES)))
    return validate(config_class, tree)


def validate(config_class: type[AnySection], tree: Mapping[str, Any]) -> AnySection:
    """A config from a tree of plain values; the first mistake is raised as a ConfigError."""
    try:
        return config_class.model_validate(tree)
    except ValidationError as err:
        raise _explain(config_class, err.errors()) from None


def as_yaml(config: BaseModel) -> str:
    """YAML that `load` takes for an equal config."""
    text: str = yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)
    return text


def shown(value: Any, width: int = 120) -> str:
    """A value as messages show it: no longer than can be read."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    short.maxdict = 20
    text = short.repr(value)
    return text if len(text) <= width else f"{text[:width]}..."


def with_values(config: TrialConfig, values: Mapping[str, Any]) -> TrialConfig:
    """`config` with some dotted keys set to other values, validated as a whole.

    Where a value selects another variant (`freeze.strategy`), the keys that only the former
    variant used give way to the defaults of the new one.
    """
    tree = config.model_dump(include=set(TrialConfig.model_fields))
    for key, value in values.items():
        section, _, field = key.partition(".")
        uses = getattr(config, section).variants.get(field, {}) if field else {}
        if uses and isinstance(value, str):
            former = uses[tree[section][field]].keys()
            tree[section].update(dict.fromkeys(former - uses.get(value, {}).keys()))
    for key, value in values.items():
        _assign(tree, key, value)
    return validate(TrialConfig, tree)


def get_value(config: BaseModel, key: str) -> Any:
    """The value at a dotted key.

    Raises:
        ConfigError: there is no such key.
    """
    value: Any = config
    for name in key.split("."):
        fields = type(value).model_fields if isinstance(value, BaseModel) else {}
        if name not in fields:
            raise _unknown_key(key, name, fields)
        value = getattr(value, name)
    return value


def config_hash(config: BaseModel) -> str:
    """12 hex digits that name a config, whatever the run is called and wherever it is written."""
    return sha256_json(config.model_dump(mode="json", exclude=NOT_HASHED))[:12]


def _read_tree(file: str) -> dict[str, Any]:
    path = Path(file)
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"--config {file} has {path.stat().st_size} bytes", "at most 1 MiB")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        reason = getattr(err, "strerror", None) or err
        raise ConfigError(f"--config {file}: {reason}", "a YAML or JSON file") from err
    tree = _parse(text, f"--config {file}", is_json=path.suffix == ".json")
    if not isinstance(tree, dict | None):
        raise ConfigError(f"--config {file} holds a {type(tree).__name__}", "a map of sections")
    return tree or {}


def _parse(text: str, origin: str, is_json: bool = False) -> Any:
    try:
        if is_json:
            return json.loads(text, object_pairs_hook=_each_key_once)
        return yaml.load(text, Loader=_Yaml)
    except RecursionError as err:
        raise ConfigError(f"{origin} does not parse: it is nested too deeply") from err
    except (yaml.YAMLError, ValueError) as err:
        raise ConfigError(f"{origin} does not parse: {' '.join(str(err).split())}") from err
    except (TypeError, LookupError, AttributeError, ArithmeticError) as err:
        # Out of PyYAML's constructors, of `!!bool maybe` and the like.
        raise ConfigError(f"{origin} does not parse: a value that does not fit its tag") from err


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"key '{key}' is given twice")
        tree[key] = value
    return tree


def _check_plain(tree: Any, path: str, left: Iterator[int], depth: int = 0) -> None:
    """Check that a tree is what any reader of YAML or JSON understands alike.

    Args:
        path: dotted keys that lead to it.
        left: yields once for each value that may yet come.

    Raises:
        ConfigError: it is not, or it is beyond all measure.
    """
    if next(left, None) is None or depth > MAX_DEPTH:
        raise ConfigError(
            f"{path} is one value too many",
            f"at most {MAX_VALUES} values in a config, nested at most {MAX_DEPTH} deep",
        )
    if isinstance(tree, dict):
        for key, value in tree.items():
            _check_key(path, key)
            _check_plain(value, f"{path}.{key}" if path else key, left, depth + 1)
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            _check_plain(value, f"{path}.{number}", left, depth + 1)
    else:
        _check_scalar(path or "config", tree)


def _check_key(path: str, key: Any) -> None:
    where = path or "config"
    if not isinstance(key, str):
        raise ConfigError(
            f"{where} has the key {shown(key)}", "keys that are words", "put it in quotes"
        )
    _check_word(where, key)


def _check_scalar(path: str, value: Any) -> None:
    if isinstance(value, str):
        _check_word(path, value)
    elif isinstance(value, int) and abs(value) >= MAX_WHOLE:
        raise ConfigError(
            f"{path} is a whole number of {value.bit_length()} bits", "less than 2**63"
        )
    elif not isinstance(value, bool | int | float | None):
        raise ConfigError(
            f"{path} is {shown(value)}, a {type(value).__name__}",
            "maps, lists, words, numbers, true, false, null",
            "put a word in quotes",
        )


def _check_word(path: str, word: str) -> None:
    if "\0" in word or (not word.isascii() and any("\ud800" <= c <= "\udfff" for c in word)):
        raise ConfigError(f"{path} has {shown(word)}", "whole characters, none of them NUL")


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    open_map = next((name for name in OPEN_MAPS if key.startswith(f"{name}.")), None)
    *parents, last = (
        [*open_map.split("."), key.removeprefix(f"{open_map}.")] if open_map else key.split(".")
    )
    for name in parents:
        inner = tree.setdefault(name, {})
        if not isinstance(inner, dict):
            inner = tree[name] = {}
        tree = inner
    tree[last] = value


def _fix(tree: dict[str, Any], key: str) -> None:
    search = tree.get("search")
    if not isinstance(search, dict):
        return
    points = search.get("points")
    for searched in [search.get("space"), *(points if isinstance(points, list) else [])]:
        if isinstance(searched, dict):
            searched.pop(key, None)


def _explain(config_class: type[Section], errors: list[ErrorDetails]) -> ConfigError:
    """The first of pydantic's errors in the project's words."""
    error, others = errors[0], len(errors) - 1
    location = error["loc"]
    path = ".".join(str(part) for part in location) or "config"
    more = f"{others} more like this" if others else ""
    if error["type"] == "extra_forbidden":
        return _unknown_key(path, str(location[-1]), _fields_at(config_class, location[:-1]))
    if error["type"] == "value_error":
        text = error["msg"].removeprefix("Value error, ")
        return ConfigError(f"{path}: {text}" if location else text, "", more)
    if error["type"] == "missing":
        return ConfigError(f"{path} is missing", "", more)
    if error["type"] == "model_type":
        valid = f"a map with keys of: {', '.join(_fields_at(config_class, location))}"
    else:
        message = error["msg"].removeprefix("Input should be ")
        valid = str(error.get("ctx", {}).get("expected", message)).replace("'", "")
        valid = {"a valid tuple": "a list", "a valid dictionary": "a map"}.get(valid, valid)
    path = _UNION_MEMBER.sub("", path)
    return ConfigError(f"{path} is {shown(error['input'])}", valid, more)


def _unknown_key(path: str, name: str, fields: Mapping[str, Any]) -> ConfigError:
    remedy = nearest(name[:80], fields)
    return ConfigError(f"unknown key '{path:.160}'", ", ".join(fields) or "no key here", remedy)


def _fields_at(config_class: type[Section], location: tuple[int | str, ...]) -> Mapping[str, Any]:
    """The fields of the section at a location of an error; none where it is no plain section."""
    fields: Mapping[str, Any] = config_class.model_fields
    for part in location:
        if part not in fields:
            continue  # a key of a map or an index of a list: the section is below it
        annotation = fields[str(part)].annotation
        sections = [
            a for a in _flatten(annotation) if isinstance(a, type) and issubclass(a, Section)
        ]
        if not sections:
            return {}
        fields = sections[0].model_fields
    return fields


def _flatten(annotation: Any) -> list[Any]:
    return [annotation, *(leaf for arg in get_args(annotation) for leaf in _flatten(arg))]
