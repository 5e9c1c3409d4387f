import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the reference material: real annotations, golden files, the published vocabulary."""
    folder = os.environ.get("FRAMSEG_SHARED")
    if not folder:
        pytest.skip("FRAMSEG_SHARED is not set: it names the folder with the real annotations and golden files")
    return Path(folder).resolve()
