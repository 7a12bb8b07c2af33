"""The image tower: CLIP's vision transformer with all its tokens projected."""

import warnings
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from filip_vl.model.config import FilipConfig, nearest_sizes
from filip_vl.model.token_learner import TokenLearner
from tenfold.attention import Transformer, TransformerBlock


class VisionTokens(NamedTuple):
    """What the image tower makes of a batch, in the joint width.

    Attributes:
        cls: of the class token.
        patches: of the patches, row by row, or learned ones in their place.
    """

    cls: Float[Tensor, "batch embed"]
    patches: Float[Tensor, "batch tokens embed"]


class VisionTower(nn.Module):
    """Patches and a class token through a transformer, each token projected to the joint width.

    Source: FILIP, section 3.1; the names of the parameters are those of CLIP's `visual`.

    Args:
        config: of the model.
    """

    def __init__(self, config: FilipConfig) -> None:
        super().__init__()
        width, embed = config.vision_width, config.embed_dim
        self.patch_size, self.grid = config.patch_size, config.grid
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(
            torch.randn(config.grid**2 + 1, width) * width**-0.5
        )
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, config.vision_heads, config.act)
        self.ln_post = nn.LayerNorm(width) if config.visual_ln_post else nn.Identity()
        self.proj = nn.Parameter(torch.randn(width, embed) * width**-0.5)
        self.register_parameter(
            "proj_bias", nn.Parameter(torch.zeros(embed)) if config.proj_bias else None
        )
        self.token_learner = (
            TokenLearner(embed, config.learned_tokens) if config.learned_tokens else nn.Identity()
        )

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"], checkpointing: bool = False
    ) -> VisionTokens:
        """All tokens of a batch, not normalised.

        Args:
            pixels: normalised with CLIP's mean and deviation; other sizes than that of the training
                have their positions interpolated, with a warning.
            checkpointing: see `tenfold.attention.Transformer`.

        Raises:
            ValueError: a size that is no multiple of the patch.
        """
        x = self.ln_post(self.transformer(self._embed(pixels), checkpointing=checkpointing))
        x = x @ self.proj
        if self.proj_bias is not None:
            x = x + self.proj_bias
        return VisionTokens(x[:, 0], self.token_learner(x[:, 1:]))

    def last_attention(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """Self-attention of the last block, the class token before the patches; rows sum to 1.

        Raises:
            ValueError: a size that is no multiple of the patch.
        """
        x = self._embed(pixels)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x)
        return cast(TransformerBlock, last).attention_weights(x)

    def grid_of(self, pixels: Float[Tensor, "batch 3 height width"]) -> tuple[int, int]:
        """Rows and columns of patches.

        Raises:
            ValueError: a size that is no multiple of the patch, with the nearest that are.
        """
        p = self.patch_size
        height, width = pixels.shape[2:]
        if height % p or width % p or not height or not width:
            nearest = " and ".join(nearest_sizes(side, p) for side in (height, width))
            raise ValueError(
                f"images of {height}x{width} pixels do not divide into patches of {p}: the "
                f"nearest valid height and width are {nearest}"
            )
        return height // p, width // p

    def set_grid(self, grid: int) -> None:
        """Interpolate the positions once and for all, for training at another size.

        Args:
            grid: patches in a row.
        """
        positions = self.positional_embedding
        new = interpolate_positions(positions.detach(), (self.grid, self.grid), (grid, grid))
        self.positional_embedding = nn.Parameter(new.clone(), positions.requires_grad)
        self.grid = grid

    def _embed(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch tokens wide"]:
        """Class token and patches with their positions, normed."""
        grid = self.grid_of(pixels)
        positions, trained = self.positional_embedding, (self.grid, self.grid)
        if grid != trained:
            warnings.warn(
                f"a grid of {grid[0]}x{grid[1]} patches instead of the trained "
                f"{self.grid}x{self.grid}: positions are interpolated",
                stacklevel=2,
            )
            positions = interpolate_positions(positions, trained, grid)
        patches = self.conv1(pixels).flatten(2).transpose(1, 2) + positions[1:]
        cls = (self.class_embedding + positions[0]).expand(patches.shape[0], 1, -1)
        return self.ln_pre(torch.cat([cls, patches], 1))


def interpolate_positions(
    positions: Float[Tensor, "positions width"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "others width"]:
    """Position embeddings of another grid: bicubic, with the class token's kept apart.

    Args:
        positions: of the class token, then of the patches row by row.
        old: rows and columns of these.
        new: rows and columns wanted.
    """
    dtype = torch.promote_types(positions.dtype, torch.float32)
    image = positions[None, 1:].to(dtype).unflatten(1, old).permute(0, 3, 1, 2)
    # as transformers' CLIPModel does it; the kernel of open_clip and timm differs (antialiasing)
    image = F.interpolate(image, new, mode="bicubic", align_corners=False)
    patches = image.permute(0, 2, 3, 1).flatten(0, 2)
    return torch.cat([positions[:1], patches.to(positions.dtype)])
