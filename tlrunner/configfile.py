"""From a YAML or JSON file, flags and `--set key=value` to a validated config, and to its hash.

Every mistake becomes one ConfigError line: the dotted path and value found, the valid set, the
remedy. Called by the jobs (`load`), by the search (`with_values`) and by whoever names a config
(`config_hash`).
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tlrunner.config import Section, TrialConfig
from tlrunner.errors import ConfigError, nearest
from tlrunner.files import sha256_json

AnySection = TypeVar("AnySection", bound=Section)

MAX_CONFIG_BYTES = 1 << 20
OPEN_MAPS = ("search.space",)  # below these, the rest of a dotted path is one key
# Where, with what and how loudly a job runs; a run keeps its identity when it continues elsewhere.
NOT_HASHED: dict[str, Any] = {
    "output": True,
    "log": True,
    "track": True,
    "resources": True,
    "data": {"cache_dir": True, "num_workers": True, "cache_bytes": True},
}


_BOOL = "tag:yaml.org,2002:bool"


class _Yaml(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, 1e-3 is a number, and `on` a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key '{key}' is given twice")
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, takes on, off, yes and no for booleans; YAML 1.2 does not.
_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(
    _BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# It takes 1e-3 for a string as well.
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load(
    config_class: type[AnySection],
    file: str | None = None,
    assignments: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> AnySection:
    """The config of a job: defaults, then the file, then flags, then `--set` assignments.

    A key that is set is searched no more: it leaves the search space.

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
    return validate(config_class, tree)


def validate(config_class: type[AnySection], tree: Mapping[str, Any]) -> AnySection:
    """A config from a tree of plain values; the first mistake is raised as a ConfigError."""
    try:
        return config_class.model_validate(tree)
    except ValidationError as err:
        raise _explain(config_class, err.errors()) from None


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
        return json.loads(text) if is_json else yaml.load(text, Loader=_Yaml)
    except (yaml.YAMLError, ValueError, RecursionError) as err:
        reason = " ".join(str(err).split()) or "nested too deeply"
        raise ConfigError(f"{origin} does not parse: {reason}") from err


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
    space = search.get("space") if isinstance(search, dict) else None
    if isinstance(space, dict):
        space.pop(key, None)


def _explain(config_class: type[Section], errors: list[ErrorDetails]) -> ConfigError:
    """The first of pydantic's errors in the project's words."""
    error, others = errors[0], len(errors) - 1
    path = ".".join(str(part) for part in error["loc"]) or "config"
    more = f"{others} more like this" if others else ""
    if error["type"] == "extra_forbidden":
        return _unknown_key(
            path, str(error["loc"][-1]), _fields_at(config_class, error["loc"][:-1])
        )
    if error["type"] == "value_error":
        text = error["msg"].removeprefix("Value error, ")
        return ConfigError(f"{path}: {text}" if error["loc"] else text, "", more)
    valid = str(error.get("ctx", {}).get("expected", error["msg"].removeprefix("Input should be ")))
    return ConfigError(f"{path} is {error['input']!r:.80}", valid.replace("'", ""), more)


def _unknown_key(path: str, name: str, fields: Mapping[str, Any]) -> ConfigError:
    remedy = nearest(name, fields)
    return ConfigError(f"unknown key '{path}'", ", ".join(fields) or "no key here", remedy)


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
