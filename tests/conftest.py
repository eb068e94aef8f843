"""The only fixtures: where the real data lie."""

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real neurons and weights. Missing: the test skips, except in CI, where it fails."""
    if not SHARED.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"real data expected at {SHARED}")
        pytest.skip(f"no real data at {SHARED}")
    return SHARED
