from pathlib import Path

import pytest

from tlrunner.uris import absolute, is_weights_file


@pytest.mark.parametrize(
    "uri", ["sample:flowers", "s3://bucket/images", "file:///images", "gopher://x"]
)
def test_what_is_no_local_path_stays_as_it_is(uri: str) -> None:
    assert absolute(uri) == uri


def test_a_local_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert absolute("images") == str(tmp_path / "images")
    assert absolute("../w.pth") == str(tmp_path.parent / "w.pth")
    assert absolute("~/images") == "/home/somebody/images"


@pytest.mark.parametrize(
    ("weights", "is_file"),
    [
        ("none", False),
        ("default", False),
        ("IMAGENET1K_V1", False),
        ("fb_in22k_ft_in1k", False),
        ("w.pth", True),
        ("w.pt", True),
        ("w.safetensors", True),
        ("here/w", True),
        ("s3://bucket/w.bin", True),
        ("file:///w.bin", True),
    ],
)
def test_weights_are_a_file_by_their_slash_or_suffix(weights: str, is_file: bool) -> None:
    assert is_weights_file(weights) is is_file
