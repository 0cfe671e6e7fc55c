"""What docker/prove.py stands on: pip's settings, lent to a build, and pods as hardened ones."""

from pathlib import Path

import images
import pods
import pytest


def test_settings_of_pip_are_those_that_say_where_packages_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://user:hush@mirror.test/simple\nconstraint = /no/such\n"
        "find-links =\n    /one\n    /two\n"
    )
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_PROXY", "http://proxy.test")
    settings = images.pip_settings()
    assert settings["index-url"] == "https://user:hush@mirror.test/simple"
    assert settings["find-links"] == "/one /two"
    assert settings["proxy"] == "http://proxy.test"
    assert "constraint" not in settings


def test_the_environment_counts_more_than_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = https://file.test/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_INDEX_URL", "https://environment.test/simple")
    assert images.pip_settings()["index-url"] == "https://environment.test/simple"


def test_directories_that_pip_looks_into_are_lent_with_the_files_beside_an_index(
    tmp_path: Path,
) -> None:
    for name in ("wheels", "index/simple", "index/files"):
        (tmp_path / name).mkdir(parents=True)
    settings = {
        "find-links": f"{tmp_path}/wheels {tmp_path}/gone relative",
        "extra-index-url": f"file://{tmp_path}/index/simple https://mirror.test/simple",
    }
    assert images.local_paths(settings) == [tmp_path / "index", tmp_path / "wheels"]


def test_a_pod_has_no_rights_and_writes_where_pods_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pods, "_ip", lambda *args: None)
    network = pods.Network(["head", "worker"])
    pod = pods.Pod("head", network, tmp_path, tmp_path / "1-head", {}, {"/data": tmp_path})
    spec = pod._spec("id")
    assert isinstance(spec["process"], dict)
    assert spec["root"] == {"path": str(tmp_path), "readonly": True}
    assert spec["process"]["user"] == {"uid": 10001, "gid": 10001}
    assert set(map(tuple, spec["process"]["capabilities"].values())) == {()}
    assert spec["process"]["noNewPrivileges"] is True
    assert isinstance(spec["mounts"], list)
    written = {
        mount["destination"]
        for mount in spec["mounts"]
        if mount["type"] in ("tmpfs", "bind") and "ro" not in mount["options"]
    }
    assert written == {"/dev", "/dev/shm", "/tmp", "/home/tlrunner", "/data"}
