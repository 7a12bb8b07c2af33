"""What the diagnostics have to know of each Hugging Face family, read from a model."""

from bert_oversmoothing.families.layouts import FAMILIES
from bert_oversmoothing.families.parts import Block, BlockTensors, Encoder, Norm
from bert_oversmoothing.families.reading import read_encoder

__all__ = ["FAMILIES", "Block", "BlockTensors", "Encoder", "Norm", "read_encoder"]
