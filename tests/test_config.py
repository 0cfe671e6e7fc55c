import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tlrunner.config import (
    AugmentConfig,
    BackboneConfig,
    DataConfig,
    FreezeConfig,
    HeadConfig,
    OptimConfig,
    ResourceConfig,
    TrainConfig,
    TrialConfig,
)
from tlrunner.jobconfig import JobConfig, OutputConfig, PredictJob
from tlrunner.searchconfig import Distribution, SearchConfig
from tlrunner.section import Section

SECTIONS = [
    AugmentConfig,
    BackboneConfig,
    DataConfig,
    FreezeConfig,
    HeadConfig,
    OptimConfig,
    OutputConfig,
    ResourceConfig,
    SearchConfig,
    TrainConfig,
]
WITH_VARIANTS = [section for section in SECTIONS if section.variants]


def chosen_variants(section: type[Section]) -> list[dict[str, str]]:
    """Every combination of a section's variants, as {selecting key: value}."""
    selectors = list(section.variants)
    values = itertools.product(*(section.variants[selector] for selector in selectors))
    return [dict(zip(selectors, combination, strict=True)) for combination in values]


NO_DEFAULT = {"grace_seconds", "warm_start"}  # used, and nothing where they are not set
REFUSED = ({"algorithm": "tpe", "scheduler": "pbt"},)
EVERY_VARIANT = [
    (section, chosen)
    for section in WITH_VARIANTS
    for chosen in chosen_variants(section)
    if chosen not in REFUSED
]


def keys_of(section: type[Section], chosen: dict[str, str]) -> tuple[set[str], set[str]]:
    """The keys that the chosen variants use, and those that only other variants use."""
    every = {key for uses in section.variants.values() for used in uses.values() for key in used}
    used = {key for selector, value in chosen.items() for key in section.variants[selector][value]}
    return used, every - used


@pytest.mark.parametrize(("section", "chosen"), EVERY_VARIANT)
def test_a_variant_has_defaults_for_exactly_the_keys_it_uses(
    section: type[Section], chosen: dict[str, str]
) -> None:
    config = section(**chosen)
    used, unused = keys_of(section, chosen)
    assert all(getattr(config, key) is not None for key in used - NO_DEFAULT)
    assert all(getattr(config, key) is None for key in unused)


@pytest.mark.parametrize(("section", "chosen"), EVERY_VARIANT)
def test_a_key_that_the_variant_does_not_use_is_refused_by_name(
    section: type[Section], chosen: dict[str, str]
) -> None:
    _, unused = keys_of(section, chosen)
    valid: dict[str, Any] = {"hidden_sizes": (3,), "pooling": "avg", "momentum": 0.5}
    valid |= {"step_gamma": 0.5, "warm_start": "runs/one"}
    for key in unused:
        with pytest.raises(ValidationError, match=f"'{key}' is not used with"):
            section(**chosen, **{key: valid.get(key, 2)})


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_keys_are_refused(section: type[Section]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        section(no_such_key=1)


@pytest.mark.parametrize("section", [*SECTIONS, TrialConfig, JobConfig, PredictJob])
def test_defaults_are_a_valid_config_and_stand_in_json(section: type[Section]) -> None:
    config = section()
    assert section.model_validate(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize("section", SECTIONS)
def test_a_config_never_changes(section: type[Section]) -> None:
    key = next(iter(section.model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section(), key, None)


def test_every_key_has_a_meaning_or_a_name_that_says_it() -> None:
    self_explaining = {"epochs", "mixed_precision", "label_smoothing", "channels_last", "seed"}
    self_explaining |= {"optimizer", "momentum", "schedule", "contrast", "saturation", "num_trials"}
    for section in SECTIONS:
        for key, field in section.model_fields.items():
            assert field.description or key in self_explaining, f"{section.__name__}.{key}"


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        (DataConfig, {"val_fraction": 0.6, "test_fraction": 0.4}, "val_fraction and test_fraction"),
        (DataConfig, {"image_size": 15}, "image_size"),
        (HeadConfig, {"kind": "mlp", "hidden_sizes": (8, 0)}, "hidden_sizes"),
        (OptimConfig, {"lr": 0.0}, "lr"),
        (OptimConfig, {"lr": float("nan")}, "lr"),
        (OptimConfig, {"lr": float("inf")}, "lr"),
        (TrainConfig, {"gradient_accumulation_steps": 9, "batch_size": 8}, "batch_size"),
        (TrainConfig, {"mixed_precision": "fp8"}, "mixed_precision"),
        (AugmentConfig, {"crop_scale": (0.9, 0.5)}, "crop_scale"),
        (BackboneConfig, {"weights_sha256": "abc"}, "weights_sha256"),
        (OutputConfig, {"name": "../elsewhere"}, "name"),
        (Distribution, {"uniform": (2, 1)}, "lower bound first"),
        (Distribution, {"loguniform": (0, 1)}, "positive bounds"),
        (Distribution, {"choice": ()}, "choice"),
        (Distribution, {}, "exactly one of"),
        (Distribution, {"choice": (1,), "grid": (1,)}, "exactly one of"),
    ],
)
def test_impossible_values_are_refused_by_name(
    section: type[Section], values: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValidationError, match=named):
        section(**values)


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"optim": {"warmup_epochs": 2}, "train": {"epochs": 2}}, "optim.warmup_epochs is 2"),
        (
            {"freeze": {"strategy": "lp_ft", "head_epochs": 2}, "train": {"epochs": 2}},
            "freeze.head_epochs is 2",
        ),
        ({"optim": {"layer_decay": 0.5}, "freeze": {"strategy": "head"}}, "optim.layer_decay"),
    ],
)
def test_sections_that_do_not_fit_together_are_refused(tree: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        TrialConfig.model_validate(tree)


@pytest.mark.parametrize(("algorithm", "kind"), [("random", "grid"), ("grid", "choice")])
def test_grid_goes_with_grid(algorithm: str, kind: str) -> None:
    space = {"optim.lr": {kind: (0.1, 0.2)}}
    with pytest.raises(ValidationError, match="grid goes with grid"):
        SearchConfig(algorithm=algorithm, space=space)


@given(st.floats(1e-3, 1 - 1e-3), st.floats(0, 1 - 1e-3))
def test_splits_are_accepted_exactly_when_they_leave_images_to_train_on(
    val: float, test: float
) -> None:
    if val + test < 1:
        DataConfig(val_fraction=val, test_fraction=test)
    else:
        with pytest.raises(ValidationError):
            DataConfig(val_fraction=val, test_fraction=test)
