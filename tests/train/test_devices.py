"""Whole trials where the defaults do not take them: compiled, and on a GPU."""

from pathlib import Path

import pytest
import torch

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.data.dataset import open_dataset
from tlrunner.train.export import export_model, load
from tlrunner.train.images import Images
from tlrunner.train.trial import run_trial
from tlrunner.train.trial_dir import TrialDir

PHASED = {"freeze.strategy": "lp_ft", "train.epochs": 3, "optim.max_grad_norm": 1.0}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler meets its own
def test_a_compiled_trial_learns_as_an_eager_one(
    tiny_trial: TrialConfig, colour_images: Images
) -> None:
    small = {"backbone.name": "alexnet", "data.image_size": 64}  # the fewest operations
    eager, compiled = (
        run_trial(
            with_values(tiny_trial, {**PHASED, **small, "train.compile": compile}),
            lambda report: None,
            images=colour_images,
        )
        for compile in (False, True)
    )
    assert compiled.best is not None
    assert compiled.best.val_loss == pytest.approx(eager.best.val_loss, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_a_trial_on_a_gpu_is_exported_as_it_was_validated(
    tiny_trial: TrialConfig,
    colour_shards: Path,
    colour_images: Images,
    tmp_path: Path,
    mixed_precision: str,
) -> None:
    gpu = {"resources.gpus_per_worker": 1, "train.mixed_precision": mixed_precision}
    config = with_values(tiny_trial, {**PHASED, **gpu, "train.ema_decay": 0.9})
    directory = TrialDir(tmp_path / "0000-abcdef")
    result = run_trial(
        config,
        lambda report: None,
        trial_dir=directory.path,
        images=colour_images,
    )
    assert result.best is not None
    assert result.best.val_acc > 0.9
    export_model(
        directory.read(), directory, open_dataset(colour_shards).manifest, tmp_path / "best"
    )
    assert load(tmp_path / "best").labels == ("blue", "green", "red")
