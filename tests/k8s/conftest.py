"""All of this needs kubectl, for its kustomize; what else a test needs it says itself."""

import shutil

import pytest


@pytest.fixture(autouse=True)
def _kubectl() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
