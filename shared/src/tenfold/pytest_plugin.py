"""How the tests of every package run: on one thread, with every annotation checked."""

import functools
import gc
import inspect
import os
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
import torch.distributed

# Two processes share the cores, and tiny operations are slow on many threads. Lightning's launchers
# set the number to that of the cores, unless the environment has one.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The first backward pass starts a thread for every device that is known by then. Exports and
# compilers make some up, and forks cannot train beside such threads.
torch.ones(1, requires_grad=True).sum().backward()

# A collection looks at the million objects of the imports, and finds next to nothing.
gc.set_threshold(10_000)

_TYPECHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
_jaxtyped = jaxtyping.jaxtyped


def pytest_collection_finish() -> None:
    """The million objects of the imports live to the end: collections need not look at them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries that count their leaks at the end find none."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_process_group_stays() -> Iterator[None]:
    """A run under DDP in a test's own process leaves its group, which later forks would inherit."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_annotations(*packages: str) -> None:
    """Check types and shapes of all that functions of packages take and return, from now on.

    For a conftest.py, before anything of the packages is imported; an int may stand for a float
    (PEP 484). `jaxtyping.config.jaxtyping_disable` suspends the checks. Needs beartype.

    Args:
        packages: their names; submodules are checked with them.
    """
    # jaxtyping's import hook decorates with this name. Its own decorator binds the arguments of
    # every call and checks them twice, which took a tenth of the tests' time.
    jaxtyping.jaxtyped = _checked
    jaxtyping.install_import_hook(packages, _TYPECHECKER)


def _checked(function: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """As jaxtyping.jaxtyped: the sizes of one call's axes agree with one another."""
    if function is None:
        return functools.partial(_checked, typechecker=typechecker)
    if not inspect.isfunction(function) or not _is_plain(function):
        return _jaxtyped(function, typechecker=typechecker)
    checked = typechecker(function)
    if checked is function:
        return function

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        with _jaxtyped("context"):
            return checked(*args, **kwargs)

    return wrapper


def _is_plain(function: Callable[..., Any]) -> bool:
    """Can beartype check a function as it is?"""
    if "<locals>" in function.__qualname__:  # it would be kept for good, with all that it refers to
        return False
    if inspect.isgeneratorfunction(function) or "{" in str(inspect.signature(function)):
        return False
    try:
        typing.get_type_hints(function)
    except NameError:  # a name for type checkers alone
        return False
    return True
