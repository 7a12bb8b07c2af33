"""One fusion model for each task, with the arguments of its plain model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers as hf
from torch import Tensor
from transformers import PreTrainedConfig

from bert_oversmoothing.model.base import FusionModel, FusionOutput
from bert_oversmoothing.model.config import FusionConfig, backbone_config
from bert_oversmoothing.model.loading import stored_config
from tenfold.errors import UserError


class _TextModel(FusionModel):
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_fusion_weights: bool | None = None,
        **kwargs: Any,
    ) -> FusionOutput | tuple:
        """As the plain model of the task.

        Args:
            input_ids: (batch, tokens), of multiple choice (batch, choices, tokens).
            attention_mask: 0 on padding.
            token_type_ids: of the two texts.
            position_ids: where the family takes them.
            inputs_embeds: in the place of ids.
            labels: of the task; the loss is that of the plain model.
            output_attentions: give the maps of all layers.
            output_hidden_states: give all states, and the fused one.
            return_dict: an output with names, or a tuple.
            output_fusion_weights: give the weights of the fusion; if not said, those that are
                small, and none in a tuple.
            **kwargs: handed on.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        return self._fused(return_dict, output_fusion_weights, given | kwargs)


class FusionForSequenceClassification(_TextModel):
    """A label for a text or a pair; a number where num_labels is 1."""

    task = "classification"


class FusionForTokenClassification(_TextModel):
    """A label for every token."""

    task = "tokens"


class FusionForMaskedLM(_TextModel):
    """The words behind the masks; the output embeddings are tied as in the plain model."""

    task = "mlm"


class FusionForMultipleChoice(_TextModel):
    """One logit for every choice."""

    task = "choice"


class FusionForQuestionAnswering(FusionModel):
    """Start and end of the answer in a text."""

    task = "qa"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_fusion_weights: bool | None = None,
        **kwargs: Any,
    ) -> FusionOutput | tuple:
        """As the plain model.

        Args:
            input_ids: (batch, tokens).
            attention_mask: 0 on padding.
            token_type_ids: 1 on the context.
            position_ids: where the family takes them.
            inputs_embeds: in the place of ids.
            start_positions: first tokens of the answers.
            end_positions: last tokens.
            output_attentions: give the maps of all layers.
            output_hidden_states: give all states, and the fused one.
            return_dict: an output with names, or a tuple.
            output_fusion_weights: see the other text models.
            **kwargs: handed on.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "start_positions": start_positions,
            "end_positions": end_positions,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        return self._fused(return_dict, output_fusion_weights, given | kwargs)


class FusionForImageClassification(FusionModel):
    """A label for an image."""

    task = "image"
    main_input_name = "pixel_values"

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_fusion_weights: bool | None = None,
        **kwargs: Any,
    ) -> FusionOutput | tuple:
        """As the plain model.

        Args:
            pixel_values: (batch, 3, height, width), normalised.
            labels: of the images.
            output_attentions: give the maps of all layers.
            output_hidden_states: give all states, and the fused one.
            return_dict: an output with names, or a tuple.
            output_fusion_weights: see the text models.
            **kwargs: handed on.
        """
        given = {
            "pixel_values": pixel_values,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        return self._fused(return_dict, output_fusion_weights, given | kwargs)


TASKS: dict[str, type[FusionModel]] = {
    kind.task: kind
    for kind in (
        FusionForSequenceClassification,
        FusionForMultipleChoice,
        FusionForQuestionAnswering,
        FusionForTokenClassification,
        FusionForImageClassification,
        FusionForMaskedLM,
    )
}

hf.AutoConfig.register(FusionConfig.model_type, FusionConfig, exist_ok=True)
for _auto, _kind in (
    (hf.AutoModelForSequenceClassification, FusionForSequenceClassification),
    (hf.AutoModelForMultipleChoice, FusionForMultipleChoice),
    (hf.AutoModelForQuestionAnswering, FusionForQuestionAnswering),
    (hf.AutoModelForTokenClassification, FusionForTokenClassification),
    (hf.AutoModelForImageClassification, FusionForImageClassification),
    (hf.AutoModelForMaskedLM, FusionForMaskedLM),
):
    _auto.register(FusionConfig, _kind, exist_ok=True)


def build(
    backbone: str | Mapping[str, Any] | PreTrainedConfig,
    task: str = "classification",
    fusion: str = "gate",
    **options: Any,
) -> FusionModel:
    """A fusion model with random weights.

    >>> model = build("bert-base", "qa", "concat", layers="last:4")

    Args:
        backbone: a name of `BACKBONES`, a dict with its model_type, or a configuration.
        task: one of `TASKS`.
        fusion: see `FusionConfig`.
        **options: other fields of `FusionConfig`, such as layers or num_labels.

    Raises:
        UserError: an option that does not exist, or does not fit.
    """
    config = backbone_config(backbone)
    return _task_class(task)(FusionConfig(backbone=config, task=task, fusion=fusion, **options))


def open_fusion(path: str | Path, **options: Any) -> FusionModel:
    """A stored fusion model, whatever its task.

    Args:
        path: a folder of save_pretrained, or an id on the Hub.
        **options: of from_pretrained.

    Raises:
        UserError: there is none, or it is damaged.
    """
    found = stored_config(str(path), options)
    # A plain model has no task of ours; any of the classes tells so.
    return _task_class(found.get("task", "classification")).from_pretrained(path, **options)


def _task_class(task: Any) -> type[FusionModel]:
    if task not in TASKS:
        raise UserError(f"unknown task: {task!r}", where="task", fix=f"choose {', '.join(TASKS)}")
    return TASKS[task]
