"""A few tokens in the place of many patches."""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

GROUPS = 8


class TokenLearner(nn.Module):
    """Weighted means of an image's tokens, the weights learned.

    Each of the tokens has a map over the input: LayerNorm, a grouped and a plain 1x1 convolution,
    softmax over the positions. What it averages is another grouped 1x1 convolution of the input
    itself. No convolution has a bias, and there is no activation. Weights load under MindSpore's
    names too, whose norm has gamma and beta.

    Source: Ryoo et al., "TokenLearner: What Can 8 Learned Tokens Do for Images and Videos?", 2021,
    in the form and with the names of the Chinese FILIP (Wukong).

    Args:
        width: of the tokens, a multiple of 8.
        count: number of tokens that come out.

    Raises:
        ValueError: a width that 8 groups do not divide.
    """

    def __init__(self, width: int, count: int = 24) -> None:
        super().__init__()
        if width % GROUPS:
            raise ValueError(f"the {GROUPS} groups of a TokenLearner do not divide {width}")
        self.norm = nn.LayerNorm(width, eps=1e-7)
        # the misspelt name is that of the published weights
        self.attntion_maps = nn.Sequential(
            nn.Conv2d(width, width, 1, groups=GROUPS, bias=False),
            nn.Conv2d(width, count, 1, bias=False),
        )
        self.feat_conv = nn.Conv2d(width, width, 1, groups=GROUPS, bias=False)
        self.register_load_state_dict_pre_hook(_rename_norm)

    def forward(
        self, tokens: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch count width"]:
        """The learned tokens.

        Args:
            tokens: of the patches, in the joint width.
        """
        maps = self.attntion_maps(_as_image(self.norm(tokens))).squeeze(-1)
        values = self.feat_conv(_as_image(tokens)).squeeze(-1)
        return F.softmax(maps, -1) @ values.transpose(1, 2)


def _as_image(
    tokens: Float[Tensor, "batch patches width"],
) -> Float[Tensor, "batch width patches 1"]:
    return tokens.transpose(1, 2).unsqueeze(-1)


def _rename_norm(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for theirs, ours in (("gamma", "weight"), ("beta", "bias")):
        if f"{prefix}norm.{theirs}" in state:
            state[f"{prefix}norm.{ours}"] = state.pop(f"{prefix}norm.{theirs}")
