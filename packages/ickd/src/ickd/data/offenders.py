"""Items that cannot be used: up to ten of them are told at once."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from tenfold.data import BROKEN, BadItem, BadItems
from tenfold.errors import UserError
from tenfold.progress import track

MOST_OFFENDERS = 10
"""Unusable items that one error names."""

_LONGEST = 60.0  # seconds for which further offenders are looked for
_DECODERS = min(8, os.cpu_count() or 1)
_AT_ONCE = 64


def find_offenders(
    read: Callable[[int], object],
    count: int,
    label: str,
    *,
    known: Mapping[int, str] | None = None,
    seconds: float = math.inf,
) -> UserError | None:
    """Read items, in threads, until ten are found that cannot be used.

    Args:
        read: reads an item by its number, and raises one of `tenfold.data.BROKEN` for a bad one.
        count: of all items.
        label: what is done, for the progress that is shown.
        known: what is wrong with some of them, by their numbers.
        seconds: after which no more are read.

    Returns:
        What is wrong with each; None if nothing is.
    """

    def reason(number: int) -> str | None:
        try:
            read(number)
        except UserError as error:
            return f"{error.what} ({error.where})" if error.where else error.what
        except BROKEN as error:
            return repr(error)
        return None

    found, seen, end = dict(known or {}), 0, time.monotonic() + seconds
    for number, why in enumerate(track(_in_parallel(reason, count), count, label)):
        seen = number + 1
        if why:
            found[number] = why
        if len(found) >= MOST_OFFENDERS or time.monotonic() > end:
            break
    if not found:
        return None
    whole = seen == count or len(found) >= MOST_OFFENDERS
    most = f"the first {MOST_OFFENDERS}" if len(found) >= MOST_OFFENDERS else f"{len(found)}"
    of = f"{count} items" if whole else f"{count} items, of which {seen} were read"
    fix = "mend them, or leave such items out with --data.on_bad_item skip"
    reasons = [*found.values()][:MOST_OFFENDERS]
    return UserError(f"{most} unusable of {of}: {'; '.join(reasons)}", fix=fix)


def _in_parallel(function: Callable[[int], str | None], count: int) -> Iterator[str | None]:
    """Results in order, some items at a time: what comes after the tenth offender is not read."""
    with ThreadPoolExecutor(_DECODERS) as pool:
        for start in range(0, count, _AT_ONCE):
            yield from pool.map(function, range(start, min(start + _AT_ONCE, count)))


class Offenders(BadItems):
    """At the first unusable item, reads the others for up to a minute to name them too.

    Args:
        split: what the items are.
        read: reads one by its number.
        count: of all items.
    """

    def __init__(self, split: str, read: Callable[[int], object], count: int) -> None:
        super().__init__(split, count, skip=False)
        self.read = read

    def add(self, bad: Sequence[BadItem]) -> None:
        """Raises UserError for what is wrong with up to ten items, if anything is."""
        if bad:
            known = {item.index: item.reason for item in bad}
            label = f"looking for unusable items of {self.split}"
            error = find_offenders(self.read, self.size, label, known=known, seconds=_LONGEST)
            assert error is not None
            raise error from RuntimeError(bad[0].trace)
