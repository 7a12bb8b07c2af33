"""The tensors of a TorchScript archive, such as OpenAI's, without running any code of it.

The archive's data.pkl describes a tree of objects. Here every class in it is inert: it keeps what
it is given and does nothing, except the few that tensors are made of.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.errors import UserError

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """All tensors of a TorchScript archive under their dotted names, on the CPU.

    Raises:
        UserError: the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            [data] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            records = _Records(archive, data.removesuffix(".pkl"), path.stat().st_size)
            tree = _Unpickler(records, records.read(data)).load()
        return dict(_tensors(tree))
    except Exception as error:  # a damaged file may fail in any way
        fix = "download or copy it again"
        raise UserError("the archive is damaged", where=str(path), fix=fix) from error


class _Records:
    """The records of an archive; none is larger than the file, since they are not compressed."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, limit: int) -> None:
        self.archive, self.folder, self.limit = archive, folder, limit
        self.storages: dict[str, Tensor] = {}

    def read(self, name: str) -> bytes:
        if self.archive.getinfo(name).file_size > self.limit:
            raise ValueError(f"{name} is compressed")
        return self.archive.read(name)

    def storage(self, key: str, dtype: torch.dtype) -> Tensor:
        if key not in self.storages:
            content = bytearray(self.read(f"{self.folder}/{key}"))
            self.storages[key] = (
                torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            )
        return self.storages[key]


class _Inert:
    """In the place of any class that an archive names."""

    def __new__(cls, *_: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        self.content: Any = None

    def __setstate__(self, content: Any) -> None:
        self.content = content


class _Unpickler(pickle.Unpickler):
    def __init__(self, records: _Records, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.records = records

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _Inert

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, *_ = pid
        return self.records.storage(key, dtype)


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


def _tensors(node: Any, prefix: str = "") -> Any:
    """Names and tensors below a node of the tree."""
    for name, value in node.content.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Inert) and isinstance(value.content, dict):
            yield from _tensors(value, f"{prefix}{name}.")
