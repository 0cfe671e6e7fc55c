import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlrunner.config import FreezeConfig, HeadConfig, OptimConfig, TrialConfig
from tlrunner.configfile import config_hash, get_value, load, validate, with_values
from tlrunner.errors import ConfigError
from tlrunner.jobconfig import JobConfig, PrepareJob, TrainJob

# -- Strategies ------------------------------------------------------------------------------------

unit = st.floats(0, 0.5)
freezes = st.one_of(
    st.fixed_dictionaries({"strategy": st.sampled_from(["norm_and_head", "full"])}),
    st.fixed_dictionaries(
        {"strategy": st.sampled_from(["last_stages", "first_stages"])},
        optional={"num_stages": st.integers(1, 9)},
    ),
    st.fixed_dictionaries(
        {"strategy": st.just("lp_ft")}, optional={"head_epochs": st.integers(1, 3)}
    ),
    st.fixed_dictionaries(
        {"strategy": st.just("gradual")}, optional={"epochs_per_stage": st.integers(1, 9)}
    ),
)
heads = st.one_of(
    st.fixed_dictionaries({"kind": st.just("linear")}, optional={"dropout": unit}),
    st.fixed_dictionaries(
        {"kind": st.sampled_from(["mlp", "flatten_mlp"])},
        optional={"hidden_sizes": st.lists(st.integers(1, 99), min_size=1, max_size=4)},
    ),
)
optims = st.fixed_dictionaries(
    {"optimizer": st.sampled_from(["adamw", "adam", "sgd"])},
    optional={
        "lr": st.floats(1e-8, 100),
        "weight_decay": st.floats(0, 10),
        "layer_decay": st.floats(0.01, 1),
        "warmup_epochs": st.floats(0, 3),
        "max_grad_norm": st.none() | st.floats(0.01, 10),
    },
)
trains = st.fixed_dictionaries(
    {"epochs": st.integers(4, 99)},
    optional={
        "batch_size": st.integers(1, 512),
        "label_smoothing": unit,
        "ema_decay": st.none() | st.floats(0.01, 0.99),
        "seed": st.integers(0, 2**31 - 1),
        "channels_last": st.booleans(),
    },
)
augments = st.fixed_dictionaries(
    {}, optional={"crop_scale": st.none() | st.just([0.25, 0.5]), "mixup": unit, "hue": unit}
)
data = st.fixed_dictionaries(
    {}, optional={"uri": st.text(min_size=1), "image_size": st.none() | st.integers(16, 2048)}
)
trial_configs = st.fixed_dictionaries(
    {"freeze": freezes, "head": heads, "optim": optims, "train": trains},
    optional={"augment": augments, "data": data},
).map(lambda tree: validate(TrialConfig, tree))

# -- From file, flags and assignments --------------------------------------------------------------


def test_assignments_go_before_flags_before_the_file_before_defaults(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("train: {epochs: 7, batch_size: 4}\noptim: {lr: 0.5}\noutput: {name: a}\n")
    flags = {"output.name": "b", "train.batch_size": 16, "data.uri": None}
    config = load(TrainJob, str(file), ["train.batch_size=64"], flags)
    assert (config.optim.lr, config.train.epochs) == (0.5, 7)
    assert (config.output.name, config.train.batch_size) == ("b", 64)
    assert config.data == TrainJob().data


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "+1e-3", "0.001", ".001"])
def test_every_usual_spelling_of_a_number_is_one(text: str) -> None:
    assert load(TrainJob, None, [f"optim.lr={text}"]).optim.lr == 0.001


def test_json_is_read_where_the_name_says_so(tmp_path: Path) -> None:
    file = tmp_path / "trial.json"
    file.write_text(TrialConfig(optim=OptimConfig(lr=0.25)).model_dump_json())
    assert load(TrainJob, str(file)).optim.lr == 0.25


