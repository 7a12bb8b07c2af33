"""CLIP under the names of Hugging Face's `CLIPModel`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from filip_vl.convert.common import Converted
from filip_vl.convert.openai import fields_of
from tenfold.checkpoint import rename_keys, strip_prefix
from tenfold.errors import UserError

_RENAMED = [
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # the misspelt name is theirs
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
]
_QUERY = re.compile(r"^(.*)\.self_attn\.q_proj\.(weight|bias)$")
_POSITION_IDS = "embeddings.position_ids"
_PROJECTIONS = ("visual.proj", "text_projection")

_WRONG_END = 2
"""End of the text in configurations older than the field, whatever the vocabulary."""


def convert_hf(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None, fields: Mapping[str, Any]
) -> Converted:
    """Weights of a `CLIPModel`.

    Args:
        state: its state dict.
        config: the content of its config.json; None takes the released models' activation and
            heads.
        fields: of the configuration; they go before what `config` says.

    Raises:
        UserError: no CLIP with a vision transformer, or one that differs in more than sizes.
    """
    told: dict[str, Any] = {"act": "quick_gelu"} if config is None else _told(config)
    notes = ()
    if config is None and "act" not in fields:
        notes = ("no config.json: quick_gelu and heads of 64 channels are assumed",)
    state = strip_prefix(state)
    ignored = tuple(key for key in state if key.endswith(_POSITION_IDS))
    kept = _fused({key: tensor for key, tensor in state.items() if key not in ignored})
    weights = rename_keys(kept, _RENAMED)
    for key in _PROJECTIONS:
        if key in weights:
            weights[key] = weights[key].T
    return Converted("hf-clip", fields_of(weights, told | dict(fields)), weights, ignored, notes)


def _fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of each block in one matrix, in this order."""
    fused = {}
    for key, tensor in state.items():
        found = _QUERY.match(key)
        if found:
            block, kind = found.groups()
            names = [f"{block}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            if all(name in state for name in names):
                fused[f"{block}.attn.in_proj_{kind}"] = torch.cat([state[n] for n in names])
        elif not re.search(r"\.self_attn\.[kv]_proj\.", key):
            fused[key] = tensor
    return fused


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that no shape tells, out of config.json; what is left out there has its default."""
    vision, text = _tower(config, "vision"), _tower(config, "text")
    acts = {tower.get("hidden_act", "quick_gelu") for tower in (vision, text)}
    epsilons = {tower.get("layer_norm_eps", 1e-5) for tower in (vision, text)}
    if len(acts) > 1 or not acts <= {"quick_gelu", "gelu"}:
        found = ", ".join(sorted(map(str, acts)))
        raise UserError(f"both towers need the same activation, quick_gelu or gelu, not {found}")
    if epsilons != {1e-5}:
        raise UserError(f"norms with another epsilon than 1e-05: {sorted(epsilons)}")
    end = text.get("eos_token_id", _WRONG_END)
    if isinstance(end, int) and end >= text.get("vocab_size", 49408):
        end = _WRONG_END  # left over from another vocabulary
    return {
        "act": acts.pop(),
        "vision_heads": vision.get("num_attention_heads", 12),
        "text_heads": text.get("num_attention_heads", 8),
        "end_id": None if end == _WRONG_END else end,
    }


def _tower(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    # old files have both, and the one with the longer name holds
    return {**(config.get(f"{name}_config") or {}), **(config.get(f"{name}_config_dict") or {})}
