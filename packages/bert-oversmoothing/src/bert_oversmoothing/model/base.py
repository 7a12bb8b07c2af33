"""What all fusion models share: a plain model of transformers, a fusion, and how they meet."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from bert_oversmoothing.families import Encoder, read_encoder
from bert_oversmoothing.fusion import LayerFusion, fusion_parameter_groups, parse_layers
from bert_oversmoothing.model.config import FusionConfig
from bert_oversmoothing.model.loading import check_loaded, fusion_config, open_plain, reading
from bert_oversmoothing.model.plain import plain_from_config
from bert_oversmoothing.model.tap import Tap

M = TypeVar("M", bound="FusionModel")


@dataclass
class FusionOutput(ModelOutput):
    """What a fusion model gives: the fields of the plain model's output, and those of the fusion.

    Attributes:
        loss: where labels are given.
        logits: of all tasks but qa.
        start_logits: (batch, tokens), of qa.
        end_logits: likewise.
        cls_logits: of DeiT with two heads.
        distillation_logits: likewise.
        hidden_states: as the plain model gives them, on demand; in most text models the last of
            them is the fused state, since it is what the head reads.
        attentions: on demand.
        fusion_weights: see `bert_oversmoothing.fusion.Fused`; (batch, choices, tokens, layers) of
            multiple choice. Those by channel are given on demand, others always.
        fused_state: (batch, tokens, width) what the head read, with the hidden states.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    cls_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    fusion_weights: Tensor | None = None
    fused_state: Tensor | None = None


_ALIGNMENT = 64  # bytes: where torch's own memory begins
_FIELDS = tuple(field.name for field in fields(FusionOutput))


