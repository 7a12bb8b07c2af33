"""What reading a published checkpoint gives."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Converted:
    """Weights of a published checkpoint under our names.

    Attributes:
        network: what they belong to, as `ickd.networks` names it, such as "deeplab:resnet18".
        state: its state dict.
        notes: what the person should know, a line each.
        dropped: keys of the file that are not in `state`.
        embedding: weights of the student's embedding, which is not part of the network.
    """

    network: str
    state: dict[str, Tensor]
    notes: list[str]
    dropped: list[str]
    embedding: dict[str, Tensor]
