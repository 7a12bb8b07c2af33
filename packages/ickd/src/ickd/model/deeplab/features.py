"""What a backbone hands on: the two maps that the heads read, and those that a student learns."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Features(NamedTuple):
    """The maps of one backbone for one batch.

    Attributes:
        low: what the decoder reads, at stride 4.
        deep: what ASPP reads, at the output stride.
        distilled: four maps before their ReLU, from shallow to deep.
    """

    low: Float[Tensor, "batch low_width height width"]
    deep: Float[Tensor, "batch deep_width high narrow"]
    distilled: tuple[Float[Tensor, "batch _ _ _"], ...]


def check_output_stride(output_stride: int) -> None:
    """Refuse a stride that the networks are not defined for.

    Raises:
        ValueError: neither 16 (the published networks) nor 8.
    """
    if output_stride not in (8, 16):
        raise ValueError(f"output_stride must be 8 or 16, got {output_stride}")
