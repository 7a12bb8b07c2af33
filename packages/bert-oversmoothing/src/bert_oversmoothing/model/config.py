"""The configuration of a fusion model, and named encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, get_args

import transformers as hf
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from bert_oversmoothing.fusion import parse_layers
from bert_oversmoothing.fusion.heads import GateKind
from bert_oversmoothing.fusion.layers import layer_read
from tenfold.errors import UserError

NORM_EACH = ("auto", "none")
INITS = ("auto", "identity", "random")


class FusionConfig(PreTrainedConfig):
    """What a fusion model is made of: an encoder, a task, and how its layers are fused.

    >>> config = FusionConfig(backbone=BACKBONES["bert-base"](), task="qa", layers="last:4")
    >>> config.layers
    [9, 10, 11, 12]

    Args:
        backbone: configuration of the encoder, or a dict of one with its model_type.
        task: "classification", "choice", "qa", "tokens", "image" or "mlm".
        fusion: "concat", "max", "gate", "scalar_mix", "mean", "last" or "best_layer(i)".
        layers: "all", "last:k", "every:k" or numbers from 0 (embeddings) to L; kept as numbers.
        include_embeddings: whether layer 0 may be among them.
        gate_kind: "softmax", "sigmoid" or "channel".
        gate_shared: one gate for all layers.
        norm_each: "auto" applies the final norm of a pre-norm encoder to every layer before the
            fusion, as it is applied to the last one in any case; "none" fuses the raw states, and
            the norm comes after the fusion.
        init: "identity" starts as the plain model, "random" does not; "auto" is random here, where
            the encoder has no trained weights, see `from_encoder`.
        num_labels, id2label, label2id, problem_type: as in every configuration of transformers;
            those of the backbone where not given.

    Raises:
        UserError: an option that does not exist, or layers that the encoder does not have.
    """

    __no_type_check__ = True  # transformers' constructor takes more than its signature says
    model_type = "fusion"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "backbone": SubConfigSpec(config_class=hf.AutoConfig, model_type="bert")
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "fusion_weights",
        "fused_state",
        "hidden_states",
        "attentions",
    ]

    backbone: dict | PreTrainedConfig | None = None
    task: str = "classification"
    fusion: str = "gate"
    layers: str | list[int] | tuple[int, ...] = "all"
    include_embeddings: bool = True
    gate_kind: str = "softmax"
    gate_shared: bool = False
    norm_each: str = "auto"
    init: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from the backbone, and check what can be checked without weights."""
        labelled = self.id2label is not None or kwargs.get("num_labels") is not None
        if isinstance(self.backbone, PreTrainedConfig):
            # Else the attention of a model that is there already would be taken from it.
            attention = {"backbone": self.backbone._attn_implementation}
            kwargs.setdefault("attn_implementation", attention)
        super().__post_init__(**kwargs)
        choices = (("norm_each", NORM_EACH), ("init", INITS), ("gate_kind", get_args(GateKind)))
        for name, known in choices:
            if getattr(self, name) not in known:
                what = f"unknown {name}: {getattr(self, name)!r}"
                raise UserError(what, where=name, fix=f"choose {', '.join(known)}")
        if self.init == "auto":
            self.init = "random"
        backbone = self.backbone
        assert isinstance(backbone, PreTrainedConfig)
        if not labelled:
            self.id2label, self.label2id = backbone.id2label, backbone.label2id
        if self.task == "qa" and self.num_labels != 2:
            if labelled:
                raise UserError("questions have two labels, start and end", where="num_labels")
            self.num_labels = 2
        self.problem_type = self.problem_type or backbone.problem_type
        if (blocks := count_blocks(backbone)) is not None:
            # Kept as numbers, so that a stored model does not change its meaning with its depth.
            found = parse_layers(self.layers, blocks, self.include_embeddings, init=self.init)
            layer_read(self.fusion, found)
            self.layers = [*found]

    def plain(self) -> PreTrainedConfig:
        """The configuration of the plain model inside, with the labels of this one."""
        backbone = self.backbone
        assert isinstance(backbone, PreTrainedConfig)
        backbone.id2label, backbone.label2id = self.id2label, self.label2id
        backbone.problem_type = self.problem_type
        return backbone

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """The configuration with the vocabulary: that of the encoder."""
        backbone = self.backbone
        if not isinstance(backbone, PreTrainedConfig):
            return self
        return backbone.get_text_config(decoder=decoder, encoder=encoder)


def count_blocks(backbone: PreTrainedConfig) -> int | None:
    """L of an encoder, None where its configuration does not tell."""
    config = getattr(backbone, "vision_config", backbone)
    depth = getattr(config, "num_hidden_layers", None)
    return depth * getattr(config, "inner_group_num", 1) if isinstance(depth, int) else None


def _deberta_v3() -> PreTrainedConfig:
    options: dict[str, Any] = {
        "vocab_size": 128_100,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "pooler_hidden_size": 768,
    }
    return hf.DebertaV2Config(**options)


BACKBONES: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "bert-base": hf.BertConfig,
    "bert-large": lambda: hf.BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "roberta-base": lambda: hf.RobertaConfig(
        vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    ),
    "albert-base": lambda: hf.AlbertConfig(
        hidden_size=768, num_attention_heads=12, intermediate_size=3072
    ),
    "electra-small": hf.ElectraConfig,
    "deberta-v3-base": _deberta_v3,
    "vit-base": hf.ViTConfig,
    "deit-small": lambda: hf.DeiTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536
    ),
}
"""Configurations of published encoders, by name; the sizes alone, no weights."""


def backbone_config(spec: str | Mapping[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of an encoder.

    Args:
        spec: a name of `BACKBONES`; a dict with its model_type; or a configuration.

    Raises:
        UserError: no such name or model type, or a dict that does not fit it.
    """
    if isinstance(spec, PreTrainedConfig):
        return spec
    if isinstance(spec, str):
        if spec not in BACKBONES:
            raise UserError(f"no such encoder: {spec!r}", fix=f"choose {', '.join(BACKBONES)}")
        return BACKBONES[spec]()
    options = dict(spec)
    try:
        return hf.AutoConfig.for_model(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"no configuration of an encoder: {error}", where="backbone") from error
