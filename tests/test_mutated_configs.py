"""Whatever becomes of a config, a search of it is planned as it says, or refused in one line."""

import copy
import datetime
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from tlrunner import run
from tlrunner.cli import run_job
from tlrunner.config import BackboneConfig, TrialConfig
from tlrunner.configfile import as_yaml, config_hash, load, validate
from tlrunner.data.sources import open_source
from tlrunner.errors import ConfigError
from tlrunner.jobconfig import JobConfig
from tlrunner.model.classifier import BackboneInfo, describe
from tlrunner.searchconfig import DISTRIBUTION_KINDS
from tlrunner.section import Section
from tlrunner.tune import plan
from tlrunner.tune.estimate import Cost
from tlrunner.tune.reuse_plan import ReusePlan
from tlrunner.tune.space import build_point, iter_points

Tree = dict[Any, Any]

# -- Valid searches --------------------------------------------------------------------------------

# Paths are relative to where the tests below run.
TINY: Tree = {
    "data": {"uri": "images", "cache_dir": "cache", "image_size": 32, "val_fraction": 0.25},
    "backbone": {"name": "squeezenet1_1", "weights": "none"},
    "freeze": {"strategy": "full"},
    "train": {"epochs": 4, "batch_size": 8},
    "resources": {"gpus_per_worker": 0},
}
FLOWERS: Tree = yaml.safe_load(
    (Path(__file__).parents[1] / "jobs" / "tune_flowers.yaml").read_text()
)
LR = {"optim.lr": {"loguniform": [0.001, 0.1]}}
CONDITIONAL: Tree = {
    "freeze.num_stages": {"randint": [1, 3], "when": {"freeze.strategy": "last_stages"}},
    "freeze.strategy": {"choice": ["head", "last_stages", "full"]},
    "optim.lr": [
        {"loguniform": [0.001, 0.1], "when": {"freeze.strategy": "head"}},
        {"loguniform": [0.00001, 0.0001]},
    ],
    "optim.layer_decay": {
        "uniform": [0.5, 0.9],
        "when": {"freeze.strategy": ["last_stages", "full"]},
    },
    "head.hidden_sizes": {"choice": [[8], [8, 4]], "when": {"head.kind": "mlp"}},
    "head.kind": {"choice": ["linear", "mlp"]},
}
GRID: Tree = {
    "train.batch_size": {"grid": [4, 8]},
    "optim.optimizer": {"grid": ["sgd", "adamw"]},
    "optim.momentum": {"grid": [0.5, 0.9], "when": {"optim.optimizer": "sgd"}},
}


def searching(**search: Any) -> Tree:
    return {**TINY, "search": {"space": LR, **search}}


VALID: dict[str, Tree] = {
    "nothing searched": TINY,
    "flowers": FLOWERS,
    "every section": {
        **TINY,
        "head": {"kind": "mlp", "hidden_sizes": [8, 4], "dropout": 0.1, "pooling": "max"},
        "optim": {"optimizer": "sgd", "momentum": 0.8, "schedule": "step", "step_epochs": 2},
        "augment": {"crop_scale": [0.5, 1.0], "mixup": 0.2, "num_views": 3},
        "output": {"uri": "runs", "name": "first"},
        "log": {"level": "info"},
        "track": {"mlflow_uri": "sqlite:///runs.db", "wandb_project": "flowers"},
        "search": {"space": LR, "algorithm": "tpe", "seed": 3, "max_concurrent_trials": 2},
    },
    "conditions": searching(space=CONDITIONAL, budget={"num_trials": 12}),
    "grid": searching(space=GRID, algorithm="grid"),
    "pareto": searching(algorithm="tpe", trade_off="total_params", budget={"cpu_hours": 0.5}),
    "asha": searching(scheduler="asha", grace_seconds=9.0, budget={"wall_seconds": 60}),
    "hyperband": searching(scheduler="hyperband", reduction_factor=4, max_epochs=3),
    "median": searching(scheduler="median", grace_epochs=2, budget={"num_trials": 3}),
    "population": searching(scheduler="pbt", budget={"num_trials": 4}, perturbation_epochs=2),
    "repeats": searching(final_repeats=2, final_candidates=2),
    "gpu hours": {
        **searching(budget={"gpu_hours": 1.5}),
        "resources": {"gpus_per_worker": 0.5},
    },
    "workers": {**searching(), "resources": {"workers_per_trial": 2, "gpus_per_worker": 1}},
}

# -- Mutations -------------------------------------------------------------------------------------


