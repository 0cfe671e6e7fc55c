""".dockerignore lets in what docker/Dockerfile copies, and nothing else."""

import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest
from test_dockerfile import instructions

ROOT = Path(__file__).resolve().parents[2]
NEVER = """
    .git/config .gitignore .dockerignore .env .netrc .venv/bin/python .tools/bin/hadolint
    .aws/credentials .ci/run id_rsa secrets.yaml token pip.conf kubeconfig
    runs/first/best/model.safetensors jobs/runs/first/summary.json jobs/.env jobs/secret.txt
    jobs/__pycache__/train.cpython-311.pyc tlrunner/__pycache__/cli.cpython-311.pyc
    tlrunner/.cache/x.py tlrunner/model/weights.pth tests/conftest.py tests/docker/conftest.py
    k8s/secret.yaml docker/Dockerfile docker/prove.py docker/pip.conf build/lib/tlrunner/cli.py
    dist/tlrunner-0.1.0-py3-none-any.whl mlruns/0/meta.yaml venv/lib/site.py
"""


def regex(pattern: str) -> "re.Pattern[str]":
    """Docker's patterns: `*` stays within a name, `**/` is any number of directories."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    text = re.sub(
        r"\*\*/|\*\*|\*|\?|[^*?]+",
        lambda found: parts.get(found[0]) or re.escape(found[0]),
        pattern,
    )
    return re.compile(text)


def lines() -> list[str]:
    read = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in read if line and not line.startswith("#")]


def is_matched(path: str) -> bool:
    """The last pattern that matches a path, or a directory that it is in, decides."""
    let_in = True
    steps = [str(step) for step in (PurePosixPath(path), *PurePosixPath(path).parents)][:-1]
    for line in lines():
        pattern = regex(line.removeprefix("!"))
        if any(pattern.fullmatch(step) for step in steps):
            let_in = line.startswith("!")
    return let_in


def is_let_in(path: str) -> bool:
    """Also by builders that enter a directory only if it is let in itself, or begins a pattern."""
    directories = [str(step) for step in PurePosixPath(path).parents][:-1]
    return is_matched(path) and all(
        is_matched(directory) or any(line.startswith(f"!{directory}/") for line in lines())
        for directory in directories
    )


@pytest.mark.parametrize("path", NEVER.split())
def test_what_is_no_part_of_the_image_stays_out(path: str) -> None:
    assert not is_let_in(path)


def test_what_the_dockerfile_copies_gets_in() -> None:
    copied = [rest.split()[:-1] for word, rest in instructions() if word == "COPY"]
    sources = {path for paths in copied if not paths[0].startswith("--from") for path in paths}
    assert sources > {"jobs", "tlrunner", "docker/requirements.lock"}
    for source in sources:
        path = ROOT / source
        files = [path] if path.is_file() else list(path.rglob("*.py"))
        assert files, f"{source} is not there"
        assert [file for file in files if not is_let_in(str(file.relative_to(ROOT)))] == []


def test_files_of_the_package_and_the_jobs_get_in_whatever_their_kind() -> None:
    """Such as a new .yaml of a job, which would be missed in the image alone."""
    command = ["git", "-C", str(ROOT), "ls-files", "tlrunner", "jobs"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    assert [path for path in listed.stdout.split() if not is_let_in(path)] == []
