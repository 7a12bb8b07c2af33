"""Adaptors between a student's and a teacher's features: trained with the student, thrown away.

Submodules carry the names of the published programs, so that their state dicts load.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from tenfold.errors import UserError


class Embedding(nn.Module):
    """1x1 convolution and batch norm that lift a map to other channels (ICKD, section 3.2).

    Args:
        channels_in: channels of the student's map.
        channels_out: channels of the teacher's.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.l2norm = nn.BatchNorm2d(channels_out)

    def forward(
        self, x: Float[Tensor, "batch channels_in height width"]
    ) -> Float[Tensor, "batch channels_out height width"]:
        """Lift a map.

        Raises:
            UserError: other channels than it was made for, or a batch of one pixel in training,
                whose statistics do not exist.
        """
        if x.ndim != 4 or x.shape[1] != self.conv2d.in_channels:
            wanted = f"(batch, {self.conv2d.in_channels}, height, width)"
            raise UserError(f"the embedding takes maps {wanted}, got {tuple(x.shape)}")
        if self.training and x.numel() == x.shape[1]:
            what = "the embedding's batch norm cannot train on a single image of a single pixel"
            raise UserError(what, fix="use batches of two or more images")
        return self.l2norm(self.conv2d(x))
