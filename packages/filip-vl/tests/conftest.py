"""Paths and builders that several test files share."""

import gc
import os
from pathlib import Path

import pytest
import torch
import torch.distributed
from jaxtyping import install_import_hook

# Two processes share the cores, and tiny operations are slow on many threads. Lightning's launchers
# set the number to that of the cores, unless the environment has one.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# A collection looks at the million objects of the imports, and finds next to nothing.
gc.set_threshold(10_000)

# Checks every shape annotation while the tests run; an int may stand for a float (PEP 484).
install_import_hook(
    ["tenfold", "filip_vl"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


def pytest_collection_finish() -> None:
    """The million objects of the imports live to the end: collections need not look at them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries that count their leaks at the end find none."""
    gc.unfreeze()


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
