"""Configurations of the two towers, by value and by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from tenfold.errors import UserError

Activation = Literal["quick_gelu", "gelu"]
"""Of the MLPs: OpenAI's weights need quick_gelu, many of LAION's gelu."""


@dataclass(frozen=True)
class FilipConfig:
    """Everything that the constructor of `FilipModel` needs to know.

    The defaults are FILIP-base: CLIP's ViT-B/32 towers with a joint width of 256.

    Attributes:
        image_size: height and width in training, in pixels.
        patch_size: height and width of a patch, in pixels.
        vision_width: of the image tokens.
        vision_layers: blocks of the image tower.
        vision_heads: heads of its attention.
        text_width: of the text tokens.
        text_layers: blocks of the text tower.
        text_heads: heads of its attention.
        context_length: the most ids of a caption, start and end included.
        vocab_size: number of ids.
        embed_dim: joint width of both towers' tokens.
        act: activation of the MLPs.
        proj_bias: whether the projections to the joint width have a bias (DeCLIP's weights).
        visual_ln_post: whether a norm comes before the image tokens' projection.
        include_cls: whether the class token is one of the image's tokens, before the patches.
        drop_bos: whether the start of a caption is masked.
        drop_eos: whether the end of a caption is masked.
        pooled: one token each, the class token and the end token: CLIP, the baseline.
        learned_tokens: number of tokens that a `TokenLearner` makes of the patches; 0 for none.
        end_id: id of a caption's end; None for the largest id.
        token_std: of the ids' embeddings at the start.
        min_log_scale: lower bound of the logarithm of 1 / temperature; None for none.
        max_log_scale: its upper bound.

    Raises:
        ValueError: values that do not go together.
    """

    image_size: int = 224
    patch_size: int = 32
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    context_length: int = 77
    vocab_size: int = 49408
    embed_dim: int = 256
    act: Activation = "quick_gelu"
    proj_bias: bool = False
    visual_ln_post: bool = True
    include_cls: bool = False
    drop_bos: bool = False
    drop_eos: bool = False
    pooled: bool = False
    learned_tokens: int = 0
    end_id: int | None = None
    token_std: float = 0.02
    min_log_scale: float | None = None
    max_log_scale: float = math.log(100)

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.image_size % self.patch_size:
            nearest = nearest_sizes(self.image_size, self.patch_size)
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}: "
                f"the nearest valid is {nearest}"
            )
        if self.act not in get_args(Activation):
            raise ValueError(f"act must be one of {', '.join(get_args(Activation))}: {self.act!r}")
        if not 0 <= self.end < self.vocab_size:
            raise ValueError(f"end_id {self.end} is not one of {self.vocab_size} ids")
        if self.learned_tokens and (self.include_cls or self.pooled):
            raise ValueError("learned_tokens are made of the patches: no include_cls, no pooled")

    @property
    def end(self) -> int:
        """Id of a caption's end."""
        return self.vocab_size - 1 if self.end_id is None else self.end_id

    @property
    def grid(self) -> int:
        """Patches in a row of the image in training."""
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        """Tokens that an image has in the interaction, in training."""
        if self.pooled:
            return 1
        return self.learned_tokens or self.grid**2 + int(self.include_cls)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FilipConfig:
        """The configuration with these fields, and the defaults of the others.

        Raises:
            ValueError: no such field, or values that do not go together.
        """
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"no such field of a configuration: {', '.join(unknown)}")
        return cls(**values)


def nearest_sizes(side: int, patch: int) -> str:
    """The multiples of a patch around a side in pixels, such as "16 or 24"."""
    below = side // patch * patch
    return f"{below} or {below + patch}" if below and side % patch else str(below or patch)


_POSITIVE = (
    *("image_size", "patch_size", "vision_width", "vision_layers", "vision_heads"),
    *("text_width", "text_layers", "text_heads", "context_length", "vocab_size", "embed_dim"),
)

_BASE = FilipConfig()
_LARGE = FilipConfig(
    patch_size=14,
    vision_width=1024,
    vision_layers=24,
    vision_heads=16,
    text_width=768,
    text_heads=12,
)
_TINY = FilipConfig(
    image_size=48,
    patch_size=8,
    vision_width=64,
    vision_layers=2,
    vision_heads=4,
    text_width=64,
    text_layers=2,
    text_heads=4,
    context_length=24,
    vocab_size=27,
    embed_dim=32,
    act="gelu",
    token_std=1.0,  # with CLIP's 0.02 its loss needs more steps than the embedded task has
)

CONFIGS: Mapping[str, FilipConfig] = {
    "filip_base_patch32_224": _BASE,
    "filip_base_patch16_224": replace(_BASE, patch_size=16),
    "filip_large_patch14_224": _LARGE,
    "filip_large_patch14_392": replace(_LARGE, image_size=392),
    "filip_tiny": _TINY,
    "wukong_large_patch14": replace(
        _LARGE,
        context_length=32,
        vocab_size=21128,
        learned_tokens=24,
        end_id=102,  # [SEP] of the Chinese BERT's vocabulary
    ),
    "clip_tiny": replace(_TINY, embed_dim=128, pooled=True),
}
"""The named configurations: the paper's, MindFormers' Chinese one, and those of the embedded task.

`clip_tiny` is CLIP with the towers of `filip_tiny` and four times its joint width."""


def get_config(name: str, **overrides: Any) -> FilipConfig:
    """A named configuration, some of its fields changed.

    >>> get_config("filip_base_patch32_224", embed_dim=512).embed_dim
    512

    Raises:
        UserError: no such name.
        ValueError: no such field, or values that do not go together.
    """
    if name not in CONFIGS:
        raise UserError(f"no configuration is called {name!r}", fix=f"choose {', '.join(CONFIGS)}")
    return FilipConfig.from_dict(CONFIGS[name].to_dict() | overrides)