def test_a_key_of_the_search_space_keeps_its_dots() -> None:
    job = load(JobConfig, None, ["search.space.optim.lr={uniform: [0.1, 0.2]}"])
    assert list(job.search.space) == ["optim.lr"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"train: {epochs: 1}\ntrain: {epochs: 2}\n", "key 'train' is given twice"),
        (b"train: {epochs: 1, epochs: 2}\n", "key 'epochs' is given twice"),
        (b"train: [1\n", "does not parse"),
        (b"- train\n", "holds a list"),
        (b"\xff\xfe\x00", "utf-8"),
        (b"#" * (2 << 20), "at most 1 MiB"),
        (b"train: !!python/object/apply:os.getcwd []\n", "does not parse"),
    ],
)
def test_a_file_that_is_no_config_says_why(tmp_path: Path, content: bytes, named: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=named):
        load(TrainJob, str(file))


def test_an_absent_file_and_a_directory_are_config_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            load(TrainJob, str(path))


def test_an_empty_file_means_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load(TrainJob, str(tmp_path / "empty.yaml")) == TrainJob()


# -- Mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config_class", "assignment", "fragments"),
    [
        (TrainJob, "optm.lr=1", ["unknown key 'optm'", "optim"]),
        (TrainJob, "optim.weigt_decay=1", ["'optim.weigt_decay'", "did you mean weight_decay"]),
        (
            TrainJob,
            "optim.optimizer=rmsprop",
            ["optim.optimizer is 'rmsprop'", "adamw, adam or sgd"],
        ),
        (TrainJob, "train.epochs=0", ["train.epochs is 0", "greater than or equal to 1"]),
        (TrainJob, "train.epochs=1.5", ["train.epochs is 1.5", "integer"]),
        (TrainJob, "train=5", ["train is 5"]),
        (
            TrainJob,
            "freeze.num_stages=2",
            ["freeze", "'num_stages' is not used with", "last_stages"],
        ),
        (TrainJob, "optim.momentum=0.9", ["'momentum' is not used with", "sgd"]),
        (TrainJob, "search.num_trials=3", ["unknown key 'search'"]),
        (TrainJob, "optim.lr", ["--set dotted.key=value"]),
        (TrainJob, "optim.lr=[", ["--set optim.lr does not parse"]),
        (PrepareJob, "data.num_worker=3", ["'data.num_worker'", "uri, limit"]),
        (
            JobConfig,
            "search.algorithm=bayes",
            ["search.algorithm is 'bayes'", "random, grid or tpe"],
        ),
        (JobConfig, "search.grace_epochs=2", ["'grace_epochs' is not used with", "median, asha"]),
        (JobConfig, "search.space.optim.lr={chioce: [1]}", ["chioce", "did you mean choice?"]),
        (JobConfig, "search.space.optim.lr=5", ["search.space.optim.lr is 5"]),
    ],
)
def test_a_mistake_names_the_value_the_valid_set_and_the_remedy(
    config_class: type[TrainJob], assignment: str, fragments: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(config_class, None, [assignment])
    for fragment in fragments:
        assert fragment in str(caught.value)


keys = st.sampled_from(
    ["optim.lr", "train", "data.uri", "search.space.optim.lr", "freeze.strategy"]
)


@given(
    keys | st.from_regex(r"[a-z_.#]{0,12}", fullmatch=True),
    st.text(max_size=30) | st.sampled_from(["&a [*a]", "{1: 2}"]),
)
def test_whatever_is_typed_is_a_config_or_one_line(key: str, text: str) -> None:
    try:
        load(JobConfig, None, [f"{key}={text}"])
    except ConfigError as err:
        assert len(str(err).splitlines()) == 1


# -- Round trips and hashes ------------------------------------------------------------------------


@given(trial_configs)
def test_a_config_is_the_same_after_a_way_through_json(config: TrialConfig) -> None:
    again = validate(TrialConfig, json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config
    assert config_hash(again) == config_hash(config)


@given(trial_configs, trial_configs)
def test_two_configs_have_one_hash_only_if_they_are_equal(
    one: TrialConfig, other: TrialConfig
) -> None:
    assert (config_hash(one) == config_hash(other)) == (one == other)


def test_the_hash_leaves_out_where_and_how_loudly_a_job_runs() -> None:
    elsewhere = load(
        JobConfig,
        None,
        [
            "output={uri: /other, name: another}",
            "log.level=debug",
            "resources={cpus_per_worker: 4, gpus_per_worker: 0}",
            "data={cache_dir: /cache, num_workers: 3}",
        ],
    )
    assert config_hash(elsewhere) == config_hash(JobConfig())


@pytest.mark.parametrize("changed", ["train.seed=1", "search.seed=1", "data.uri=/x", "optim.lr=1"])
def test_the_hash_changes_with_whatever_changes_the_outcome(changed: str) -> None:
    assert config_hash(load(JobConfig, None, [changed])) != config_hash(JobConfig())


# -- Other values ----------------------------------------------------------------------------------


@given(trial_configs)
def test_no_other_values_give_the_same_config(config: TrialConfig) -> None:
    assert with_values(config, {}) == config


@given(trial_configs, st.floats(1e-6, 1), st.integers(4, 50))
def test_given_values_are_set_and_all_others_kept(
    config: TrialConfig, lr: float, epochs: int
) -> None:
    changed = with_values(config, {"optim.lr": lr, "train.epochs": epochs})
    assert (get_value(changed, "optim.lr"), get_value(changed, "train.epochs")) == (lr, epochs)
    back = {"optim.lr": config.optim.lr, "train.epochs": config.train.epochs}
    assert with_values(changed, back) == config


@given(trial_configs, freezes, heads)
def test_from_any_variant_one_can_switch_to_any_other(
    config: TrialConfig, freeze: dict[str, Any], head: dict[str, Any]
) -> None:
    values = {f"freeze.{key}": value for key, value in freeze.items()}
    values |= {f"head.{key}": value for key, value in head.items()}
    changed = with_values(config, values)
    uses = FreezeConfig.variants["strategy"]
    kept = uses[config.freeze.strategy].keys() & uses[freeze["strategy"]].keys()
    assert changed.freeze == FreezeConfig(
        **{key: getattr(config.freeze, key) for key in kept} | freeze
    )
    uses = HeadConfig.variants["kind"]
    kept = uses[config.head.kind].keys() & uses[head["kind"]].keys() | {"dropout"}
    assert changed.head == HeadConfig(**{key: getattr(config.head, key) for key in kept} | head)


def test_a_number_is_kept_where_the_new_variant_uses_it_too() -> None:
    config = TrialConfig(freeze=FreezeConfig(strategy="last_stages", num_stages=4))
    assert with_values(config, {"freeze.strategy": "last_stages"}).freeze.num_stages == 4
    assert with_values(config, {"freeze.strategy": "first_stages"}).freeze.num_stages == 4
    assert with_values(config, {"freeze.strategy": "full"}).freeze.num_stages is None


def test_other_values_are_validated_as_a_whole() -> None:
    with pytest.raises(ConfigError, match="'num_stages' is not used"):
        with_values(TrialConfig(), {"freeze.strategy": "full", "freeze.num_stages": 2})
    with pytest.raises(ConfigError, match=r"optim.warmup_epochs is 3.0"):
        with_values(TrialConfig(), {"optim.warmup_epochs": 3.0, "train.epochs": 3})


def test_the_trial_of_a_job_leaves_the_rest_of_the_job_out() -> None:
    job = JobConfig()
    assert type(with_values(job, {})) is TrialConfig
    assert with_values(job, {}) == job.trial()


def test_an_unknown_key_is_named_with_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'optim.lrr'.*did you mean lr\?"):
        get_value(TrialConfig(), "optim.lrr")
    with pytest.raises(ConfigError, match=r"unknown key 'optim.lr.x'"):
        get_value(TrialConfig(), "optim.lr.x")


@pytest.mark.parametrize("key", ["data.uri", "output.uri", "backbone.weights"])
def test_credentials_in_a_uri_are_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: a URI with credentials") as caught:
        load(TrainJob, None, [f"{key}=s3://AKIA123:hush/hush@bucket/x"])
    assert "hush" not in str(caught.value)
    with pytest.raises(ConfigError, match=f"{key}: a URI with credentials"):
        load(TrainJob, None, [f"{key}=s3://AKIA123:hush@bucket/x"])
    for query in ("X-Amz-Signature=hush", "user=me&password=hush", "access_token=hush"):
        with pytest.raises(ConfigError, match=f"{key}: a URI with credentials") as caught:
            load(TrainJob, None, [f"{key}=https://host/x?{query}"])
        assert "hush" not in str(caught.value)
