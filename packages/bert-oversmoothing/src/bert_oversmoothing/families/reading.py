"""Find the encoder inside a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bert_oversmoothing.families.layouts import LAYOUTS
from bert_oversmoothing.families.parts import Block, Encoder, Norm, part
from tenfold.errors import UserError


def read_encoder(model: PreTrainedModel) -> Encoder:
    """Find the encoder inside a model, with or without a task head, and name its parts.

    A family outside the table, or another layout of a known one, gives an Encoder of family None:
    states and norms can be captured, weights and the bound cannot.

    Raises:
        UserError: No sequence of blocks was found.
    """
    notes: list[str] = []
    if model.config.model_type == "clip":
        vision = model.vision_model
        assert isinstance(vision, PreTrainedModel)
        model = vision
    elif getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
        notes.append("encoder-decoder: the encoder alone is analysed")
    body = model.base_model
    model = body if isinstance(body, PreTrainedModel) else model
    causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
    if causal:
        notes.append("decoder: attention is causal, its rows still sum to 1")
    family = model.config.model_type
    if family in LAYOUTS:
        try:
            encoder = _known(model, family, causal, notes)
        except AttributeError as error:
            notes.append(f"{family} is laid out differently in this transformers: {error}")
        else:
            return encoder
    return _unknown(model, causal, notes)


def _known(model: PreTrainedModel, family: str, causal: bool, notes: Sequence[str]) -> Encoder:
    config, layout = model.config, LAYOUTS[family]
    gated = layout.up is None
    if getattr(config, "use_swiglu_ffn", False):
        gated, layout = True, layout._replace(up=None, down="mlp.down_proj")
    modules = list(part(model, layout.blocks))
    if family == "albert":
        modules = _albert_blocks(modules, config.num_hidden_layers)
    blocks = [
        Block(
            module,
            module,
            tuple(_norm(part(module, path), config.hidden_size) for path in layout.norms),
            part(module, layout.attention),
        )
        for module in modules
    ]
    # The wide DeBERTa v2 adds a convolution to the first block's output, and norms the sum.
    conv = getattr(getattr(model, "encoder", None), "conv", None)
    if isinstance(conv, nn.Module):
        norms = (*blocks[0].norms, _norm(part(conv, "LayerNorm"), config.hidden_size))
        blocks[0] = Block(modules[0], conv, norms, blocks[0].attention)
    # Every path is read once here, so that another layout shows now and not in the middle of a run.
    for path in (layout.query, layout.key, layout.value, layout.output, layout.up, layout.down):
        for module in modules if path else ():
            part(module, path or "")
    final = layout.final_norm and _norm(part(model, layout.final_norm), config.hidden_size)
    if final:
        notes = (*notes, f"{family}: the last layer is taken before the final norm")
    if len(set(modules)) < len(modules):
        notes = (*notes, f"{family}: blocks share their weights")
    return Encoder(
        model=model,
        family=family,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        blocks=tuple(blocks),
        final_norm=final or None,
        order=layout.order,
        d_ff=part(modules[0], layout.down).in_features,
        activation=_activation(config),
        gated=gated,
        causal=causal,
        notes=tuple(notes),
        layout=layout,
    )


def _albert_blocks(groups: Sequence[nn.Module], calls: int) -> list[nn.Module]:
    """ALBERT's inner layers in the order of their calls: a group serves several calls in turn."""
    return [
        layer
        for call in range(calls)
        for layer in part(groups[int(call / (calls / len(groups)))], "albert_layers")
    ]


def _unknown(model: PreTrainedModel, causal: bool, notes: Sequence[str]) -> Encoder:
    config = model.config
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    ]
    if not lists:
        raise UserError("no sequence of blocks found", where=type(model).__name__)
    depth = getattr(config, "num_hidden_layers", None)
    modules = max(lists, key=lambda blocks: (len(blocks) == depth, len(blocks)))
    width = getattr(config, "hidden_size", None)
    if width is None:
        raise UserError("the configuration names no hidden size", where=config.model_type)
    # What transformers itself reads the maps from: a class, or a class with a place in its output.
    record = (getattr(model, "_can_record_outputs", None) or {}).get("attentions")
    kind = getattr(record, "target_class", record)
    heads = getattr(config, "num_attention_heads", None)
    blocks = []
    for module in modules:
        inside = list(module.named_modules())
        norms = [norm for name, child in inside if (norm := _found_norm(name, child, width))]
        maps = [child for _, child in inside if isinstance(kind, type) and isinstance(child, kind)]
        blocks.append(Block(module, module, tuple(norms), maps[0] if maps else None))
    return Encoder(
        model=model,
        family=None,
        width=width,
        heads=heads if isinstance(heads, int) else None,  # Swin names one number a stage
        blocks=tuple(blocks),
        causal=causal,
        notes=(*notes, f"{config.model_type}: unknown family, bound unavailable"),
        map_index=getattr(record, "index", 1),
    )


def _found_norm(name: str, module: nn.Module, width: int) -> Norm | None:
    weight = getattr(module, "weight", None)
    sized = isinstance(weight, Tensor) and weight.shape == (width,)
    named = "norm" in f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    return _norm(module, width) if sized and named else None


def _norm(module: nn.Module, width: int) -> Norm | None:
    if isinstance(module, nn.Identity):
        return None
    names = ("eps", "variance_epsilon", "layer_norm_eps", "epsilon")
    eps = next((value for name in names if (value := getattr(module, name, None)) is not None), 0.0)
    return Norm(module, float(eps), isinstance(module, nn.LayerNorm) or _centres(module, width))


@torch.no_grad()
def _centres(norm: nn.Module, width: int) -> bool:
    """Whether a constant added to all features changes nothing: T5's RMS is called LayerNorm."""
    weight = next(norm.parameters())
    if weight.is_meta:
        return "rms" not in type(norm).__name__.lower()
    x = torch.linspace(-1, 1, width, device=weight.device, dtype=weight.dtype)[None, None]
    plain, shifted = norm(x), norm(x + 1)
    return bool((plain - shifted).abs().max() <= 0.05 * plain.abs().max())


def _activation(config: Any) -> str:
    names = ("hidden_act", "hidden_activation", "activation")
    act = next(value for name in names if (value := getattr(config, name, None)) is not None)
    return act if isinstance(act, str) else getattr(act, "__name__", type(act).__name__)
