"""What the constructors of all families make sure of before anything is built."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from tenfold.errors import UserError

_COUNTS = {  # the least value of whole numbers
    "num_classes": 0,
    "in_channels": 1,
    "image_size": 1,
    "gate_outputs": 0,  # `default_space` asks for more, once the routes are known
    "gate_hidden": 0,
    "gate_stage": 0,
    "stem_stride": 1,
    "stem_width": 1,
    "kernel_size": 1,
    "group_size": 1,
    "head_dim": 1,
    "patch_size": 1,
    "front_blocks": 0,
}
_SHARES = ("dropout", "drop_path")
_RATIOS = ("squeeze_ratio", "front_rho")
_LISTS = {  # how deep numbers lie in lists of lists
    "depths": 1,
    "strides": 1,
    "front_widths": 1,
    "stem_widths": 1,
    "base_widths": 1,
    "front": 1,
    "rhos": 1,
    "stage_widths": 2,
    "routes": 2,
}
_POSITIVE = ("strides", "front_widths")  # lists whose users do not look themselves


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, object]:
    """A constructor's arguments with lists for tuples and ranges, as JSON and YAML keep them.

    Raises:
        UserError: names the first argument that is of another kind, or too small or large to build
            anything with.
    """
    for name, value in arguments.items():
        wanted = _misfit(name, value)
        if wanted is not None:
            raise UserError(f"{name} must be {wanted}, got {plain(value)!r}")
    return {name: plain(value) for name, value in arguments.items()}


def _misfit(name: str, value: Any) -> str | None:
    """What an argument should be where it is not, else None."""
    if name in _COUNTS and not (_number(value, whole=True) and value >= _COUNTS[name]):
        return f"a whole number of {_COUNTS[name]} or more"
    if name in _SHARES and not (_number(value) and 0 <= value < 1):
        return "a share from 0 to below 1"
    if name in _RATIOS and not (_number(value) and value > 0):
        return "a number above 0"
    if name in _LISTS and not _nested(value, _LISTS[name]):
        return "a list of numbers" if _LISTS[name] == 1 else "a list of lists of numbers"
    if name in _POSITIVE and not all(_number(v, whole=True) and v > 0 for v in value):
        return "whole numbers of 1 or more"
    return None


def _nested(value: Any, depth: int) -> bool:
    if depth == 0:
        return _number(value)
    return isinstance(value, list | tuple | range) and all(_nested(v, depth - 1) for v in value)


def _number(value: Any, whole: bool = False) -> bool:
    kind = int if whole else Real
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def plain(value: object) -> object:
    """Tuples and ranges as lists, at any depth."""
    return [plain(v) for v in value] if isinstance(value, list | tuple | range) else value
