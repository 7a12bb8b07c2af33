"""Whether a timm network is built exactly as its plain namesake."""

import re
from collections.abc import Sequence

from timm.layers.drop import DropBlock2d, DropPath
from timm.layers.patch_dropout import PatchDropout
from torch import nn

from tenfold.errors import UserError

# layers that do nothing in eval mode
_SILENT = (nn.Identity, nn.Dropout, DropPath, DropBlock2d, PatchDropout)
# what a layer's description tells beyond its function in eval mode
_MANNERS = re.compile(r"inplace=True|momentum=[^,)]+(, )?")
# class and arguments in a description; an argument may be a tuple
_CLASS, _ARGUMENT = re.compile(r"\w*"), re.compile(r"(?:\w+=)?(?:\([^()]*\)|[^,() ]+)")
_SHOWN = 2


def check_structure(model: nn.Module, plain: nn.Module, others: Sequence[str], fix: str) -> None:
    """Makes sure that `model` computes what `plain` would with the same weights.

    Args:
        model: a timm network.
        plain: what it should be like, on any device.
        others: further differences, in words.
        fix: which networks do fit.

    Raises:
        UserError: names the first differences.
    """
    found, wanted = parts(model), parts(plain)
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    # layers that are there or not tell more than sizes that follow from them
    names.sort(key=lambda name: _same_class(found.get(name, ""), wanted.get(name, "")))
    different = [*others, *(_difference(n, found.get(n), wanted.get(n)) for n in names)]
    if different:
        more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise UserError(
            f"this {type(model).__name__} cannot be converted: {'; '.join(different[:_SHOWN])}"
            f"{more}",
            fix=fix,
        )


def parts(model: nn.Module) -> dict[str, str]:
    """Class of every container, description of every layer, shapes of weights outside layers."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _SILENT):
            continue
        leaf = next(module.children(), None) is None
        found[name] = _MANNERS.sub("", repr(module)) if leaf else f"{type(module).__name__}()"
        for key, weight in () if leaf else module.named_parameters(recurse=False):
            found[f"{name}.{key}".strip(".")] = f"Parameter({tuple(weight.shape)})"
    return found


def _class(text: str) -> str:
    match = _CLASS.match(text)
    return match[0] if match else ""


def _same_class(found: str, wanted: str) -> bool:
    return _class(found) == _class(wanted)


def _difference(name: str, found: str | None, wanted: str | None) -> str:
    """In words, such as "conv2 has groups=32"."""
    name = name or "the network"
    if found is None:
        return f"{name} is missing"
    if wanted is None:
        return f"{name} is one {_class(found)} too many"
    if not _same_class(found, wanted):
        return f"{name} is a {_class(found)}, not a {_class(wanted)}"
    here, there = (_ARGUMENT.findall(text.partition("(")[2][:-1]) for text in (found, wanted))
    has = ", ".join(word for word in here if word not in there)
    lacks = ", ".join(word for word in there if word not in here)
    if not has:
        return f"{name} lacks {lacks}"
    return f"{name} has {has}" + (f", not {lacks}" if lacks else "")
