import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlrunner.config import FreezeConfig
from tlrunner.errors import ConfigError
from tlrunner.model.freeze import Level, check, levels, phase_starts

F, N, T = Level.FROZEN, Level.NORM, Level.TRAINED


@pytest.mark.parametrize(
    ("freeze", "by_epoch"),
    [
        ({"strategy": "head"}, [(F, F, F)] * 5),
        ({"strategy": "last_stages", "num_stages": 2}, [(F, T, T)] * 5),
        ({"strategy": "last_stages", "num_stages": 3}, [(T, T, T)] * 5),
        ({"strategy": "first_stages", "num_stages": 1}, [(T, F, F)] * 5),
        ({"strategy": "norm_and_head"}, [(N, N, N)] * 5),
        ({"strategy": "full"}, [(T, T, T)] * 5),
        ({"strategy": "lp_ft", "head_epochs": 2}, [(F, F, F)] * 2 + [(T, T, T)] * 3),
        (
            {"strategy": "gradual", "epochs_per_stage": 1},
            [(F, F, F), (F, F, T), (F, T, T), (T, T, T), (T, T, T)],
        ),
        (
            {"strategy": "gradual", "epochs_per_stage": 2},
            [(F, F, F), (F, F, F), (F, F, T), (F, F, T), (F, T, T)],
        ),
    ],
)
def test_strategies_train_the_stages_they_name(freeze, by_epoch):
    config = FreezeConfig(**freeze)
    assert [levels(config, 3, epoch) for epoch in range(5)] == by_epoch


strategies = st.one_of(
    st.builds(FreezeConfig, strategy=st.sampled_from(["head", "norm_and_head", "full"])),
    st.builds(
        FreezeConfig,
        strategy=st.sampled_from(["last_stages", "first_stages"]),
        num_stages=st.integers(1, 4),
    ),
    st.builds(FreezeConfig, strategy=st.just("lp_ft"), head_epochs=st.integers(1, 30)),
    st.builds(FreezeConfig, strategy=st.just("gradual"), epochs_per_stage=st.integers(1, 5)),
)


@given(strategies, st.integers(4, 30), st.integers(1, 40))
def test_phases_start_where_levels_change_and_nowhere_else(freeze, num_stages, epochs):
    starts = phase_starts(freeze, num_stages, epochs)
    assert starts[0] == 0
    for epoch in range(1, epochs):
        changed = levels(freeze, num_stages, epoch) != levels(freeze, num_stages, epoch - 1)
        assert changed == (epoch in starts)


@given(strategies, st.integers(4, 30), st.integers(0, 40))
def test_what_trains_once_trains_to_the_end(freeze, num_stages, epoch):
    """So the trainable state of the last epoch holds everything that training ever changed."""
    now, later = levels(freeze, num_stages, epoch), levels(freeze, num_stages, epoch + 1)
    assert len(now) == num_stages
    assert all(before <= after for before, after in zip(now, later, strict=True))


def test_more_stages_than_the_backbone_has_are_refused():
    check(FreezeConfig(strategy="last_stages", num_stages=5), 5, "resnet50")
    with pytest.raises(ConfigError, match=r"num_stages is 6, resnet50 has 5 stages; valid: 1\.\.5"):
        check(FreezeConfig(strategy="last_stages", num_stages=6), 5, "resnet50")
