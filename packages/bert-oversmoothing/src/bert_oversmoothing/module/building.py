"""The network of a run from its arguments, and the weights that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from bert_oversmoothing.model import (
    BACKBONES,
    FusionConfig,
    FusionModel,
    backbone_config,
    build,
)
from bert_oversmoothing.model.loading import stored_config
from bert_oversmoothing.module.opening import KEPT, is_run, load_model, load_run
from tenfold.errors import UserError

DEFAULT = "bert-base"
NONE = "last"
"""The fusion of a plain encoder."""

FUSION = (
    "fusion",
    "layers",
    "include_embeddings",
    "gate_kind",
    "gate_shared",
    "norm_each",
    "init",
)
"""Arguments of a module that are fields of a FusionConfig by the same names."""

_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout_prob",
    "classifier_dropout",
    "hidden_dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "pooler_dropout",
    "dropout",
    "qa_dropout",
    "seq_classif_dropout",
)
"""What the families call their rates."""


def read_config(backbone: str | Mapping[str, Any] | None, weights: str | None) -> PreTrainedConfig:
    """The configuration of the encoder, or of a whole model with fusion where `weights` is one.

    Args:
        backbone: a name of `BACKBONES`, the fields of a configuration with its model_type, or a
            folder or hub id whose configuration alone is read; None is that of the weights, and
            without weights BERT-base.
        weights: folder or hub id.

    Raises:
        UserError: no such name, folder or hub id, or fields that make no configuration.
    """
    spec = backbone or weights or DEFAULT
    if isinstance(spec, str) and is_run(spec):
        return FusionConfig.from_dict(load_run(spec)[KEPT]["config"])
    if not isinstance(spec, str) or spec in BACKBONES:
        return backbone_config(spec)
    try:
        return AutoConfig.from_pretrained(spec)
    except (OSError, ValueError) as error:
        fix = f"give a folder, a hub id or one of {', '.join(BACKBONES)}"
        where = "--weights" if spec == weights else "--model.backbone"
        raise UserError(f"no model is called {spec!r}", where=where, fix=fix) from error


def set_dropout(config: PreTrainedConfig, rate: float) -> None:
    """Set all dropout rates of a configuration, whatever its family calls them."""
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, rate)


def build_net(given: dict[str, Any]) -> FusionModel:
    """The network with random weights; the arguments are filled in so that they suffice alone.

    Args:
        given: arguments of a FusionModule. `backbone` becomes the fields of a configuration, `init`
            what "auto" means here, and the options of the fusion those of `weights` where they are
            a model with fusion.

    Raises:
        UserError: what cannot be built.
    """
    config = read_config(given["backbone"], given["weights"])
    if isinstance(config, FusionConfig):
        if config.fusion != NONE:
            given |= {name: getattr(config, name) for name in FUSION}
        config = config.plain()
    if given["dropout"] is not None:
        set_dropout(config, given["dropout"])
    given["backbone"] = config.to_dict()
    if given["init"] == "auto":
        given["init"] = "random" if given["weights"] is None else "identity"
    options = {name: given[name] for name in (*FUSION, "num_labels")}
    return build(config, given["task"], **options)


def load_weights(net: FusionModel, weights: str) -> None:
    """Fill in what a folder or a hub id holds; a task head that it lacks keeps its random weights.

    Raises:
        UserError: nothing there, or the weights of another network.
    """
    config = net.config
    try:
        if is_run(weights) or stored_config(weights, {})["model_type"] == FusionConfig.model_type:
            _take(net, load_model(weights))
            return
        options = {name: getattr(config, name) for name in (*FUSION, "num_labels")}
        net.load_state_dict(type(net).from_encoder(weights, **options).state_dict())
    except RuntimeError as error:
        what = "the weights are of another network than the configuration"
        fix = "leave out backbone, which is then that of the weights"
        raise UserError(what, where=weights, fix=fix) from error


def _take(net: FusionModel, found: FusionModel) -> None:
    """All weights of a model of the same task and fusion, else those of its encoder and fusion."""
    fused = found.config.fusion != NONE
    if found.task == net.task and (fused or net.config.fusion == NONE):
        net.load_state_dict(found.state_dict())
        return
    # a pooler may be in one of the two alone
    net.base_model.load_state_dict(found.base_model.state_dict(), strict=False)
    if fused:
        net.fusion.load_state_dict(found.fusion.state_dict())
