from __future__ import annotations

import emulator
import pytest
from kernel_library import Library, build


@pytest.fixture(scope="session")
def plain_path():
    if (reason := emulator.missing()) is not None:
        pytest.skip(f"no emulator: {reason}")
    return build("plain")


@pytest.fixture
def library(plain_path):
    """The plain build; a test may configure it as it likes."""
    loaded = Library(plain_path)
    loaded.configure()
    return loaded
