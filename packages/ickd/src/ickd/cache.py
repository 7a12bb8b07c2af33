"""Features of a teacher, computed once where every image always looks the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ickd.networks import Network
from tenfold.checkpoint import atomic_file
from tenfold.distillation import Taps
from tenfold.errors import UserError
from tenfold.progress import track

FIELDS = ("logits", "pooled", "last")


class TeacherCache:
    """Rows of a teacher's taps by the index of the image in the training split.

    Args:
        tensors: "logits", "pooled", "last", "maps.0", ..., "preacts.0", ...: the items first.
        belongs: fingerprints of the teacher and of the data.
        stem: see `Taps`.
    """

    def __init__(
        self, tensors: dict[str, Tensor], belongs: dict[str, str], stem: bool = True
    ) -> None:
        self.tensors, self.belongs, self.stem = tensors, belongs, stem

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def rows(self, index: Tensor) -> Taps:
        """Taps of some images.

        Args:
            index: (batch,) positions in the training split.
        """
        at = {}
        for name, tensor in self.tensors.items():
            at[name] = tensor.index_select(0, index.to(tensor.device)).to(index.device)
        fields = {field: at.get(field) for field in FIELDS}
        maps, preacts = _numbered(at, "maps"), _numbered(at, "preacts")
        return Taps(maps, preacts=preacts, stem=self.stem, **fields)

    @classmethod
    @torch.no_grad()
    def compute(
        cls, teacher: Network, data: Any, *, keep: Sequence[str] = (), progress: bool = False
    ) -> TeacherCache:
        """Run the teacher once over the training split.

        Args:
            teacher: in eval mode.
            data: a data module that is set up and augments nothing.
            keep: fields of `Taps` to keep; all if left out.
            progress: show it.

        Raises:
            UserError: images that look different in every epoch.
        """
        unknown = {*keep} - {*FIELDS, "maps", "preacts"}
        if unknown:
            fix = f"choose from {', '.join(FIELDS)}, maps, preacts"
            raise UserError(f"features have no field {', '.join(sorted(unknown))}", fix=fix)
        _check_data(data)
        teacher.eval()
        place = next(teacher.parameters()).device
        batches: Iterable[Any] = data.still_loader()
        rows: dict[str, list[Tensor]] = {}
        stem = True
        for batch in track(batches, label="teacher") if progress else batches:
            taps = teacher.taps(batch.image.to(place))
            stem = taps.stem
            for name, value in _fields(taps, keep).items():
                rows.setdefault(name, []).append(value.cpu())
        tensors = {name: torch.cat(parts) for name, parts in rows.items()}
        return cls(tensors, _belongs(teacher, data), stem)

    def write(self, path: Path) -> None:
        """Write a safetensors file, complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"belongs": json.dumps(self.belongs), "stem": str(self.stem)}
        content = save(self.tensors, metadata=metadata)
        with atomic_file(path) as file:
            file.write(content)

    @classmethod
    def open(cls, path: str | Path, teacher: Network, data: Any) -> TeacherCache:
        """Read a file of `write`, if it is of this teacher and these images.

        Raises:
            UserError: it is missing or damaged, or of another teacher, data set or transform; or
                images look different in every epoch.
        """
        path = Path(path)
        _check_data(data)
        if not path.is_file():
            fix = "make it with ickd cache-teacher"
            raise UserError("no such file of cached features", where=str(path), fix=fix)
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            belongs = json.loads(metadata["belongs"])
            tensors = load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError("damaged, or no file of cached features", where=str(path)) from error
        for what, mine in _belongs(teacher, data).items():
            if belongs.get(what) != mine:
                raise UserError(
                    f"the cached features are of another {what}",
                    where=str(path),
                    fix="make them anew with ickd cache-teacher",
                )
        return cls(tensors, belongs, metadata.get("stem") != "False")


def _numbered(tensors: dict[str, Tensor], part: str) -> tuple[Tensor, ...]:
    names = sorted(
        (n for n in tensors if n.startswith(f"{part}.")), key=lambda n: int(n[len(part) + 1 :])
    )
    return tuple(tensors[name] for name in names)


def _fields(taps: Taps, keep: Sequence[str]) -> dict[str, Tensor]:
    values = {field: getattr(taps, field) for field in FIELDS}
    for part in ("maps", "preacts"):
        values |= {f"{part}.{n}": value for n, value in enumerate(getattr(taps, part))}
    return {
        name: value.contiguous()
        for name, value in values.items()
        if value is not None and (not keep or name.partition(".")[0] in keep)
    }


def _check_data(data: Any) -> None:
    if not all(hasattr(data, name) for name in ("deterministic", "still_loader", "fingerprint")):
        what = "features can be cached only of a data module that tells what its images are"
        raise UserError(what, fix="use ickd's ImageData or SegmentationData")
    if not data.deterministic:
        what = "features can be cached only of images that always look the same"
        raise UserError(what, fix="use --data.augment none")


def _belongs(teacher: Network, data: Any) -> dict[str, str]:
    """What a cache is of, by the name under which a person knows it."""
    belongs = {"teacher": teacher.fingerprint()}
    for fact, value in data.fingerprint().items():
        text = json.dumps(value, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        belongs[f"data set or transform, by its {fact}"] = digest[:16]
    return belongs