SECTIONS = tuple(JobConfig.model_fields)
BACKBONES = ("squeezenet1_1", "efficientnet_lite0", "resnet18", "sqeezenet1_1", "timm/resnet18")


def _nested(depth: int, kind: type) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


HEX = "a number of many digits"  # until the text is made
NUMBERS = (0, 1, 2, 3, 4, 8, 100, 5000, 100_000, 0.0, 0.25, 0.5, 0.99, 1.0, 1.5, 2.0, 90.0)
ODD_NUMBERS = (-1, -0.0, 5e-324, 1e-300, 1e22, 1e308, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400)
NO_NUMBERS = (float("nan"), float("inf"), float("-inf"), True, False, HEX)
WORDS = ("", " ", "0", "1e-3", "-.5", "on", "null", "0x10", "1:30", "<<", "=", "2020-01-01", "a.b")
ODD_WORDS = ("\0", "a\0b", "é", "💥", "\ud800", "a\nb", "\t", "\x1b[31m", "\u2028", "~nobody/x")
PRINTED_WORDS = (":smile:", "[bold]x[/]", "x" * 3000, "many words " * 40, "s3://", "sample:trees")
GARBAGE: tuple[Any, ...] = (
    *(None, [], {}, [[]], {"": {}}, {"a": {"b": [1, {"c": None}]}}, [None, "a", 1.5, {}]),
    *({1: 2}, {None: 1}, {True: 1}, [{"choice": [1]}], {"choice": [{1: 2}]}),
    *(_nested(50, list), _nested(300, list), _nested(300, dict), _nested(450, list)),
    *(datetime.date(2020, 1, 1), b"\xff", {1}),
)
LISTS = ([8], [8, 4], [0.5, 1.0], [1e-300, 1.0], [65536, 65536], [0, 8], [1, 2, 3, 4, 5])
POOLS = (NUMBERS, ODD_NUMBERS, NO_NUMBERS, WORDS, ODD_WORDS, PRINTED_WORDS, GARBAGE, LISTS)
anything = st.sampled_from(POOLS).flatmap(st.sampled_from).map(copy.deepcopy)


