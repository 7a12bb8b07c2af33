"""What could not be used: counted, and too much where it is more than a share of all."""

import logging
from collections.abc import Sequence

from filip_vl.data.streaming import BlankCaption
from tenfold.data import BadItem, BadItems
from tenfold.errors import UserError

log = logging.getLogger(__name__)

_NAMED = 3  # offenders that the error names


class PairBadItems(BadItems):
    """Counts unusable pairs of one split and stops the run where they are too many.

    Args:
        split: what the pairs are.
        size: how many there are.
        skip: False stops at the first.
        strict: stop at the first empty caption that a stream meets.
        most: share of `size` that may be unusable, 0 to 1.
    """

    def __init__(self, split: str, size: int, *, skip: bool, strict: bool, most: float) -> None:
        super().__init__(split, size, skip)
        self.strict, self.most = strict, most
        self.blank = self._told = 0
        """Empty captions that a stream left out."""

    def add(self, bad: Sequence[BadItem]) -> None:
        """Counts `bad`.

        Raises:
            UserError: it is not to be skipped, or too much by now.
        """
        blank = [item for item in bad if isinstance(item, BlankCaption)]
        if blank and self.strict:
            fix = "mend it, or leave out --data.strict to drop such pairs"
            raise UserError(f"{blank[0].reason} in {self.split}", fix=fix)
        self.blank += len(blank)
        super().add([item for item in bad if not isinstance(item, BlankCaption)])
        if len(self.reasons) > self.most * self.size:
            first = "; ".join(list(self.reasons.values())[:_NAMED])
            what = f"{len(self.reasons)} of the {self.size} items of {self.split} are unusable"
            raise UserError(
                f"{what}, more than the share {self.most:g}: {first}",
                fix="mend them, or raise --data.max_bad_fraction",
            )

    def report(self) -> None:
        """Logs what was left out since the last report."""
        super().report()
        if self.blank > self._told:
            log.warning("%d empty captions of %s were dropped", self.blank, self.split)
            self._told = self.blank
