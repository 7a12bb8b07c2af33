"""Sliceable patch embedding of a vision transformer, early or late."""

import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tenfold.errors import UserError


class PatchEmbedding(nn.Module):
    """Patches projected to tokens, a class token in front, and positions, for any first features.

    The rows of the projection are independent, so the features that a wide route adds can be
    computed later from the pixels of the patches alone (`late`).
    """

    def __init__(
        self,
        features: int,
        patch_size: int = 16,
        image_size: int = 224,
        in_channels: int = 3,
        strict: bool = False,
    ) -> None:
        """Stores the projection, class token and position table of the largest width.

        Args:
            features: the largest width of the tokens.
            patch_size: side of a patch in pixels.
            image_size: side of the images that the position table is for.
            in_channels: colours of the images.
            strict: refuse images of another size instead of resampling the table.
        """
        super().__init__()
        self.patch_size, self.image_size, self.strict = patch_size, image_size, strict
        self.proj = nn.Conv2d(in_channels, features, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.empty(features))
        self.positions = nn.Parameter(torch.empty((image_size // patch_size) ** 2 + 1, features))
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(
        self, x: Float[Tensor, "batch colours height width"], features: int | None = None
    ) -> Float[Tensor, "batch tokens features"]:
        """Tokens with their first `features` features, all where None.

        Raises:
            UserError: an image that is not square, or `strict` and of another size.
        """
        x, bias = self.whole(x), self._bias()[:features]
        y = F.conv2d(x, self.proj.weight[:features], bias, self.patch_size)
        return self._tokens(y.flatten(2).transpose(1, 2), 0, features)

    def pixels(
        self, x: Float[Tensor, "batch colours height width"]
    ) -> Float[Tensor, "batch tokens pixels"]:
        """What `late` needs of the images: the pixels of each patch, zeros for the class token."""
        patches = F.unfold(self.whole(x), self.patch_size, stride=self.patch_size)
        return F.pad(patches.transpose(1, 2), (0, 0, 1, 0))

    def late(
        self, pixels: Float[Tensor, "batch tokens pixels"], start: int, stop: int
    ) -> Float[Tensor, "batch tokens late"]:
        """Features start..stop of the tokens that `forward` would have given."""
        weight, bias = self.proj.weight[start:stop].flatten(1), self._bias()[start:stop]
        return self._tokens(F.linear(pixels[:, 1:], weight, bias), start, stop)

    def _bias(self) -> Tensor:
        assert self.proj.bias is not None
        return self.proj.bias

    def _tokens(self, patches: Tensor, start: int, stop: int | None) -> Tensor:
        """Class token and patches with their positions."""
        positions = self._positions(patches.shape[1])[:, start:stop]
        cls = (self.cls_token[start:stop] + positions[0]).expand(patches.shape[0], 1, -1)
        return torch.cat([cls, patches + positions[1:]], 1)

    def _positions(self, patches: int) -> Float[Tensor, "tokens features"]:
        """The table, resampled where there are more or fewer patches than it was made for."""
        if patches == len(self.positions) - 1:
            return self.positions
        old, new = self.image_size // self.patch_size, round(patches**0.5)
        table = self.positions[1:].T.unflatten(1, (old, old))[None]
        table = F.interpolate(table, (new, new), mode="bicubic", antialias=True)
        return torch.cat([self.positions[:1], table[0].flatten(1).T])

    def whole(
        self, x: Float[Tensor, "batch colours height width"]
    ) -> Float[Tensor, "batch colours height2 width2"]:
        """Images of whole patches: zeros to the right and below where the size leaves a rest.

        Raises:
            UserError: an image that is not square, or `strict` and of another size.
        """
        height, width = x.shape[-2:]
        if height != width:
            raise UserError(
                f"images of {height} x {width} pixels", fix="crop or resize them to squares"
            )
        if height == self.image_size:
            return x
        text = f"images of {height} pixels a side, the position table is for {self.image_size}"
        if self.strict:
            raise UserError(text, fix=f"resize the images to {self.image_size} pixels")
        warnings.warn(f"{text}: it is resampled", stacklevel=2)
        rest = -height % self.patch_size
        return F.pad(x, (0, rest, 0, rest)) if rest else x

    def materialize(self, start: int, stop: int) -> "PatchEmbedding":
        """The embedding of features start..stop alone, with weights of its own."""
        conv, strict = self.proj, self.strict
        with torch.device("meta"):
            plain = PatchEmbedding(
                stop - start, self.patch_size, self.image_size, conv.in_channels, strict
            )
        plain.proj.weight = nn.Parameter(conv.weight[start:stop].detach().clone())
        plain.proj.bias = nn.Parameter(self._bias()[start:stop].detach().clone())
        plain.cls_token = nn.Parameter(self.cls_token[start:stop].detach().clone())
        plain.positions = nn.Parameter(self.positions[:, start:stop].detach().clone())
        return plain
