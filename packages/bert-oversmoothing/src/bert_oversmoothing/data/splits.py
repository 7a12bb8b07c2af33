"""The records of a source by split: read once, the broken ones settled, as many as are wanted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bert_oversmoothing.data.glue import TASKS
from bert_oversmoothing.data.own import read_own
from bert_oversmoothing.data.records import Broken, Example, Records
from bert_oversmoothing.data.sources import GENERATED, TSV, Place
from tenfold.data import BadItem, BadItems
from tenfold.distributed import ranks
from tenfold.errors import UserError
from tenfold.training import mix

log = logging.getLogger(__name__)


class Splits:
    """Records of "train", "val", "test" and, of a person's own file, "predict".

    Args:
        source: one of `SOURCES`.
        task: what is asked of its records.
        options: `root`, `hub`, `predict_root`, `train_size`, `val_size` of `OversmoothingData`.
        seed: of drawing training records.
        skip: leave broken records out, rather than raise at the first.
    """

    def __init__(
        self, source: str, task: str, options: Mapping[str, Any], seed: int, skip: bool
    ) -> None:
        self.source, self.task, self.options = source, task, options
        self.seed, self.skip = seed, skip
        self._place: Place | None = None
        self._records: dict[str, Records | None] = {}
        self._drawn: dict[str, dict[int, Any]] = {}
        self._labels: tuple[str, ...] | None = None

    @property
    def place(self) -> Place:
        """Where the source lies.

        Raises:
            UserError: nowhere.
        """
        if self._place is None:
            root = self.options["root"]
            place = None if root is None else Path(root)
            self._place = Place(self.source, place, self.options["hub"])
        return self._place

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes of a plain table, as a checkpoint knows them or else as its files have them.

        Raises:
            UserError: there is no file.
        """
        if self._labels is None:
            self._labels = tuple(self.place.labels())
        return self._labels

    def expect_labels(self, labels: Sequence[str]) -> None:
        """Takes the classes that a model has learned.

        Raises:
            UserError: those of the files are others.
        """
        if self._labels not in (None, tuple(labels)):
            what = f"the data have classes {', '.join(self._labels or ())}"
            raise UserError(f"{what}, but the model learned {', '.join(labels)}")
        self._labels = tuple(labels)

    def records(self, split: str) -> Records | None:
        """All records of a split, with what is broken among them; None if there are none.

        Raises:
            UserError: files that cannot be read, or are not what they should be.
        """
        if split not in self._records:
            self._records[split] = self._read(split)
        return self._records[split]

    def _read(self, split: str) -> Records | None:
        if split == "predict":
            return read_own(Path(self.options["predict_root"]), self.task, self._own_columns)
        names = self.labels if self.source == TSV and self.task != "mlm" else None
        return (self.place.wanted if split == "train" else self.place.read)(split, names)

    @property
    def _own_columns(self) -> tuple[str, ...]:
        if self.source in TASKS:
            return TASKS[self.source].hub_texts
        return ("question", "context") if self.source == GENERATED else ()

    def labelled(self, split: str) -> bool:
        """Whether a split tells what is to be found; hidden words always do."""
        if self.task == "mlm":
            return True
        records, name = self.records(split), "answers" if self.task == "qa" else "label"
        usable = records.usable if records else []
        return any(getattr(record, name) is not None for record in usable)

    def drawn(self, split: str) -> list[Any]:
        """The usable records of a split, or as many of them as are wanted, in their order.

        Raises:
            UserError: a broken record, unless they are to be skipped; or none that is usable.
        """
        if split not in self._drawn:
            self._drawn[split] = self._draw(split)
        return list(self._drawn[split].values())

    def validated(self) -> None:
        """Reads the validation split; where there is none, says that nothing is validated.

        Raises:
            UserError: see `drawn`.
        """
        if self.records("val") is not None:
            self.drawn("val")
        elif ranks()[0] == 0:
            log.warning("%s: nothing is validated", self.place.without_validation())

    def texts(self, split: str) -> list[dict[str, str]]:
        """`text`, and of a pair `text_pair`, of every drawn record; none where they are no texts.

        Raises:
            UserError: see `drawn`.
        """
        read = split == "predict" or self.source != GENERATED
        records = [each for each in self.drawn(split) if isinstance(each, Example)] if read else []
        pairs = ({} if each.pair is None else {"text_pair": each.pair} for each in records)
        return [{"text": each.text, **pair} for each, pair in zip(records, pairs, strict=True)]

    def _draw(self, split: str) -> dict[int, Any]:
        records = self.records(split)
        if records is None:
            raise UserError(f"source {self.source} has no {split} split here")
        self.settle(split, {})
        if not records.usable:
            raise UserError(f"no record of {split} can be used", where=self.options["root"])
        numbers = [number for number in range(records.size) if number not in records.broken]
        usable = dict(zip(numbers, records.usable, strict=True))
        size = self.options.get(f"{split}_size")
        if size is None:
            return usable
        if size > len(usable):
            raise UserError(f"{split}_size {size} is more than the {len(usable)} there are")
        seed = mix(self.seed if split == "train" else 0, 0)
        order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))
        return {numbers[k]: usable[numbers[k]] for k in sorted(order[:size].tolist())}

    def settle(self, split: str, later: Mapping[int, Broken]) -> BadItems:
        """Counts what is broken in a split, or raises for the first.

        Args:
            split: that was read, or whose items are generated.
            later: faults found since, by the number among the drawn records.

        Raises:
            UserError: something is broken, and not to be skipped.
        """
        records = self._records.get(split)
        broken = dict(records.broken) if records else {}
        numbers = list(self._drawn.get(split, ()))
        broken |= {numbers[row]: fault for row, fault in later.items()}
        bad = BadItems(split, records.size if records else 0, self.skip)
        bad.add([BadItem(n, f"{fault.id}, {fault.reason}", "") for n, fault in broken.items()])
        return bad
