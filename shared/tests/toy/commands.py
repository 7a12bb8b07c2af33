"""Its commands, one of which fails in many ways."""

from pathlib import Path
from typing import Literal

from tenfold.errors import UserError

calls = []


def work(
    source: Path,
    steps: int = 3,
    *,
    target_madds: float | None = None,
    fold_bn: bool = False,
    estimator: Literal["mask", "mixture"] = "mask",
) -> int | None:
    """Does some work.

    Args:
        source: Where from.
        steps: How many steps.
        target_madds: The budget.
        fold_bn: Folds the norms.
        estimator: Which estimator.
    """
    calls.append((source, steps, target_madds, fold_bn, estimator))
    return 0 if steps > 0 else None


def fail(how: str, *, status: int) -> int:
    if how == "user":
        raise UserError("bad width", where="--width", fix="use a whole number")
    if how == "wrapped":
        try:
            raise UserError("bad depth")
        except UserError as error:
            raise ValueError("a wrapper") from error
    if how == "bug":
        raise ZeroDivisionError("ours")
    if how == "handled":  # a bug while a UserError is handled is still a bug
        try:
            raise UserError("bad depth")
        except UserError:
            raise ZeroDivisionError("ours")  # noqa: B904
    if how == "interrupt":
        raise KeyboardInterrupt
    return status


def show(
    action: str,
    name: str | None = None,
    *,
    from_: str = "auto",
    sizes: list[int] | None = None,
) -> None:
    """Shows something.

    Args:
        action: What to do.
        name: Of what.
        from_: Where from.
        sizes: In pixels.
    """
    calls.append((action, name, from_, sizes))


def several(first: str, names: list[str] | None = None, *, last: str = "") -> None:
    """Takes many.

    Args:
        first: One.
        names: All others.
        last: Behind them.
    """
    calls.append((first, names, last))
