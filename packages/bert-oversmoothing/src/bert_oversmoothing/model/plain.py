"""The plain models of transformers inside the fusion models: one class for a family and a task."""

from __future__ import annotations

from typing import Any

import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_outputs import MultipleChoiceModelOutput
from transformers.models.deberta.modeling_deberta import ContextPooler

from tenfold.errors import UserError

_AUTO: dict[str, Any] = {
    "classification": hf.AutoModelForSequenceClassification,
    "choice": hf.AutoModelForMultipleChoice,
    "qa": hf.AutoModelForQuestionAnswering,
    "tokens": hf.AutoModelForTokenClassification,
    "image": hf.AutoModelForImageClassification,
    "mlm": hf.AutoModelForMaskedLM,
}


class DebertaForMultipleChoice(hf.DebertaPreTrainedModel):
    """DeBERTa (v1) with one logit for every choice, which transformers has for v2 alone.

    Keys and numbers are those of DebertaV2ForMultipleChoice: pooler, dropout, a linear map to 1.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.deberta = hf.DebertaModel(config)
        self.pooler = ContextPooler(config)
        self.classifier = nn.Linear(self.pooler.output_dim, 1)
        cls_dropout = getattr(config, "cls_dropout", None)
        self.dropout = nn.Dropout(
            config.hidden_dropout_prob if cls_dropout is None else cls_dropout
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput | tuple:
        """As every multiple-choice model: inputs (batch, choices, tokens), logits (batch, choices).

        Args:
            input_ids: of all choices.
            attention_mask: 0 on padding.
            token_type_ids: of the two texts.
            position_ids: (batch, choices, tokens).
            inputs_embeds: (batch, choices, tokens, width), in the place of ids.
            labels: numbers of the right choices.
            return_dict: an output with names, or a tuple.
            **kwargs: output_attentions, output_hidden_states.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        present = {name: value for name, value in given.items() if value is not None}
        choices = next(iter(present.values())).shape[1]
        flat = {name: value.flatten(0, 1) for name, value in present.items()}
        output = self.deberta(**flat, **kwargs, return_dict=True)
        pooled = self.dropout(self.pooler(output.last_hidden_state))
        logits = self.classifier(pooled).view(-1, choices)
        named = MultipleChoiceModelOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        as_tuple = (self.config.return_dict if return_dict is None else return_dict) is False
        return named.to_tuple() if as_tuple else named


def plain_class(
    task: str, config: PreTrainedConfig, code: str | None = None
) -> type[PreTrainedModel]:
    """The class of transformers for a family and a task.

    Where there are several, as DeiT's with one head and with two, `config.architectures` decides.

    Args:
        task: a key of the table of tasks.
        config: of the encoder.
        code: folder or repository whose own code may be run, if any.

    Raises:
        UserError: no such task, or the family has no head for it.
    """
    if task not in _AUTO:
        raise UserError(f"unknown task: {task!r}", where="task", fix=f"choose {', '.join(_AUTO)}")
    if code and (name := (getattr(config, "auto_map", None) or {}).get(_AUTO[task].__name__)):
        return get_class_from_dynamic_module(name, code)
    mapping = _AUTO[task]._model_mapping
    if type(config) in mapping:
        found = mapping[type(config)]
        classes = found if isinstance(found, tuple) else (found,)
        named = [kind for kind in classes if kind.__name__ in (config.architectures or ())]
        return (named or classes)[0]
    if task == "choice" and isinstance(config, hf.DebertaConfig):
        return DebertaForMultipleChoice
    raise UserError(
        f"{config.model_type} has no head for the task {task} in transformers", where="task"
    )


def plain_from_config(task: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A plain model with random weights, in the precision of its configuration.

    Raises:
        UserError: as `plain_class`.
    """
    return plain_class(task, config)._from_config(config)
