"""How the tests of every package run: on one thread, with every annotation checked."""

import atexit
import contextlib
import functools
import gc
import inspect
import os
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import xdist

# Two processes share the cores, and tiny operations are slow on many threads. Lightning's launchers
# set the number to that of the cores, unless the environment has one.
os.environ["OMP_NUM_THREADS"] = "1"

# A collection looks at the million objects of the imports, and finds next to nothing.
gc.set_threshold(10_000)

# Taking those objects apart one by one is the last thing a process does, and takes seconds. A
# worker has told its results by then; what is registered first here is called last.
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if _IS_WORKER:
    atexit.register(os._exit, 0)

_TYPECHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
_jaxtyped = jaxtyping.jaxtyped
_CONTEXT = _jaxtyped("context")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Prepare torch where tests run; the process that hands them out does without it."""
    if xdist.is_xdist_controller(session):
        return
    import torch

    torch.set_num_threads(1)
    # The first backward pass starts a thread for every device that is known by then. Exports and
    # compilers make some up, and forks cannot train beside such threads.
    torch.ones(1, requires_grad=True).sum().backward()


def pytest_collection_finish() -> None:
    """The million objects of the imports live to the end: collections need not look at them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries that count their leaks at the end find none."""
    if not _IS_WORKER:
        gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_process_group_stays() -> Iterator[None]:
    """A run under DDP in a test's own process leaves its group, which later forks would inherit."""
    yield
    import torch.distributed

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
    if (
        not inspect.isfunction(function)
        or inspect.isgeneratorfunction(function)
        or "<locals>" in function.__qualname__  # beartype would keep it, and all it refers to
    ):
        return _jaxtyped(function, typechecker=typechecker)

    @functools.cache
    def prepared() -> tuple[Callable[..., Any], bool]:
        """The function with checks, and whether it needs a context for the sizes of axes."""
        with contextlib.suppress(NameError):  # a name for type checkers alone
            hints = typing.get_type_hints(function)
            if "{" not in str(inspect.signature(function)):  # a size told by an argument
                return typechecker(function), any(map(_has_axes, hints.values()))
        return _jaxtyped(function, typechecker=typechecker), False

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        checked, has_axes = prepared()  # at the first call: most functions have none in a process
        if not has_axes:
            return checked(*args, **kwargs)
        with _CONTEXT:
            return checked(*args, **kwargs)

    return wrapper


def _has_axes(hint: Any) -> bool:
    """Is an array with named axes somewhere in a type?"""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_has_axes, typing.get_args(hint)))
