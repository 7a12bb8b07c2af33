"""FILIP as the model zoo of DeCLIP published it: ViT-B/32, trained on YFCC15M."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from filip_vl.convert.common import Converted
from filip_vl.convert.openai import fields_of
from tenfold.checkpoint import strip_prefix
from tenfold.errors import UserError

_TEXT = "encode_text."
_MAPPINGS = {
    "image_mapping.weight": "visual.proj",
    "image_mapping.bias": "visual.proj_bias",
    "text_mapping.weight": "text_projection",
    "text_mapping.bias": "text_projection_bias",
}
_UNUSED = ("visual.proj", "visual.ln_post.", "text_projection.", "text_label_predictor.")
"""Of the pooled vectors, and left over from an option of masked language."""


def convert_declip(state: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Converted:
    """Weights of DeCLIP's FILIP.

    Its tokens come from linear maps with a bias, the image's without a norm before it; what serves
    its pooled vectors alone is left out. Ids are its own: a mask symbol before start and end.

    Args:
        state: the model's part of the file; keys may begin with `module.`.
        fields: of the configuration; they go before what the file says.

    Raises:
        UserError: not of this program.
    """
    state = strip_prefix(state)
    missing = [key for key in _MAPPINGS if key not in state]
    if missing:
        raise UserError(f"no FILIP of DeCLIP: {', '.join(missing)} missing")
    weights, ignored = {}, []
    for key, tensor in state.items():
        name = key.removeprefix(_TEXT)
        if key in _MAPPINGS:
            weights[_MAPPINGS[key]] = tensor.T if tensor.ndim == 2 else tensor
        elif key == "logit_scale_dense":
            weights["logit_scale"] = tensor.reshape(())
        elif key == "logit_scale" or name.startswith(_UNUSED):
            ignored.append(key)
        else:
            weights[name] = tensor
    told = {
        "act": "quick_gelu",
        "proj_bias": True,
        "visual_ln_post": False,
        "min_log_scale": 3.0,
        "max_log_scale": 6.0,
    }
    note = "captions need ids with DeCLIP's mask symbol before the start: --tokenizer-layout declip"
    found = fields_of(weights, told | dict(fields))
    return Converted("declip-filip", found, weights, tuple(ignored), (note,))
