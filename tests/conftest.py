"""Tests marked gpu run where torch sees one; no test feels the settings of the shell that it was started from."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from gpt.config import SEED_ONLY, SEED_RENAMED, SEED_TUNING, Config


@pytest.fixture(autouse=True, scope="session")
def no_settings_from_outside() -> None:
    ours = {name.upper() for name in Config.model_fields} | {*SEED_ONLY, *SEED_RENAMED}
    for name in list(os.environ):
        if name.upper() in ours or name.startswith(tuple(SEED_TUNING)):
            del os.environ[name]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny tensors: threads would spend their time waiting for each other, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every torch.empty starts as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
