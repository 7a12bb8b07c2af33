"""CLIP under the names of OpenAI and open_clip, which are this package's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from filip_vl.convert.common import Converted
from tenfold.checkpoint import strip_prefix
from tenfold.errors import UserError

_SETTINGS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "logit_bias")
"""Tensors beside the weights, in OpenAI's archives and in old and other models of open_clip."""

_HEAD_WIDTH = 64
_CUSTOM_TEXT = "text."
_BLOCK = "resblocks."


def convert_openai(
    state: Mapping[str, Tensor], source: str, fields: Mapping[str, Any]
) -> Converted:
    """Weights of OpenAI or open_clip, of any precision.

    Args:
        state: keys may begin with `module.` (parallel training), those of the text tower with
            `text.` (open_clip's models of custom towers).
        source: "openai" or "open_clip".
        fields: of the configuration, that the shapes do not tell: act, and heads unless they are
            64 wide.

    Raises:
        UserError: no CLIP with a vision transformer, or heads that no one tells.
    """
    plain = strip_prefix(state)
    if f"{_CUSTOM_TEXT}token_embedding.weight" in plain:
        plain = strip_prefix(plain, _CUSTOM_TEXT)
    ignored = tuple(key for key in plain if key in _SETTINGS)
    weights = {key: tensor for key, tensor in plain.items() if key not in ignored}
    return Converted(source, fields_of(weights, fields), weights, ignored)


def fields_of(state: Mapping[str, Tensor], told: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that shapes tell, completed by what they do not.

    Args:
        state: under this package's names.
        told: other fields; they go before those of the shapes.

    Raises:
        UserError: no CLIP with a vision transformer, or heads that no one tells.
    """
    conv = _weight(state, "visual.conv1.weight")
    positions = len(_weight(state, "visual.positional_embedding"))
    embedding = _weight(state, "token_embedding.weight")
    grid = math.isqrt(max(positions - 1, 0))
    if conv.ndim != 4 or grid**2 != positions - 1:
        raise UserError("the image tower is no vision transformer on square images")
    fields = {
        "image_size": grid * conv.shape[-1],
        "patch_size": conv.shape[-1],
        "vision_width": len(conv),
        "vision_layers": _layers(state, "visual.transformer."),
        "text_width": embedding.shape[1],
        "text_layers": _layers(state, "transformer."),
        "context_length": len(_weight(state, "positional_embedding")),
        "vocab_size": len(embedding),
    }
    for tower in ("vision", "text"):
        if f"{tower}_heads" not in told:
            fields[f"{tower}_heads"] = _heads(tower, fields[f"{tower}_width"])
    for projection in ("visual.proj", "text_projection"):
        if projection in state:
            fields["embed_dim"] = state[projection].shape[1]
    return fields | dict(told)


def _weight(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        first = ", ".join(list(state)[:3]) or "none"
        raise UserError(
            f"no CLIP with a vision transformer: {key} is missing", where=f"keys: {first}, ..."
        )
    return state[key]


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    start = prefix + _BLOCK
    numbers = {key[len(start) :].partition(".")[0] for key in state if key.startswith(start)}
    return max(len(numbers), 1)


def _heads(tower: str, width: int) -> int:
    if width % _HEAD_WIDTH:
        raise UserError(
            f"no weight tells the heads of the {tower} tower, and {width} is no multiple of "
            f"{_HEAD_WIDTH}",
            fix=f"give {tower}_heads",
        )
    return width // _HEAD_WIDTH
