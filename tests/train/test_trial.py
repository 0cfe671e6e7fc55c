import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.errors import ConfigError, ResourceError
from tlrunner.train.checkpoint import read_checkpoint, verify_commit
from tlrunner.train.images import Images
from tlrunner.train.trial import TrialResult, run_trial
from tlrunner.train.trial_dir import EpochReport, TrialDir

Run = Callable[..., tuple[TrialResult, list[EpochReport]]]


@pytest.fixture
def run(tiny_trial: TrialConfig, colour_images: Images) -> Run:
    """`run({"dotted.key": value}, trial_dir)`: the tiny trial with other values."""

    def running(
        values: dict[str, Any] | None = None, trial_dir: Path | None = None
    ) -> tuple[TrialResult, list[EpochReport]]:
        reports: list[EpochReport] = []
        config = with_values(tiny_trial, values or {})
        result = run_trial(config, reports.append, trial_dir=trial_dir, images=colour_images)
        return result, reports

    return running


def figures(reports: list[EpochReport]) -> list[dict[str, Any]]:
    """What two runs of a config share: everything but times."""
    times = ("seconds", "images_per_second", "latency_seconds", "fill_seconds", "saved_seconds")
    return [{k: v for k, v in asdict(report).items() if k not in times} for report in reports]


EVERYTHING = {
    "backbone.name": "shufflenet_v2_x0_5",
    "optim.optimizer": "sgd",
    "optim.lr": 0.01,
    "optim.layer_decay": 0.8,
    "optim.warmup_epochs": 0.5,
    "optim.max_grad_norm": 1.0,
    "head.kind": "mlp",
    "head.dropout": 0.2,
    "train.label_smoothing": 0.1,
    "train.ema_decay": 0.9,
    "train.gradient_accumulation_steps": 2,
    "augment.mixup": 0.4,
    "augment.cutmix": 1.0,
    "augment.rotation": 20.0,
    "augment.random_erasing": 0.3,
}


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["tiny", "everything"])
def test_the_same_config_gives_the_same_figures_and_weights(
    run: Run, tmp_path: Path, values: dict[str, Any]
) -> None:
    runs = [run(values, tmp_path / name) for name in ("one", "other")]
    assert figures(runs[0][1]) == figures(runs[1][1])
    one, other = (
        TrialDir(tmp_path / name).best_checkpoint(result.best) / "trainable.safetensors"
        for name, (result, _) in zip(("one", "other"), runs, strict=True)
    )
    assert one.read_bytes() == other.read_bytes()


def test_another_seed_gives_other_figures(run: Run) -> None:
    assert figures(run()[1]) != figures(run({"train.seed": 1})[1])


def test_the_number_of_threads_changes_no_figure(run: Run) -> None:
    assert figures(run({"data.num_workers": 3})[1]) == figures(run()[1])


def test_micro_batches_change_no_figure_by_more_than_rounding(run: Run) -> None:
    _, whole = run({"optim.optimizer": "sgd"})
    _, parts = run({"optim.optimizer": "sgd", "train.gradient_accumulation_steps": 4})
    for one, other in zip(whole, parts, strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-4)
        assert other.val_loss == pytest.approx(one.val_loss, rel=1e-4)


def test_colours_are_learned(run: Run) -> None:
    result, reports = run({"train.epochs": 5})
    assert result.state == "completed"
    assert result.best.val_acc >= 2 / 3
    assert reports[-1].train_loss < reports[0].train_loss
    assert [report.epoch for report in reports] == [1, 2, 3, 4, 5]


def test_an_epoch_is_on_the_disk_before_it_is_reported(
    tiny_trial: TrialConfig, colour_images: Images, tmp_path: Path
) -> None:
    trial = TrialDir(tmp_path / "trial")
    seen = []

    def report(finished: EpochReport) -> None:
        record = trial.read()
        assert record.epochs[-1] == finished
        tensors, state = read_checkpoint(trial.best_checkpoint(record.best))
        assert state["report"]["val_acc"] == record.best.val_acc
        assert tensors
        seen.append(finished.epoch)

    run_trial(tiny_trial, report, trial_dir=trial.path, images=colour_images)
    assert seen == [1, 2]


