"""What an index is made of, and how far it is: its meta.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from filip_vl.model import FilipConfig, FilipModel
from tenfold.checkpoint import atomic_file
from tenfold.errors import UserError

META_FILE = "meta.json"
VERSION = 1

Dtype = Literal["fp16", "int8"]
"""How tokens are stored: int8 has a scale for every token, and half the size."""

_SHOWN = 12  # digits of a hash


@dataclass(frozen=True)
class IndexFormat:
    """What must be the same for all images of an index, and for what it is searched with.

    Attributes:
        checkpoint: hash of the model, see `checkpoint_hash`.
        width: of the tokens.
        dtype: how they are stored.
        token_fraction: the share of each image's tokens that is kept.
        tokens_per_image: how many the model makes of an image.
        leading: how many of these come before the patches (the class token).
        preprocessing: from an image to the model's pixels.
        version: of the layout of the files.
    """

    checkpoint: str
    width: int
    dtype: Dtype
    token_fraction: float
    tokens_per_image: int
    leading: int
    preprocessing: Mapping[str, Any]
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Dtype):
            known = ", ".join(get_args(Dtype))
            raise UserError(f"tokens are stored as one of {known}, not {self.dtype!r}")
        if not 0 < self.token_fraction <= 1:
            what = f"the share of tokens to keep must be above 0 up to 1, got {self.token_fraction}"
            raise UserError(what, where="token_fraction")

    @property
    def whole(self) -> bool:
        """Whether all tokens are kept."""
        return self.token_fraction == 1

    @property
    def position_dtype(self) -> str:
        """Of the places of kept tokens: one byte, two where an image has more than 256 tokens."""
        return "uint8" if self.tokens_per_image <= 1 << 8 else "int16"

    def require(self, other: IndexFormat, where: str) -> None:
        """Make sure that another format is the same.

        Raises:
            UserError: it is not; names what differs, of both.
        """
        if other.checkpoint != self.checkpoint:
            refuse_checkpoint(self.checkpoint, other.checkpoint, where)
        mine, others = asdict(self), asdict(other)
        changed = [
            f"{key} {mine[key]} there, {others[key]} here"
            for key in mine
            if mine[key] != others[key]
        ]
        if changed:
            fix = "give the options that it was begun with, or another folder"
            raise UserError(
                f"the index was built otherwise: {'; '.join(changed)}", where=where, fix=fix
            )


@dataclass(frozen=True)
class Extent:
    """How far an index is; what is behind in its files does not count.

    Attributes:
        images: rows, images that could not be read included.
        skipped: images that could not be read.
        tokens: of all images.
        item_bytes: of items.jsonl.
        complete: whether all images were met.
    """

    images: int = 0
    skipped: int = 0
    tokens: int = 0
    item_bytes: int = 0
    complete: bool = False


@dataclass(frozen=True)
class IndexMeta:
    """The content of meta.json, which is written last and in one step: what counts is what it says.

    Attributes:
        format: what must be the same for all images.
        extent: how far the index is.
        ckpt: where the model was, to be found again.
    """

    format: IndexFormat
    extent: Extent = Extent()
    ckpt: str = ""

    @classmethod
    def read(cls, folder: Path) -> IndexMeta | None:
        """The meta.json of a folder, None where there is none.

        Raises:
            UserError: it is damaged, or of another version.
        """
        file = folder / META_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text("utf-8"))
            version = content.get("version")
            if version == VERSION:
                format = IndexFormat(**_named(IndexFormat, content))
                return cls(format, Extent(**_named(Extent, content)), content["ckpt"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"not the meta.json of an index: {error}", where=str(file)) from error
        what = f"an index of version {version}, where this program knows {VERSION}"
        raise UserError(what, where=str(file), fix="build it anew")

    def write(self, folder: Path) -> None:
        """Write meta.json, complete or not at all."""
        content = asdict(self.format) | asdict(self.extent) | {"ckpt": self.ckpt}
        with atomic_file(folder / META_FILE) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())


def _named(kind: type[IndexFormat] | type[Extent], content: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: content[field.name] for field in fields(kind)}


def checkpoint_hash(model: FilipModel) -> str:
    """SHA-256 of a model's configuration and weights, wherever they are stored.

    Fields of the configuration at their defaults are left out, so that one that is new in a later
    version of this package does not make every index a foreign one.
    """
    usual = FilipConfig().to_dict()
    config = {name: x for name, x in model.config.to_dict().items() if x != usual[name]}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def refuse_checkpoint(there: str, here: str, where: str) -> None:
    """Tell that an index is of another model.

    Raises:
        UserError: always; names both hashes.
    """
    raise UserError(
        f"the index was built by another checkpoint: {there[:_SHOWN]} there, {here[:_SHOWN]} here",
        where=where,
        fix="take the checkpoint that built it, or build another index",
    )