def _leaves(section: type[Section], above: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Dotted key of every value in a config, and all values above that it takes by itself."""
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        if inner:
            yield from _leaves(inner[0], f"{above}{name}.")
        elif name != "space":
            listed = [value for kind in kinds for value in get_args(kind)]
            adapter = TypeAdapter(field.rebuild_annotation())
            usual = [*NUMBERS, True, False, None, *LISTS, *listed, *ODD_NUMBERS, *BACKBONES]
            yield f"{above}{name}", [value for value in usual if _takes(adapter, value)]


def _takes(adapter: TypeAdapter[Any], value: Any) -> bool:
    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


GOOD = {
    **dict(_leaves(JobConfig)),
    "backbone.name": [*BACKBONES],
    "data.uri": ["images", "cache"],
    "log.level": ["info"],
}
leaf_keys = st.sampled_from([*GOOD])
TRIAL = TrialConfig.model_fields.keys() - {"data", "resources"}
SEARCHED = [key for key in GOOD if key.partition(".")[0] in TRIAL]
searched_keys = st.sampled_from(SEARCHED)


def values_for(key: str) -> st.SearchStrategy[Any]:
    """Mostly what a key could be."""
    good = st.sampled_from(GOOD.get(key) or NUMBERS).map(copy.deepcopy)
    return st.sampled_from([good] * 9 + [anything]).flatmap(lambda values: values)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) of a tree."""
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


def some_place(draw: st.DrawFn, tree: Tree) -> tuple[Any, Any]:
    places = [*_places(tree)][:300] or [(tree, "data")]
    return places[draw(st.integers(0, len(places) - 1))]


def drop(draw: st.DrawFn, tree: Tree) -> None:
    inside, key = some_place(draw, tree)
    inside.pop(key, None) if isinstance(inside, dict) else inside.pop(key)


def misspell(draw: st.DrawFn, tree: Tree) -> None:
    inside, key = some_place(draw, tree)
    if isinstance(inside, dict) and isinstance(key, str) and key in inside:
        at, letters = draw(st.integers(0, len(key))), draw(st.sampled_from(("", "x", ".", "_")))
        odd = st.sampled_from((*WORDS, *ODD_WORDS, 1, None, key.upper(), f" {key}"))
        inside[draw(st.just(key[:at] + letters + key[at + 1 :]) | odd)] = inside.pop(key)


def replace(draw: st.DrawFn, tree: Tree) -> None:
    inside, key = some_place(draw, tree)
    inside[key] = draw(anything)


def swap(draw: st.DrawFn, tree: Tree) -> None:
    (one, key), (other, place) = some_place(draw, tree), some_place(draw, tree)
    if key in (one if isinstance(one, dict) else range(len(one))) and place in (
        other if isinstance(other, dict) else range(len(other))
    ):
        one[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(one[key])


def wrap(draw: st.DrawFn, tree: Tree) -> None:
    inside, key = some_place(draw, tree)
    value = inside.get(key) if isinstance(inside, dict) else inside[key]
    wrapped = [[value], [value, value], {"a": value}, {key: value}, {"choice": [value]}]
    inside[key] = draw(st.sampled_from(wrapped))


def assign(draw: st.DrawFn, tree: Tree) -> None:
    """Some value that is good by itself, perhaps not beside the others."""
    key = draw(leaf_keys)
    *sections, name = key.split(".")
    for section in sections:
        inner = tree.get(section)
        tree[section] = tree = inner if isinstance(inner, dict) else {}
    tree[name] = draw(values_for(key))


def _distribution(draw: st.DrawFn, key: str, kinds: Sequence[str]) -> Tree:
    made: Tree = {}
    for _ in range(draw(st.sampled_from((*(1,) * 9, 2)))):
        kind = draw(st.sampled_from(kinds))
        made[kind] = draw(st.lists(values_for(key), min_size=1, max_size=3))
        if kind not in ("choice", "grid"):
            bounds = [value for value in GOOD.get(key, ()) if isinstance(value, int | float)]
            bound = st.sampled_from(bounds or [*NUMBERS, *ODD_NUMBERS])
            made[kind] = draw(st.lists(bound, min_size=2, max_size=2))
            made[kind] = sorted(made[kind]) if draw(st.integers(0, 4)) else made[kind]
    if draw(st.sampled_from((False, False, True))):
        odd_keys = st.sampled_from((*SECTIONS, "", "optm.lr", "optim.lr.x"))
        other = draw(st.sampled_from([searched_keys] * 9 + [odd_keys]).flatmap(lambda keys: keys))
        made["when"] = {other: draw(values_for(other) | st.lists(values_for(other), max_size=2))}
    return made


def search_more(draw: st.DrawFn, tree: Tree) -> None:
    """One more key in the space, or one more distribution of a key, perhaps under a condition."""
    search = tree["search"] = tree["search"] if isinstance(tree.get("search"), dict) else {}
    space = search["space"] = search["space"] if isinstance(search.get("space"), dict) else {}
    key = draw(searched_keys | searched_keys | leaf_keys | st.sampled_from([*space, "optim.lr"]))
    fitting = (
        DISTRIBUTION_KINDS[-1:] if search.get("algorithm") == "grid" else DISTRIBUTION_KINDS[:-1]
    )
    kinds = fitting if draw(st.integers(0, 9)) else DISTRIBUTION_KINDS
    made = _distribution(draw, key, kinds)
    before = space.get(key)
    joined = [made, *before] if isinstance(before, list) else [made, before]
    space[key] = joined if before is not None and draw(st.booleans()) else made


MUTATIONS = (drop, misspell, replace, swap, wrap, *(assign, search_more) * 6)
INSERTED = ("\t", ":", ": ", "{", "[", "]", "- ", "&a ", "*a", "<<: ", "? ", "|", ">", "%", "---\n")
TAGS = ("!!int ''", "!!bool maybe", "!!float ''", "!!timestamp x", "!!set {a}", "!!python/none x")
DAMAGE = (*INSERTED, *TAGS, "\0", "\r", "'", '"', "#", "\ufeff", "2020-99-99", f" {HEX} ")


@st.composite
def mutants(draw: st.DrawFn) -> tuple[bytes, str, list[str]]:
    """Content and name of a config file, and further flags."""
    tree = copy.deepcopy(draw(st.sampled_from([*VALID.values()])))
    for mutation in draw(st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=3)):
        mutation(draw, tree)
    as_json = draw(st.booleans())
    text = json.dumps(tree, default=str, skipkeys=True) if as_json else yaml.safe_dump(tree)
    text = text.replace(HEX, "0x" + "f" * 5000)
    for _ in range(draw(st.sampled_from((*(0,) * 10, 1, 2)))):
        at, cut = draw(st.integers(0, len(text))), draw(st.integers(0, 3))
        text = text[:at] + draw(st.sampled_from(DAMAGE)) + text[at + cut :]
    flags = []
    if draw(st.sampled_from((*(False,) * 9, True))):
        word = st.sampled_from((*WORDS, *TAGS, *PRINTED_WORDS)) | st.sampled_from(NUMBERS).map(str)
        value = draw(word)
        flags = ["--set", f"{draw(leaf_keys | st.sampled_from(('', '.', 'search')))}={value}"]
    name = "job.json" if as_json else "job.yaml"
    return text.encode("utf-8", "surrogatepass"), name, flags


# -- What may become of them -----------------------------------------------------------------------

FateOf = Callable[..., int]
KNOWN = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, [*GOOD, *SECTIONS]))})\b")
# Of these, only the value that was found can be named.
ANONYMOUS = (
    "--config ",
    "--set ",
    "unknown key '",
    "config ",
    "'~nobody/x': there is no such home",
)


