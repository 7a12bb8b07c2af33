"""Routes and what runs along them: the words that all networks use."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from tenfold.errors import UserError

LARGEST = "largest"
RouteLike = int | str | tuple[int, ...]


@dataclass(frozen=True)
class Route:
    """One sub-network: its active widths and what an image costs on it.

    Attributes:
        index: position among the network's routes, narrowest first.
        widths: active widths of the gated stages.
        madds: multiply-adds of one image at the network's own image size.
        params: active parameters, the slimming head not counted.
    """

    index: int
    widths: tuple[int, ...]
    madds: int
    params: int


class Front(NamedTuple):
    """What the fixed front or a stage hands on: features, and a vector for the next gate.

    Behind the last stage the features are class logits and the vector is empty.
    """

    features: Float[Tensor, "batch ..."]
    gate_input: Float[Tensor, "batch hidden"]


class DynamicOutput(NamedTuple):
    """Result of dynamic inference, in the order of the input batch."""

    logits: Float[Tensor, "batch classes"]
    routes: Int[Tensor, "batch gates"]
    madds: Int[Tensor, " batch"]


class NotFiniteError(UserError):
    """An image that cannot be routed or classified, by its number in the batch.

    Attributes:
        image: the number.
    """

    def __init__(self, what: str, image: int, name: object = None) -> None:
        """Names the image by its number, unless a better name is known."""
        self.image = image
        super().__init__(
            what,
            where=f"image {image} of the batch" if name is None else f"image {name}",
            fix="look for NaN or infinite values in that image or in the weights",
        )


@contextmanager
def naming_images(names: Sequence[object]) -> Iterator[None]:
    """Inside, an image that is not finite is told by its own name.

    Args:
        names: of the images of the batch, such as their files.
    """
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(error.what, error.image, names[error.image]) from error


def check_choice(choice: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Returns positions on the host, if every image has one.

    Raises:
        NotFiniteError: -1 among them, which stands for gate logits that are not finite.
    """
    if bool((choice < 0).any()):
        index = int((choice < 0).nonzero()[0])
        raise NotFiniteError("the gate's logits are not finite", index)
    return choice


class PlainRoute(nn.Module):
    """Front and rest of one static route."""

    def __init__(self, front: nn.Module, rest: nn.Module) -> None:
        """Takes a front that returns (features, gate logits) and the rest of the route."""
        super().__init__()
        self.front = front
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        """Class logits."""
        return self.rest(self.front(x)[0])


def default_space(num_routes: int, outputs: int) -> tuple[int, ...]:
    """Evenly spaced routes from the first to the last, one for each gate output.

    Raises:
        UserError: fewer than two outputs, or more than there are routes.
    """
    if not 2 <= outputs <= num_routes:
        raise UserError(
            f"the slimming head has {outputs} outputs, the network {num_routes} routes",
            fix="give gate_outputs from 2 to the number of routes",
        )
    return tuple(j * (num_routes - 1) // max(outputs - 1, 1) for j in range(outputs))


def half(side: int, stride: int) -> int:
    """Side of a feature map after a convolution of this stride that keeps the size otherwise."""
    return -(-side // stride)
