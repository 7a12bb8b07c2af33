r"""Reading and writing weights: safe loading, key renaming, model folders, EMA, atomic files.

Nothing here runs code out of a file: pickles are read weights-only. A published checkpoint goes
through four steps, each a function on plain dicts:

    >>> raw = load_state("published.pth.tar")
    >>> state, which = extract_state_dict(raw)
    >>> state = rename_keys(strip_prefix(state, "module."), [(r"^backbone\.", "net.")])
    >>> print(compare_keys(state, model.state_dict()).summary())
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import pickle
import re
import secrets
import struct
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from tenfold.errors import UserError

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

_SHOWN_KEYS = 3
_AGAIN = "download or copy it again"
_WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml)", re.IGNORECASE)


def load_state(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file onto the CPU without running any code in it.

    Args:
        path: .pt, .pth, .tar, .ckpt (anything that `torch.save` wrote) or .safetensors. An
            `argparse.Namespace` and NumPy's numbers are allowed inside, since many published
            checkpoints carry them.

    Returns:
        The dict as it was saved: a bare state dict, or one with "state_dict", "epoch" and so on.

    Raises:
        UserError: if the file is missing, damaged, no checkpoint, or would need to run code.
    """
    path = Path(path)
    _refuse_what_is_no_checkpoint(path)
    if path.suffix == ".safetensors":
        return dict(_load_safetensors(path))
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unpickling_error(path, error) from error
    except Exception as error:
        # A damaged file may fail in any layer below (zip, pickle, storage), with any exception.
        raise UserError("the checkpoint is damaged", where=str(path), fix=_AGAIN) from error
    if not isinstance(raw, dict):
        raise UserError(f"a {type(raw).__name__}, not a dict of weights", where=str(path))
    return raw


def _numpy_numbers() -> list[Any]:
    """What a pickled NumPy number, such as a best accuracy, is made of, in all versions."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8")}
    names = [f"{module}.multiarray.scalar" for module in ("numpy.core", "numpy._core")]
    return [np.dtype, *kinds, *((scalar, name) for name in names)]


_HARMLESS: list[Any] = [argparse.Namespace, *_numpy_numbers()]
"""What a checkpoint may hold beside tensors and plain values; nothing of it runs code."""


def _refuse_what_is_no_checkpoint(path: Path) -> None:
    if not path.exists():
        raise UserError("no such checkpoint", where=str(path))
    if path.is_dir():
        raise UserError("a folder, not a checkpoint file", where=str(path))
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"cannot read the file, {error.strerror}", where=str(path)) from error
    if not head:
        raise UserError("an empty file, not a checkpoint", where=str(path), fix=_AGAIN)
    if _WEB_PAGE.match(head):
        raise UserError("a web page, not a checkpoint", where=str(path), fix=_AGAIN)
    if head.startswith(b"version https://git-lfs"):
        fix = "fetch the file itself with: git lfs pull"
        raise UserError("a Git LFS pointer, not a checkpoint", where=str(path), fix=fix)
    if head.startswith(b"PK\x03\x04"):
        _refuse_zip_bomb(path)


def _refuse_zip_bomb(path: Path) -> None:
    # torch stores its records uncompressed: their sizes never add up to more than the file's.
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, struct.error) as error:
        raise UserError("the checkpoint is cut short", where=str(path), fix=_AGAIN) from error
    if unpacked > path.stat().st_size:
        raise UserError("a compressed archive, not a checkpoint", where=str(path))


def _unpickling_error(path: Path, error: pickle.UnpicklingError) -> UserError:
    found = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
    if found is None:
        return UserError("no checkpoint, or a damaged one", where=str(path), fix=_AGAIN)
    return UserError(
        f"reading this checkpoint would run code, {found[1]}",
        where=str(path),
        fix="save the weights alone, as a state dict",
    )


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError("the checkpoint is damaged", where=str(path), fix=_AGAIN) from error


def extract_state_dict(
    raw: Mapping[str, Any],
    prefer: Sequence[str] = ("state_dict_ema", "state_dict", "model"),
) -> tuple[dict[str, Tensor], str]:
    """Find the weights in what `load_state` returned.

    Args:
        raw: a checkpoint with one or more state dicts in it, or a bare state dict.
        prefer: keys to look under, the best first; keys that are absent or None are passed over.

    Returns:
        The state dict and the key it was under, "" for a bare one.

    Raises:
        UserError: if there are no weights; it lists the keys that there are.
    """
    for key in prefer:
        if _is_state_dict(raw.get(key)):
            return dict(raw[key]), key
    if _is_state_dict(raw):
        return dict(raw), ""
    keys = ", ".join(map(str, list(raw)[:10])) or "none"
    raise UserError(f"no weights under {', '.join(prefer)}", where=f"keys: {keys}")


def _is_state_dict(value: Any) -> bool:
    # nn.Module.get_extra_state may put anything under "_extra_state".
    return (
        isinstance(value, Mapping)
        and any(isinstance(v, Tensor) for v in value.values())
        and all(
            isinstance(k, str) and (isinstance(v, Tensor) or k.endswith("_extra_state"))
            for k, v in value.items()
        )
    )


def rename_keys(state: Mapping[str, Tensor], table: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Rename the keys of a state dict.

    Args:
        state: not changed; the tensors are shared, not copied.
        table: (regular expression, replacement) pairs as for `re.sub`, all applied in this order.

    Returns:
        A dict in the order of ``state``.

    Raises:
        ValueError: if two keys would become one.
    """
    rules = [(re.compile(pattern), replacement) for pattern, replacement in table]
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for old, tensor in state.items():
        new = old
        for pattern, replacement in rules:
            new = pattern.sub(replacement, new)
        if new in renamed:
            raise ValueError(f"{origin[new]!r} and {old!r} would both be called {new!r}")
        renamed[new], origin[new] = tensor, old
    return renamed


