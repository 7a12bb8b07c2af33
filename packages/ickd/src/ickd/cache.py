"""Features of a teacher, computed once where every image always looks the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save
from torch import Tensor

from ickd.networks import Network
from tenfold.checkpoint import atomic_file
from tenfold.distillation import Taps
from tenfold.errors import UserError
from tenfold.progress import track

FIELDS, LISTS = ("logits", "pooled", "last"), ("maps", "preacts")

_LARGE = 2**30  # bytes of features whose size is told before they are computed


def named_parts(taps: Taps) -> dict[str, Tensor]:
    """All that a network says, by the names of `TeacherCache`: "logits", ..., "maps.0", ..."""
    values = {field: getattr(taps, field) for field in FIELDS}
    for part in LISTS:
        values |= {f"{part}.{n}": value for n, value in enumerate(getattr(taps, part))}
    return {name: value for name, value in values.items() if value is not None}


def fits(size: int, device: torch.device) -> bool:
    """Whether features may lie on a device: on CUDA, if they take less than a quarter of its rest.

    Args:
        size: bytes.
        device: where batches are.
    """
    return device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 4


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
        self._met: torch.device | None = None

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def size(self) -> int:
        """Bytes of all features."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def rows(self, index: Tensor) -> Taps:
        """Taps of some images, where the index is; maps that are not kept are empty.

        The first call moves all features there, if they fit.

        Args:
            index: (batch,) positions in the training split.
        """
        device = index.device
        if device != self._met:  # asked once: what is free later is for training
            self._met = device
            if fits(self.size, device):
                self.tensors = {name: value.to(device) for name, value in self.tensors.items()}
        chosen = index.to(next(iter(self.tensors.values())).device)
        at = {name: _rows(tensor, chosen, device) for name, tensor in self.tensors.items()}
        fields = {field: at.get(field) for field in FIELDS}
        nothing = torch.zeros(len(index), 0, 0, 0, device=device)
        maps, preacts = (_numbered(at, part, nothing) for part in LISTS)
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
            keep: what to keep, fields of `Taps` or single maps such as "maps.3"; all if left out.
            progress: show it.

        Raises:
            UserError: images that look different in every epoch, or nothing of what is to be kept.
        """
        _check_names(keep)
        _check_data(data)
        teacher.eval()
        place = next(teacher.parameters()).device
        batches: Any = data.still_loader()
        rows: dict[str, list[Tensor]] = {}
        stem = True
        for batch in track(batches, label="teacher") if progress else batches:
            taps = teacher.taps(batch.image.to(place))
            stem, kept = taps.stem, _kept(taps, keep)
            if not rows:
                _tell_size(kept, len(batches.dataset))
            for name, value in kept.items():
                rows.setdefault(name, []).append(value.cpu())
        # one after the other, so that little is there twice
        tensors = {name: torch.cat(rows.pop(name)) for name in [*rows]}
        return cls(tensors, _belongs(teacher, data), stem)

    def write(self, path: Path) -> None:
        """Write a safetensors file, complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"belongs": json.dumps(self.belongs), "stem": str(self.stem)}
        content = save(self.tensors, metadata=metadata)
        with atomic_file(path) as file:
            file.write(content)

    @classmethod
    def open(
        cls, path: str | Path, teacher: Network, data: Any, *, needs: Sequence[str] = ()
    ) -> TeacherCache:
        """Read a file of `write`, if it is of this teacher and these images.

        Args:
            path: of the file.
            teacher: whose features are wanted.
            data: a data module that is set up and augments nothing.
            needs: names of tensors that must be in it; others are not read then.

        Raises:
            UserError: it is missing or damaged, of another teacher, data set or transform, or lacks
                what is needed; or images look different in every epoch.
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
                there = [*file.keys()]
                read = [name for name in there if name in needs] if needs else there
                tensors = {name: file.get_tensor(name) for name in read}
        except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError("damaged, or no file of cached features", where=str(path)) from error
        for what, mine in _belongs(teacher, data).items():
            if belongs.get(what) != mine:
                raise UserError(
                    f"the cached features are of another {what}",
                    where=str(path),
                    fix="make them anew with ickd cache-teacher",
                )
        absent = [name for name in needs if name not in tensors]
        if absent:
            what = f"the cached features are without {', '.join(absent)}, which the losses compare"
            fix = f"make them anew with ickd cache-teacher --keep {','.join(needs)}"
            raise UserError(what, where=str(path), fix=fix)
        return cls(tensors, belongs, metadata.get("stem") != "False")


def _rows(tensor: Tensor, index: Tensor, device: torch.device) -> Tensor:
    if (tensor.device.type, device.type) != ("cpu", "cuda"):
        return tensor.index_select(0, index).to(device)
    # out of page-locked memory the copy runs beside the student's forward pass
    chosen = torch.empty(len(index), *tensor.shape[1:], dtype=tensor.dtype, pin_memory=True)
    torch.index_select(tensor, 0, index, out=chosen)
    return chosen.to(device, non_blocking=True)


def _numbered(tensors: dict[str, Tensor], part: str, nothing: Tensor) -> tuple[Tensor, ...]:
    """All maps up to the last that is kept, `nothing` in place of those that are not."""
    numbers = {int(name.partition(".")[2]): name for name in tensors if name.startswith(f"{part}.")}
    count = max(numbers, default=-1) + 1
    return tuple(tensors[numbers[n]] if n in numbers else nothing for n in range(count))


def _kept(taps: Taps, keep: Sequence[str]) -> dict[str, Tensor]:
    parts = named_parts(taps)
    lacking = [k for k in keep if not any(k in (name, name.partition(".")[0]) for name in parts)]
    if lacking:
        what = f"the teacher gives no {', '.join(lacking)}"
        raise UserError(what, fix=f"it gives {', '.join(parts)}")
    return {
        name: value.contiguous()
        for name, value in parts.items()
        if not keep or {name, name.partition(".")[0]} & {*keep}
    }


def _tell_size(batch: Mapping[str, Tensor], images: int) -> None:
    size = sum(value.nbytes / len(value) for value in batch.values()) * images
    if size > _LARGE:
        parts = ", ".join(batch)
        rank_zero_info(f"features of {images} images will take {size / 2**30:.1f} GiB: {parts}")


def _check_names(keep: Sequence[str]) -> None:
    unknown = {*keep} - {*FIELDS, *LISTS}
    unknown = {name for name in unknown if not re.fullmatch(rf"({'|'.join(LISTS)})\.\d+", name)}
    if unknown:
        fix = f"choose from {', '.join([*FIELDS, *LISTS])}, or one map such as maps.3"
        raise UserError(f"features have no field {', '.join(sorted(unknown))}", fix=fix)


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
