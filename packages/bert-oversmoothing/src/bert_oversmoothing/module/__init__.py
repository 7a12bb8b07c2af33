"""The Lightning module: an encoder with fusion, fine-tuned or trained from scratch."""

from bert_oversmoothing.module.opening import is_run, load_model, load_run, load_tokenizer
from bert_oversmoothing.module.training import FusionModule

__all__ = ["FusionModule", "is_run", "load_model", "load_run", "load_tokenizer"]