def strip_prefix(state: Mapping[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    """Take ``prefix`` (DistributedDataParallel's by default) off the keys that start with it."""
    return rename_keys(state, [("^" + re.escape(prefix), "")])


@dataclass(frozen=True)
class KeyReport:
    """How a state dict fits a model.

    Attributes:
        missing: keys that only the model has.
        unexpected: keys that only the file has.
        mismatched: (key, shape in the file, shape in the model) where both have the key.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def fits(self) -> bool:
        """Whether the state loads strictly."""
        return not (self.missing or self.unexpected or self.mismatched)

    def summary(self) -> str:
        """One line: the counts, each with the first few keys."""
        if self.fits:
            return "all keys fit"
        shapes = [f"{key}: {there} instead of {here}" for key, there, here in self.mismatched]
        parts = [("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", shapes)]
        return "; ".join(f"{len(keys)} {what}{_first_of(keys)}" for what, keys in parts if keys)


def _first_of(keys: Sequence[str]) -> str:
    more = ", ..." if len(keys) > _SHOWN_KEYS else ""
    return f" ({', '.join(keys[:_SHOWN_KEYS])}{more})"


def compare_keys(state: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> KeyReport:
    """Compare the keys and shapes of a file with those of a model, before loading."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    wanted = {key: tuple(tensor.shape) for key, tensor in model_state.items()}
    return KeyReport(
        missing=tuple(key for key in wanted if key not in shapes),
        unexpected=tuple(key for key in shapes if key not in wanted),
        mismatched=tuple(
            (key, shapes[key], shape)
            for key, shape in wanted.items()
            if key in shapes and shapes[key] != shape
        ),
    )


def save_model(folder: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a model folder: model.safetensors and config.json.

    These are the names that huggingface_hub reads and writes, so `from_pretrained` of its
    `PyTorchModelHubMixin` opens the folder, and a folder of the mixin opens with
    `load_model_files`. Values are kept bit by bit; tensors that share memory are written out
    once each.

    Args:
        folder: made if need be.
        state: names and tensors, on any device.
        config: constructor arguments, plain JSON values.

    Raises:
        TypeError, ValueError: if ``config`` is not plain JSON; nothing has been written then.
    """
    folder = Path(folder)
    text = json.dumps(dict(config), indent=2, allow_nan=False) + "\n"
    # safetensors takes neither views nor shared memory.
    owned = {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in state.items()
    }
    data = safetensors.torch.save(owned, metadata={"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((WEIGHTS_FILE, data), (CONFIG_FILE, text.encode())):
        with atomic_file(folder / name) as file:
            file.write(content)


def load_model_files(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a folder of `save_model`.

    Returns:
        The state dict on the CPU, and the config.

    Raises:
        UserError: if one of the two files is missing or damaged.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"no model folder, {name} is missing", where=str(folder))
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("not valid JSON", where=str(folder / CONFIG_FILE)) from error
    if not isinstance(config, dict):
        raise UserError("not a JSON object", where=str(folder / CONFIG_FILE))
    return load_state(folder / WEIGHTS_FILE), config


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under ``path`` complete, or not at all.

    It is written under another name in the same folder, flushed to the disk and renamed, so a
    reader, or a process killed at any moment, finds either the former content or the new one.
    What a killed process left behind is swept away by the next one that succeeds.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # The rename itself is safe only once the folder is on the disk; Windows cannot open folders.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning plugin that writes checkpoints through `atomic_file`.

    A job killed while it saves keeps its former checkpoint. Lightning's own plugin serialises to
    memory first and does not flush to the disk; this one streams, and flushes.

    Example:
        >>> Trainer(plugins=[AtomicCheckpointIO()])
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``; remote paths (``s3://...``) go Lightning's way."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            torch.save(checkpoint, file)


def ema_decay(step: int, decay: float) -> float:
    """Decay of an exponential moving average at ``step``, counted from 0.

    min(decay, (1 + step) / (10 + step)): young averages forget their random start quickly.
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def ema_update(
    ema_state: Mapping[str, Tensor], state: Mapping[str, Tensor], decay: float
) -> Mapping[str, Tensor]:
    """Move an exponential moving average one step, in place: ema <- decay ema + (1 - decay) state.

    Parameters and floating-point buffers are averaged, in the dtype and on the device of the
    average (keep it in float32). Integer and boolean buffers, such as counters, are copied.
    Tied tensors, which a state dict lists under several names, move once.

    Args:
        ema_state: the average, for instance ``teacher.state_dict()``.
        state: the current values under the same keys, with the same shapes.
        decay: in [0, 1]; 1 leaves the average as it is.

    Returns:
        ``ema_state`` itself.

    Raises:
        ValueError: if keys or shapes differ, ``decay`` is out of range, or a floating-point
            tensor of the average is the very tensor it should average. Nothing has moved then.
    """
    _check_ema(ema_state, state, decay)
    averages: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    values: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    seen: set[tuple[int, int, int]] = set()
    for key, average in ema_state.items():
        # The same memory, be it under another name or transposed.
        start = int(average.storage_offset())
        memory = (average.untyped_storage().data_ptr(), start, average.numel())
        if average.numel() and memory in seen:
            continue
        seen.add(memory)
        if average.is_floating_point() or average.is_complex():
            group = (average.device, average.dtype)
            averages[group].append(average)
            values[group].append(state[key].to(average))
        else:
            average.copy_(state[key])
    # One fused call per device and dtype instead of one per tensor.
    for group, tensors in averages.items():
        torch._foreach_lerp_(tensors, values[group], 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]
    return ema_state


def _check_ema(ema_state: Mapping[str, Tensor], state: Mapping[str, Tensor], decay: float) -> None:
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must lie in [0, 1], not {decay}")
    report = compare_keys(state, ema_state)
    if not report.fits:
        raise ValueError(f"the average and the state differ: {report.summary()}")
    for key, average in ema_state.items():
        if not average.is_floating_point() or not average.numel():
            continue
        if average.data_ptr() == state[key].data_ptr():
            raise ValueError(
                f"{key!r} is averaged with itself: clone the state to start an average"
            )
