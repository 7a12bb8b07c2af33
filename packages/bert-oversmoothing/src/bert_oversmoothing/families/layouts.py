"""The table: where each Hugging Face family keeps the parts of a block."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Layout(NamedTuple):
    """Dotted paths: `blocks` and `final_norm` from the encoder, the others from a block."""

    order: Literal["post", "pre"]
    blocks: str
    norms: tuple[str, str]
    attention: str
    value: str
    output: str
    up: str | None  # None: a gated feed-forward part, which has no Lipschitz constant
    down: str
    query: str | None = None  # None: the module always computes its map, and returns it on demand
    key: str | None = None
    final_norm: str | None = None
    scales: tuple[str, str] | None = None
    packing: Literal["apart", "qkv", "heads"] = "apart"  # rows of `value`: (3, h, k) or (h, 3, k)


_BERT = Layout(
    order="post",
    blocks="encoder.layer",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
)
_VIT = Layout(
    order="pre",
    blocks="layers",
    norms=("layernorm_before", "layernorm_after"),
    final_norm="layernorm",
    attention="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    up="mlp.fc1",
    down="mlp.fc2",
)
LAYOUTS = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "deberta": _BERT._replace(
        query=None, key=None, value="attention.self.in_proj", packing="heads"
    ),
    "deberta-v2": _BERT._replace(query=None, key=None, value="attention.self.value_proj"),
    "albert": Layout(
        order="post",
        blocks="encoder.albert_layer_groups",
        norms=("attention.LayerNorm", "full_layer_layer_norm"),
        attention="attention",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        output="attention.dense",
        up="ffn",
        down="ffn_output",
    ),
    "distilbert": Layout(
        order="post",
        blocks="transformer.layer",
        norms=("sa_layer_norm", "output_layer_norm"),
        attention="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        up="ffn.lin1",
        down="ffn.lin2",
    ),
    "mpnet": Layout(
        order="post",
        blocks="encoder.layer",
        norms=("attention.LayerNorm", "output.LayerNorm"),
        attention="attention.attn",
        value="attention.attn.v",
        output="attention.attn.o",
        up="intermediate.dense",
        down="output.dense",
    ),
    "modernbert": Layout(
        order="pre",
        blocks="layers",
        norms=("attn_norm", "mlp_norm"),
        final_norm="final_norm",
        attention="attn",
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        output="attn.Wo",
        up=None,
        down="mlp.Wo",
        packing="qkv",
    ),
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _VIT._replace(
        blocks="encoder.layer",
        norms=("norm1", "norm2"),
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    ),
    "beit": _VIT._replace(scales=("lambda_1", "lambda_2")),
    "clip_vision_model": _VIT._replace(
        blocks="encoder.layers",
        norms=("layer_norm1", "layer_norm2"),
        final_norm=None,  # post_layernorm sees the pooled token alone
        attention="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
    ),
}
FAMILIES = tuple(LAYOUTS)
