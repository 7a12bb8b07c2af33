"""Activations and their Lipschitz constants, the largest slopes they take anywhere."""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_TANH_GELU = functools.partial(F.gelu, approximate="tanh")

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "silu": F.silu,
    "swish": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The element-wise function of a name that transformers uses.

    Raises:
        ValueError: no such name.
    """
    if name not in _FUNCTIONS:
        raise ValueError(f"no activation {name!r}; there are {', '.join(_FUNCTIONS)}")
    return _FUNCTIONS[name]


@functools.cache
def lipschitz(name: str) -> float | None:
    """The Lipschitz constant of the activation that transformers calls `name`.

    None where no global constant is known. Gated units (GeGLU, SwiGLU) have none, as they multiply
    two linear maps of their input: for them pass a name such as "geglu", not that of the gate.
    """
    match name:
        case "relu" | "tanh":
            return 1.0
        case "gelu" | "gelu_python":
            return _gelu()
        case "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh":
            return _tanh_gelu()
        case "silu" | "swish" | "quick_gelu":  # x s(cx) has the slopes of x s(x), at x / c
            return _silu()
        case _:
            return None


def _gelu() -> float:
    """Φ(√2) + √2 φ(√2): the slope Φ(x) + x φ(x) turns where φ(x) (2 - x²) = 0."""
    cumulative = (1 + math.erf(1)) / 2
    density = math.exp(-1) / math.sqrt(2 * math.pi)
    return cumulative + math.sqrt(2) * density


def _silu() -> float:
    """(1 + t) / 2 with t tanh t = 1: the slope of x s(x) turns at x = 2t."""
    root = _zero_between_1_and_2(lambda t: 1 - t * math.tanh(t))
    return (1 + root) / 2


def _tanh_gelu() -> float:
    """The slope of x (1 + tanh u) / 2, u = √(2/π) (x + 0.044715 x³), at its turning point.

    With T = tanh u and u' = du/dx the slope is (1 + T + x (1 - T²) u') / 2, and it turns where
    u' + x u'' / 2 = x T u'².
    """
    scale, cubic = math.sqrt(2 / math.pi), 0.044715

    def parts(x: float) -> tuple[float, float]:
        return math.tanh(scale * (x + cubic * x**3)), scale * (1 + 3 * cubic * x**2)

    def turn(x: float) -> float:
        tanh, du = parts(x)
        return du + x * (6 * scale * cubic * x) / 2 - x * tanh * du**2

    x = _zero_between_1_and_2(turn)
    tanh, du = parts(x)
    return (1 + tanh + x * (1 - tanh**2) * du) / 2


def _zero_between_1_and_2(falling: Callable[[float], float]) -> float:
    """Where the function changes from plus to minus, by bisection to the last digit."""
    low, high = 1.0, 2.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return low