class FusionModel(PreTrainedModel):
    """A plain model of transformers whose head reads a fusion of all layers.

    The state dict holds `model.` + every key of the plain model, and `fusion.` + those of a
    `LayerFusion`. save_pretrained, from_pretrained and the Trainer work as with any other model.

    torch.compile traces it without a break; gradient checkpointing is that of the plain model.
    nn.DataParallel, which shares hooks between its copies, does not work: use one process for
    each GPU.

    Args:
        config: the encoder has random weights, or those that from_pretrained fills in.
        model: the plain model, if it is there already.

    Raises:
        UserError: the family has no head for the task, or an option of the fusion is unknown.
    """

    config_class = FusionConfig
    config: FusionConfig
    task: ClassVar[str]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    accepts_loss_kwargs = False

    def __init__(self, config: FusionConfig, model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        config.task = self.task
        backbone = config.plain()
        if model is None:
            model = plain_from_config(self.task, backbone)
        else:
            config.backbone = model.config
            for module in model.modules():
                module.__dict__["_is_hf_initialized"] = True  # post_init leaves it alone
        model.config.architectures = [type(model).__name__]
        self.model = model
        self._encoder = read_encoder(model)
        blocks = len(self._encoder.blocks)
        layers = parse_layers(config.layers, blocks, config.include_embeddings, init=config.init)
        config.layers = [*layers]
        norm = self._encoder.final_norm if config.norm_each == "auto" else None
        self.fusion = LayerFusion(
            config.fusion,
            self._encoder.width,
            len(layers),
            gate_kind=config.gate_kind,  # pyright: ignore[reportArgumentType]
            gate_shared=config.gate_shared,
            init=config.init,  # pyright: ignore[reportArgumentType]
            # Not the module itself: those who look at the final norm expect one call in a pass.
            norm_each=norm.module.forward if norm else None,
            layers=layers,
        )
        self._tap = Tap(self._encoder, norm_each=config.norm_each == "auto")
        self.post_init()

    # -- the model ---------------------------------------------------------------------------

    @classmethod
    def from_encoder(
        cls: type[M],
        path_or_model: str | Path | PreTrainedModel,
        fusion: str = "gate",
        *,
        num_labels: int | None = None,
        layers: str | Sequence[int] = "all",
        init: str = "auto",
        include_embeddings: bool = True,
        gate_kind: str = "softmax",
        gate_shared: bool = False,
        norm_each: str = "auto",
        ignore_mismatched_sizes: bool = False,
        trust_remote_code: bool = False,
        config: Mapping[str, Any] | None = None,
        **hub: Any,
    ) -> M:
        """A fusion on an encoder with or without a head for the task.

        >>> model = FusionForQuestionAnswering.from_encoder("bert-base-uncased", "gate")

        Args:
            path_or_model: a folder, an id on the Hub, or a model; a plain model of this task
                becomes part of the fusion model, of any other the weights of the encoder are
                copied.
            fusion: see `FusionConfig`, as are the other options of the fusion.
            num_labels: of the head; that of the encoder's configuration if not given.
            layers: see `FusionConfig`.
            init: "auto" is "identity" where the encoder has trained weights, else "random". An
                identity on an untrained encoder warns: it starts as the collapsed last layer.
            include_embeddings: see `FusionConfig`.
            gate_kind: see `FusionConfig`.
            gate_shared: see `FusionConfig`.
            norm_each: see `FusionConfig`.
            ignore_mismatched_sizes: give a stored head of another size random weights.
            trust_remote_code: run code that comes with the encoder.
            config: other fields of the encoder's configuration to set, such as a dropout.
            **hub: revision, token, cache_dir and the like, dtype, attn_implementation.

        Returns:
            The model in eval mode.

        Raises:
            UserError: no encoder there, a damaged one, one without a head for the task, or an
                option that does not fit it; options are looked at before weights are read.
        """
        trained = not isinstance(path_or_model, PreTrainedModel) or bool(path_or_model.name_or_path)
        if init == "identity" and not trained:
            warnings.warn(
                "init identity on an untrained encoder starts as its collapsed last layer: "
                "choose random",
                stacklevel=2,
            )
        options: dict[str, Any] = {
            "task": cls.task,
            "fusion": fusion,
            "layers": layers if isinstance(layers, str) else [*layers],
            "init": ("identity" if trained else "random") if init == "auto" else init,
            "include_embeddings": include_embeddings,
            "gate_kind": gate_kind,
            "gate_shared": gate_shared,
            "norm_each": norm_each,
        }
        if num_labels is not None:
            options["num_labels"] = num_labels
        plain = open_plain(
            path_or_model,
            cls.task,
            lambda backbone: FusionConfig(backbone=backbone, **options),
            config or {},
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            trust_remote_code=trust_remote_code,
            **hub,
        )
        options.pop("num_labels", None)  # the plain model has it by now, with the names of labels
        model = cls(FusionConfig(backbone=plain.config, **options), plain)
        model.fusion.to(device=plain.device, dtype=plain.dtype)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers: a folder of save_pretrained, or an id on the Hub.

        Args:
            pretrained_model_name_or_path: the folder or id.
            *args: handed on.
            ignore_mismatched_sizes: give a stored head of another size random weights.
            output_loading_info: return a pair, with what was missing.
            **kwargs: fields of the configuration to set, and options of transformers.

        Raises:
            UserError: no fusion model there, one for another task, one that fuses other layers
                than asked for, a head of another size, or damaged weights.
        """
        where = str(pretrained_model_name_or_path)
        config = fusion_config(where, cls.task, cls.__name__, kwargs)
        with reading(where):
            loaded: Any = super().from_pretrained(
                where,
                *args,
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
        model, info = loaded
        check_loaded(info, where, ignore_mismatched_sizes)
        # Read weights lie anywhere in their file's memory, and some processors sum products in an
        # order that depends on that: in memory of their own they give what they gave before.
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
                parameter.data = parameter.data.clone()
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        # Those of the plain model are its own affair. Weights that were read keep their values.
        if isinstance(module, LayerFusion) and not all(
            getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()
        ):
            module.reset_parameters()

    # -- parts -------------------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """The encoder inside, as the diagnostics see it."""
        return self._encoder

    @property
    def base_model(self) -> nn.Module:
        """The encoder without head and fusion."""
        return self._encoder.model

    def fusion_parameters(self) -> list[nn.Parameter]:
        """Of the fusion alone."""
        return list(self.fusion.parameters())

    def parameter_groups(
        self, lr: float = 2e-5, fusion_lr: float = 1e-3, weight_decay: float = 0.01
    ) -> list[dict[str, Any]]:
        """Groups for an optimiser: the plain model, and the fusion, which learns faster.

        Args:
            lr: of encoder and head.
            fusion_lr: of the fusion.
            weight_decay: of matrices; biases and the vectors of norms have none.
        """
        kept = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in kept if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
            {"params": [p for p in kept if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
        ]
        own = fusion_parameter_groups(self.fusion, fusion_lr, weight_decay)
        return [group for group in groups if group["params"]] + own

    def get_input_embeddings(self) -> nn.Module:
        """Of the plain model."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Of the plain model."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """Of the plain model."""
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Of the plain model."""
        self.model.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Of the plain model, whose configuration is the backbone of this one's."""
        return self.model.resize_token_embeddings(*args, **kwargs)

    # -- forward -----------------------------------------------------------------------------

    def _fused(
        self, return_dict: bool | None, output_fusion_weights: bool | None, given: dict[str, Any]
    ) -> FusionOutput | tuple:
        """Run the plain model with the fusion in it."""
        present = {name: value for name, value in given.items() if value is not None}
        if self.task == "choice":  # the plain models flatten choices by a view
            present = {name: _contiguous(value) for name, value in present.items()}
        named = self.config.return_dict if return_dict is None else return_dict
        need = output_fusion_weights
        if need is None:
            need = bool(named) and self.fusion.gate_kind != "channel"
        mask, choices = present.get("attention_mask"), 0
        if mask is not None and mask.ndim == 3 and self.task == "choice":
            choices, mask = mask.shape[1], mask.flatten(0, 1)
        mask = mask if mask is not None and mask.ndim == 2 else None
        run = self._tap.start(self.fusion, mask, need)
        try:
            output = self.model(**present, return_dict=True)
        finally:
            self._tap.stop()
        assert run.fused is not None
        hidden, weights = run.fused
        if self.task == "choice" and weights is not None and weights.ndim > 1:
            weights = weights.unflatten(0, (-1, choices or output.logits.shape[1]))
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value  # DeBERTa's states
            for name, value in output.items()
            if name in _FIELDS
        }
        asked = known.get("hidden_states") is not None
        result = FusionOutput(
            **known, fusion_weights=weights, fused_state=hidden if asked else None
        )
        return result if named else result.to_tuple()


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value
