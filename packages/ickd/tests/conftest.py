"""Paths and builders that several test files share."""

from pathlib import Path

import pytest
import torch
import torch.distributed
from jaxtyping import install_import_hook

# Two processes share the cores, and tiny convolutions are slow on many threads.
torch.set_num_threads(1)

# Checks every shape annotation while the tests run; an int may stand for a float (PEP 484).
install_import_hook(
    ["tenfold", "ickd"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


@pytest.fixture(autouse=True)
def _no_process_group_stays():
    """A run under DDP in a test's own process leaves its group, which later forks would inherit."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference arrays; its README says what they are."""
    return Path(__file__).parent / "reference"
