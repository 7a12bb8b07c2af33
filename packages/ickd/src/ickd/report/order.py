"""One order of channels for all matrices: alike channels of the teacher side by side."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage

GROUPS = 6
"""At most so many groups of channels are told apart."""

_OPTIMAL = 1024
"""Channels up to which the best of all orders of the tree is sought, which takes C³."""


class ChannelOrder(NamedTuple):
    """Channels in the order in which they are drawn.

    Attributes:
        channels: their positions in the map.
        groups: the group of each of `channels`; groups are contiguous and counted from 0.
    """

    channels: Int[ndarray, " channels"]
    groups: Int[ndarray, " channels"]

    def arrange(self, matrix: Float[ndarray, "channels channels"]) -> Float[ndarray, "_ _"]:
        """The matrix with rows and columns in this order."""
        return matrix[np.ix_(self.channels, self.channels)]

    @property
    def borders(self) -> list[int]:
        """Positions at which another group begins."""
        return (np.flatnonzero(np.diff(self.groups)) + 1).tolist()


def cluster_channels(
    correlation: Float[ndarray, "channels channels"], groups: int = GROUPS
) -> ChannelOrder:
    """Order channels by hierarchical clustering (Ward) of their rows, brought to unit length.

    Two channels are near if they relate alike to all others. The branches of the tree are turned so
    that neighbours are as near as they can be (Bar-Joseph et al., 2001).

    Args:
        correlation: of the teacher's channels; rows of zeros come to lie side by side.
        groups: at most so many.
    """
    count = len(correlation)
    if count == 1:
        return ChannelOrder(np.zeros(1, int), np.zeros(1, int))
    lengths = np.linalg.norm(correlation, axis=1, keepdims=True)
    rows = correlation / np.maximum(lengths, np.finfo(float).tiny)
    tree = linkage(rows, "ward", optimal_ordering=count <= _OPTIMAL)
    channels = leaves_list(tree)
    found = fcluster(tree, groups, "maxclust")[channels]
    return ChannelOrder(channels, np.cumsum(np.diff(found, prepend=found[0]) != 0))