@pytest.fixture
def fate_of(
    colour_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> FateOf:
    """The exit code of a dry run, once all that was shown of it was found to be as it should.

    It is run beside the images, as if there were two GPUs.
    """
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(colour_folder.parent)
    monkeypatch.setattr(plan, "this_machine", lambda: plan.Machine(cpus=8, gpus=2))
    planned: list[JobConfig] = []

    def show(job: JobConfig, *arguments: Any) -> None:
        planned.append(job)
        plan.show_plan(job, *arguments)

    monkeypatch.setattr(run, "show_plan", show)

    def dry_run(content: bytes, name: str = "job.yaml", flags: Sequence[str] = ()) -> int:
        (tmp_path / name).write_bytes(content)
        argv = ["--config", str(tmp_path / name), "--dry-run", *flags]
        code = run_job("tune", JobConfig, "tlrunner.run:tune", argv=argv)
        out, err = capsys.readouterr()
        if code == 0:
            assert err == ""
            shown, images, _ = out.partition("\nimages: ")
            assert images
            check_round_trip(planned[-1], shown, tmp_path)
        else:
            check_refusal(code, err, content.decode(errors="replace"))
        return code

    return dry_run


def check_refusal(code: int, err: str, content: str) -> None:
    assert code in (64, 65, 69, 73), err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1, err
    assert len(err) < 5000, err
    found = err.removeprefix("tlrunner: ")
    first = re.split(r"[. ]", found)[0]  # of a path that only the file has
    is_named = KNOWN.search(found) or found.startswith(ANONYMOUS) or (first and first in content)
    assert is_named or code in (65, 73), err  # which name the place instead


def check_round_trip(job: JobConfig, shown: str, directory: Path) -> None:
    as_json = json.dumps(job.model_dump(mode="json"), allow_nan=False)
    for name, text in (("shown.yaml", shown), ("shown.json", as_json)):
        (directory / name).write_text(text, encoding="utf-8")
        again = load(JobConfig, str(directory / name))
        assert again == job
        assert config_hash(again) == config_hash(job)


@pytest.fixture
def _free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured."""

    def cost(trials: list[Any], *_: object) -> list[Cost]:
        return [Cost(1.5 + number, 1 << 20) for number, _ in enumerate(trials)]

    monkeypatch.setattr(plan, "estimate_costs", cost)
    monkeypatch.setattr(plan, "plan_reuse", lambda *_: ReusePlan((1, 1), {}, ()))


@pytest.mark.usefixtures("_free")
@pytest.mark.parametrize("num_mutants", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_mutated_config_is_planned_or_refused_in_one_line(
    num_mutants: int, fate_of: FateOf
) -> None:
    fates: Counter[int] = Counter()

    @settings(
        max_examples=num_mutants,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(mutants())
    def each(mutant: tuple[bytes, str, list[str]]) -> None:
        fates[fate_of(*mutant)] += 1

    each()
    assert fates[0] > num_mutants / 10, fates
    assert fates[64] > num_mutants / 10, fates


@pytest.mark.parametrize("name", VALID)
def test_what_is_mutated_is_valid_and_can_be_measured(name: str, fate_of: FateOf) -> None:
    assert fate_of(yaml.safe_dump(VALID[name]).encode()) == 0


# -- What mutants found ----------------------------------------------------------------------------

BOMB = "\n".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(9))
REFUSED = {
    "train: {epochs: !!bool maybe}": "does not parse: a value that does not fit its tag",
    "optim: {lr: !!timestamp {=: 1}}": "does not parse: a value that does not fit its tag",
    "train: {epochs: !!int ''}": "does not parse: a value that does not fit its tag",
    f"optim: {{lr: 1{':00' * 200}.5}}": "does not parse: a value that does not fit its tag",
    "int: 1": "unknown key 'int'; valid: data,",
    "optim: {float: 1}": "unknown key 'optim.float'; valid: optimizer",
    "output: {name: 2020-01-01}": "output.name is datetime.date(2020, 1, 1), a date",
    "search: {space: {optim.lr: {choice: !!set {1, 2}}}}": "space.optim.lr.choice is {1, 2}, a set",
    "search: {space: {train.seed: {choice: [{1: 2}]}}}": "choice.0 has the key 1; valid: keys that",
    'data: {uri: "a\\0b"}': "data.uri has 'a\\x00b'",
    'track: {wandb_project: "\\uD800"}': "track.wandb_project has '\\ud800'",
    f"data: {{limit: 0x{'f' * 5000}}}": "data.limit is a whole number of 20000 bits",
    f"a0: &a0 [1]\n{BOMB}": "is one value too many; valid: at most 100000 values",
    "data: &d {uri: *d}": "is one value too many; valid: at most 100000 values",
    f"optim: {{lr: {'[' * 40}{']' * 40}}}": "nested at most 32 deep",
    "resources: {gpus_per_worker: 1e-320}": "gpus_per_worker is 1e-320, valid: 0, or 0.01 to 1",
    "resources: {gpus_per_worker: many}": "resources.gpus_per_worker is 'many'",
    "optim:": "optim is None; valid: a map with keys of: optimizer, lr",
    f"backbone: {{name: {'x' * 300}}}": "backbone.name is 'xxx",
    "search: {budget: {wall_seconds: 1e308}}": "search.budget.wall_seconds is 1e+308",
    "search: {scheduler: asha, grace_seconds: 1e9}": "search.grace_seconds is 1000000000.0",
    "search: {space: {optim.lr: {uniform: [1]}}}": "optim.lr.0.uniform.1 is missing",
    "head: {hidden_sizes: wide, kind: mlp}": "head.hidden_sizes is 'wide'; valid: a list",
    "search: {space: {optim.lr: []}}": "search.space.optim.lr is []",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_config_that_no_reader_takes_alike_or_no_machine_can_meet_is_refused(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(JobConfig, str(tmp_path / "job.yaml"))
    assert REFUSED[text] in str(caught.value)


SPACES = {
    "optim.lr: {choice: [1], when: {freeze: head}}": "'freeze' is a section",
    "optim.lr: {choice: [1], when: {freeze.strategy: []}}": "freeze.strategy is none of no values",
    "optim.lr: {choice: [1], when: {train.compile: 'on'}}": "train.compile is 'on', which",
    "optim.lr: [{choice: [1]}, {choice: [2]}]": "a distribution without `when` before others",
    "train.epochs: {choice: [5, '6']}": "'train.epochs' can be '6', which train.epochs cannot be",
    "train.epochs: {choice: [5, many]}": "'train.epochs' can be 'many'",
    "train.epochs: {randint: [0, 1000]}": "'train.epochs' can be 0",
    "backbone.weights: {randint: [0, 4]}": "'backbone.weights' is [0, 4], valid: words",
}


@pytest.mark.parametrize("space", SPACES)
def test_a_space_with_a_value_that_cannot_be_is_refused_whether_it_is_drawn_or_not(
    space: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = f"search: {{budget: {{num_trials: 1}}, space: {{{space}}}}}"
    (tmp_path / "job.yaml").write_text(text)
    argv = ["--config", str(tmp_path / "job.yaml"), "--dry-run"]
    assert run_job("tune", JobConfig, "tlrunner.run:tune", argv=argv) == 64
    assert SPACES[space] in capsys.readouterr().err


@pytest.mark.parametrize("key", GOOD)
def test_a_value_of_the_wrong_type_is_refused_by_its_dotted_key(key: str, tmp_path: Path) -> None:
    section, _, name = key.rpartition(".")
    with pytest.raises(ConfigError) as caught:
        load(JobConfig, None, [f"{key}={{a: 1}}"])
    found = caught.value.found
    assert found.startswith((f"{key} is {{'a': 1}}", f"{section}: '{name}' is not used with")), (
        found
    )


def test_a_key_twice_is_refused_in_json_too(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"train": {"epochs": 1, "epochs": 2}}')
    with pytest.raises(ConfigError, match="key 'epochs' is given twice"):
        load(JobConfig, str(tmp_path / "job.json"))


def test_a_key_may_come_from_a_merged_map_and_be_set_anew(tmp_path: Path) -> None:
    text = "head: &some {dropout: 0.25}\ntrain: {epochs: 3}\n"
    text += "search: {space: {train.seed: {<<: {choice: [1]}, choice: [2]}}}\n"
    (tmp_path / "job.yaml").write_text(text)
    space = load(JobConfig, str(tmp_path / "job.yaml")).search.space
    assert space["train.seed"][0].choice == (2,)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
@example("1e-3")
@example("on")
@example(":smile: " * 50)
def test_any_word_comes_back_from_the_yaml_of_a_config(
    tmp_path_factory: pytest.TempPathFactory, word: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "word.yaml"
    job = validate(JobConfig, {"track": {"wandb_project": word}, "data": {"cache_dir": word}})
    file.write_text(as_yaml(job), encoding="utf-8")
    assert load(JobConfig, str(file)) == job


def test_words_are_shown_as_they_are(fate_of: FateOf, _free: None) -> None:
    tree = {**TINY, "output": {"uri": ":smile: /" * 60, "name": "1e-3"}}
    assert fate_of(json.dumps(tree).encode(), "job.json") == 0


# -- Very many trials ------------------------------------------------------------------------------


def searched_in(space: Tree, **search: Any) -> JobConfig:
    return validate(JobConfig, {**TINY, "search": {"space": space, **search}})


def test_of_very_many_trials_the_first_are_checked_and_fewer_measured(
    colour_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(colour_folder.parent)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    measured: list[int] = []

    def cost(trials: list[Any], *_: object) -> list[Cost]:
        measured.append(len(trials))
        return [Cost(1.0, 1)] * len(trials)

    monkeypatch.setattr(plan, "estimate_costs", cost)
    monkeypatch.setattr(plan, "plan_reuse", lambda *_: ReusePlan((1, 1), {}, ()))
    job = searched_in(LR, budget={"num_trials": 100_000})
    trials = plan.check_search(job)
    out = io.StringIO()
    plan.show_plan(job, trials, open_source("images"), Console(file=out, width=160))
    assert (len(trials), measured) == (1000, [100])
    text = out.getvalue()
    assert "and 99900 more" in text
    assert "for 100000 trials" in text


def test_very_many_trials_are_counted_as_they_will_run() -> None:
    seeds = {"train.seed": {"randint": [0, 1200]}}
    job = searched_in(seeds, budget={"num_trials": 5000})
    trials = plan.check_search(job)
    assert len(trials) == 1000
    num_points = len([*iter_points(job)])
    assert 1000 < num_points <= 1201
    assert plan.count_trials(job, trials) == num_points


def test_a_grid_that_repeats_a_value_is_tried_to_its_end() -> None:
    space = {"train.epochs": {"grid": [2, 2, 3]}, "train.seed": {"grid": [*range(1100)]}}
    job = searched_in(space, algorithm="grid")
    assert plan.count_trials(job, plan.check_search(job)) == 2200


def test_a_grid_that_no_search_can_end_is_refused() -> None:
    keys = (
        "train.seed",
        "train.epochs",
        "train.batch_size",
        "data.image_size",
        "augment.num_views",
    )
    space = {key: {"grid": [*range(64, 164)]} for key in keys}
    with pytest.raises(ConfigError, match="more than 100000 combinations"):
        plan.check_search(searched_in(space, algorithm="grid"))


def test_a_backbone_is_checked_with_some_of_very_many_image_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    described: set[tuple[str, int | None]] = set()

    def note(config: BackboneConfig, image_size: int | None) -> BackboneInfo:
        described.add((config.name, image_size))
        return describe(config, 64)

    monkeypatch.setattr(plan, "describe", note)
    space = {
        "data.image_size": {"randint": [32, 2048]},
        "backbone.name": {"choice": ["resnet18", "squeezenet1_1"]},
    }
    plan.check_search(searched_in(space, budget={"num_trials": 500}))
    assert Counter(name for name, _ in described) == {"resnet18": 16, "squeezenet1_1": 16}


def test_conditions_on_many_keys_before_are_put_in_order_at_once() -> None:
    keys = [key for key in SEARCHED if GOOD[key]][:40]
    space = {
        key: {"choice": GOOD[key][:1], "when": {k: GOOD[k][0] for k in keys[:number]}}
        for number, key in enumerate(keys)
    }
    assert [*build_point(searched_in(space), lambda name, entry: entry.values[0])] == keys