def test_one_checkpoint_is_kept_that_of_the_best_epoch(run: Run, tmp_path: Path) -> None:
    result, reports = run({"train.epochs": 5}, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [result.best.checkpoint]
    best = max(reports, key=lambda report: report.val_acc)
    assert (result.best, TrialDir(tmp_path).read().best) == (best, best)
    assert all(report.checkpoint for report in reports[:-1]), "one to go on from for each epoch"
    (kept,) = (tmp_path / "checkpoints").iterdir()
    names = {path.name for path in kept.iterdir()}
    assert names == {"trainable.safetensors", "state.json", "COMMIT.json"}, "the weights alone"
    verify_commit(kept)


def test_without_a_directory_nothing_is_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result, _ = run()
    assert result.best.checkpoint is None
    assert not list(tmp_path.iterdir())


def test_without_shards_the_images_are_prepared(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    config = with_values(tiny_trial, {"data.cache_dir": str(tmp_path)})
    assert run_trial(config, lambda report: None).state == "completed"
    assert list(tmp_path.glob("shards/*/manifest.json"))


def test_shards_that_another_process_of_the_node_is_just_writing_are_not_taken_for_written(
    tiny_trial: TrialConfig, colour_images: Images, tmp_path: Path
) -> None:
    begun = tmp_path / "shards" / Path(colour_images.shards).name
    begun.mkdir(parents=True)
    images = Images(str(begun), colour_images.sha256)
    config = with_values(tiny_trial, {"data.cache_dir": str(tmp_path)})
    assert run_trial(config, lambda report: None, images=images).state == "completed"
    assert (begun / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("values", "trains_more"),
    [
        ({"freeze.strategy": "lp_ft"}, [True, False]),
        ({"freeze.strategy": "gradual"}, [True, True]),
        ({"freeze.strategy": "last_stages"}, [False, False]),
    ],
    ids=["lp_ft", "gradual", "last_stages"],
)
def test_phases_unfreeze_at_their_epochs(
    run: Run, tmp_path: Path, values: dict[str, Any], trains_more: list[bool]
) -> None:
    # gradual: the last stage of squeezenet1_1 joins at epoch 2, the one before it at epoch 3
    result, reports = run({**values, "train.epochs": 3}, tmp_path)
    trained = [report.trainable_params for report in reports]
    assert [b > a for a, b in pairwise(trained)] == trains_more
    assert all(report.total_params == reports[0].total_params for report in reports)
    tensors, _ = read_checkpoint(TrialDir(tmp_path).best_checkpoint(result.best))
    assert sum(tensor.numel() for tensor in tensors.values()) == result.best.trainable_params


def test_a_diverged_trial_says_at_which_step(run: Run, tmp_path: Path) -> None:
    values = {"optim.optimizer": "sgd", "optim.lr": 100.0, "train.epochs": 3}
    result, reports = run(values, tmp_path)
    record = TrialDir(tmp_path).read()
    assert result.state == record.state == "diverged"
    assert result.detail == record.detail
    assert result.detail.startswith("non-finite loss at step ")
    assert len(reports) < 3
    assert record.epochs == tuple(reports)


def test_bf16_trains_on_cpus_and_differs_from_full_precision(run: Run) -> None:
    before = figures(run()[1])
    result, reports = run({"train.mixed_precision": "bf16"})
    assert result.state == "completed"
    assert figures(reports) != before
    assert figures(run()[1]) == before, "and does not linger"


def test_fp16_is_refused_on_cpus(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"mixed_precision is fp16.*valid: no, bf16"):
        run({"train.mixed_precision": "fp16"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be had")
def test_a_gpu_that_is_not_there_is_a_resource_error(run: Run) -> None:
    with pytest.raises(ResourceError, match=r"resources\.gpus_per_worker is 1"):
        run({"resources.gpus_per_worker": 1})


def test_more_stages_than_the_backbone_has_are_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"freeze\.num_stages is 10.*has 9 stages.*valid: 1\.\.9"):
        run({"freeze.strategy": "last_stages", "freeze.num_stages": 10})


def test_a_trial_cut_short_is_read_as_interrupted(
    tiny_trial: TrialConfig, colour_images: Images, tmp_path: Path
) -> None:
    def interrupt(report: EpochReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(tiny_trial, interrupt, trial_dir=tmp_path, images=colour_images)
    record = TrialDir(tmp_path).read()
    assert (record.state, len(record.epochs)) == ("interrupted", 1)


def test_every_line_of_metrics_is_strict_json(run: Run, tmp_path: Path) -> None:
    run({}, tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["epoch"] for line in lines] == [1, 2]
