"""What commands say in a terminal, and ask of the numbers that they are given."""

from __future__ import annotations

from collections.abc import Sequence

from tenfold.errors import UserError


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of as many cells in columns, the first of them the heads.

    Args:
        rows: at least one.
        left: how many columns are flush left; the others are flush right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if n < left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def at_least(least: float, **values: float | None) -> None:
    """Make sure that numbers of the command line are not too small; None passes.

    Raises:
        UserError: names the option.
    """
    for name, value in values.items():
        if value is not None and not value >= least:  # NaN is refused
            raise UserError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
