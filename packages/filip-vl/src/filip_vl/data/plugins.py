"""A person's own functions, by name."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from tenfold.errors import UserError, first_line


def load_callable(name: str) -> Callable[[Any], Any]:
    """The function that "module:function" names; modules of the working folder count.

    Raises:
        UserError: no such module or function; what the function raises becomes one as well.
    """
    module_name, _, function_name = name.partition(":")
    fix = "write it as module:function"
    if not module_name or not function_name:
        raise UserError("no name of a function", where=name, fix=fix)
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        function = getattr(import_module(module_name), function_name, None)
    except ImportError as error:
        raise UserError(f"cannot import the module: {error}", where=name, fix=fix) from error
    finally:
        sys.path.remove(folder)
    if not callable(function):
        raise UserError(f"the module has no function {function_name!r}", where=name, fix=fix)

    def called(argument: Any) -> Any:
        try:
            return function(argument)
        except Exception as error:
            kind = type(error).__name__
            what = f"the function raised {kind}: {first_line(error)}, for {argument!r:.80}"
            raise UserError(what, where=name) from error

    return called
