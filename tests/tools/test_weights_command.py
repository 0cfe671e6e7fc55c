"""`tlrunner weights`, from its flags to what it prints."""

from pathlib import Path

import pytest
import torch
from torchvision import models

from tlrunner.cli import main
from tlrunner.files import sha256_file

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(models.squeezenet1_1().state_dict(), tmp_path / "file.pth")
    digest = sha256_file(tmp_path / "file.pth")[:8]
    file = (tmp_path / "file.pth").rename(tmp_path / f"squeezenet-{digest}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(models.SqueezeNet1_1_Weights.DEFAULT.value, "url", file.as_uri())


def test_weights_are_pulled_pushed_listed_and_verified(tmp_path, capsys: Captured) -> None:
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    assert main(["weights", "pull", "squeezenet1_1", "--to", here]) == 0
    assert main(["weights", "push", here, "--to", f"{there}/"]) == 0
    assert main(["weights", "push", here, "--to", there]) == 0
    assert main(["weights", "verify", there]) == 0
    assert main(["weights", "list", there]) == 0
    shown = capsys.readouterr().out
    assert f"{here}/squeezenet1_1.IMAGENET1K_V1: SHA-256 " in shown
    assert "MiB copied" in shown
    assert "is there already" in shown
    assert f"1 weights at {there}, all as they were staged" in shown
    assert "squeezenet-" in shown  # where the listed ones are from


def test_a_wrong_hash_ends_verify_with_73(tmp_path, capsys: Captured) -> None:
    assert main(["weights", "pull", "squeezenet1_1", "--to", str(tmp_path / "here")]) == 0
    [file] = (tmp_path / "here").rglob("*.safetensors")
    file.write_bytes(file.read_bytes() + b"!")
    assert main(["weights", "verify", str(tmp_path / "here")]) == 73
    said = capsys.readouterr()
    assert "squeezenet1_1.IMAGENET1K_V1: " in said.out
    assert "1 of 1 weights" in said.err


def test_an_empty_place_and_a_wrong_name_say_so(tmp_path, capsys: Captured) -> None:
    assert main(["weights", "list", str(tmp_path / "none")]) == 0
    assert "nothing is staged at" in capsys.readouterr().out
    for words in (["verify"], ["push", "--to", str(tmp_path / "there")]):
        assert main(["weights", *words, str(tmp_path / "none")]) == 73
        assert f"nothing is staged at {tmp_path / 'none'}" in capsys.readouterr().err
    assert main(["weights", "pull", "squeezenet9", "--to", str(tmp_path)]) == 64
    assert "there is no such backbone" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="64"):
        main(["weights", "pull", "squeezenet1_1"])
