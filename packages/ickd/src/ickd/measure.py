"""What distillation costs: parameters, multiply-adds, bytes and seconds of networks and losses.

Multiply-adds of networks and adaptors are those of convolutions and linear layers in one forward
pass; those of a loss are all its matrix products, forward and backward. Bytes are those of the
tensors that a loss makes, at the worst moment: outputs of operations, not their inner workspace.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ickd.model.cost import count_macs
from ickd.networks import Network
from tenfold.device import Timing, time_interleaved
from tenfold.distillation import ICCLoss, Taps, grid_cells

FLOAT = 4  # bytes


class Term(NamedTuple):
    """A distillation loss as something to measure.

    Attributes:
        name: what it is called.
        loss: of the student's and the teacher's taps.
        adaptors: its trained parts.
        needs_taps: whether it compares more than logits.
    """

    name: str
    loss: Callable[[Taps, Taps], Tensor]
    adaptors: nn.Module
    needs_taps: bool = True


# -- networks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkCost:
    """What a network costs.

    Attributes:
        name: of the network.
        parameters: trainable numbers.
        macs: multiply-adds of one image.
        input: (channels, height, width) of the images that it sees.
    """

    name: str
    parameters: int
    macs: int
    input: tuple[int, ...]


def network_cost(network: Network, image_size: int) -> NetworkCost:
    """Parameters and multiply-adds of a network.

    Args:
        network: any.
        image_size: side of the images that are given; they are resized if it wants them so.
    """
    channels, side = len(network.expects.mean), network.expects.size or image_size
    parameters = sum(p.numel() for p in network.net.parameters())
    macs = count_macs(network.net, side, channels)
    return NetworkCost(network.name, parameters, macs, (channels, side, side))


@contextmanager
def count_layers(module: nn.Module) -> Iterator[list[int]]:
    """Inside, every convolution and linear layer of a module adds its multiply-adds to the list."""
    macs: list[int] = []

    def count(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        weight: Any = layer.weight
        turned = isinstance(layer, nn.ConvTranspose2d)  # every input meets a whole kernel
        macs.append((args[0] if turned else output).numel() * weight[0].numel())

    kinds = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
    hooks = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, kinds)]
    try:
        yield macs
    finally:
        for hook in hooks:
            hook.remove()


# -- losses ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TermCost:
    """What a loss costs beside both networks.

    Attributes:
        name: of the loss.
        parameters: trainable numbers of its adaptors.
        adaptor_macs: multiply-adds of the adaptors' layers for one image, forward.
        macs: of all its matrix products for one image, forward and backward.
        bytes: of the tensors that it makes for one image, at the worst moment.
    """

    name: str
    parameters: int
    adaptor_macs: int
    macs: int
    bytes: int


def leaf_taps(taps: Taps) -> Taps:
    """Copies of taps at which a gradient ends; tensors that are one stay one."""
    made: dict[int, Tensor] = {}

    def leaf(value: Tensor) -> Tensor:
        return made.setdefault(id(value), value.detach().clone().requires_grad_())

    return map_taps(taps, leaf)


def map_taps(taps: Taps, function: Callable[[Tensor], Tensor]) -> Taps:
    """Taps with a function applied to every tensor."""
    changes: dict[str, Any] = {}
    for field in ("pooled", "logits", "last"):
        value = getattr(taps, field)
        changes[field] = None if value is None else function(value)
    for field in ("maps", "preacts"):
        changes[field] = tuple(function(value) for value in getattr(taps, field))
    return replace(taps, **changes)


def tensors_of(taps: Taps) -> list[Tensor]:
    """The different tensors of taps."""
    found: dict[int, Tensor] = {}
    map_taps(taps, lambda value: found.setdefault(id(value), value))
    return list(found.values())


def gradient_of(term: Term, student: Taps, teacher: Taps) -> Callable[[], None]:
    """A function that runs a loss forward and backward, to the student's taps and the adaptors.

    Args:
        term: the loss.
        student: leaves, of `leaf_taps`.
        teacher: constants.
    """
    leaves = tensors_of(student)

    def run() -> None:
        term.loss(student, teacher).backward()
        term.adaptors.zero_grad()
        for leaf in leaves:
            leaf.grad = None

    return run


def term_cost(term: Term, student: Taps, teacher: Taps) -> TermCost:
    """Parameters, multiply-adds and bytes of a loss.

    Args:
        term: the loss.
        student: leaves, of `leaf_taps`.
        teacher: constants.
    """
    batch, run = len(tensors_of(student)[0]), gradient_of(term, student, teacher)
    run()  # a loss may make its memory at the first batch
    known = [*tensors_of(student), *tensors_of(teacher)]
    known += [*term.adaptors.parameters(), *term.adaptors.buffers()]
    with torch.no_grad(), count_layers(term.adaptors) as layers:
        term.loss(student, teacher)
    with FlopCounterMode(display=False) as flops:
        run()
    with PeakBytes(known) as memory:
        run()
    parameters = sum(p.numel() for p in term.adaptors.parameters() if p.requires_grad)
    macs = flops.get_total_flops() // 2
    per_image = (sum(layers) // batch, macs // batch, memory.peak // batch)
    return TermCost(term.name, parameters, *per_image)


class PeakBytes(TorchDispatchMode):
    """Inside, the bytes of the tensors that operations return, at the worst moment, as `peak`.

    It counts on every device alike, memory that tensors share once.

    Args:
        known: tensors that were there before and do not count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


# -- inter-channel correlation -----------------------------------------------------------------


@dataclass(frozen=True)
class FormCost:
    """What a form of the ICC loss costs for one image.

    Attributes:
        macs: multiply-adds forward, of `icc_formula`.
        bytes: at the worst moment, of `icc_formula`.
        peak: the same, counted.
        timing: forward and backward.
    """

    macs: int
    bytes: int
    peak: int
    timing: Timing


@dataclass(frozen=True)
class IccCost:
    """Both forms of the ICC loss at the taps of two networks, without the embedding.

    Attributes:
        name: of the loss.
        channels: of both maps, the student's being embedded.
        pixels: of the student's and the teacher's map, or of a cell of the grid.
        cells: of the grid, 1 without.
        batch: images that were timed.
        auto: the form that the loss takes if it is not told.
        forms: by name, "direct" and "low_memory".
    """

    name: str
    channels: int
    pixels: tuple[int, int]
    cells: int
    batch: int
    auto: str
    forms: dict[str, FormCost]


def icc_formula(
    channels: int, pixels: tuple[int, int], cells: int = 1, *, low_memory: bool
) -> tuple[int, int]:
    """Multiply-adds of the row-normalised loss forward, and bytes at its worst moment, per image.

    Direct, the two matrices take C²·p multiply-adds each, and six of C×C are alive in the
    backward pass. The low-memory form (section 3.6) has three kernels p×p, each multiplied once
    more by a map, and four maps C×p are alive.

    Args:
        channels: C of both maps.
        pixels: of the student's and of the teacher's map, or of one cell.
        cells: of the grid.
        low_memory: which form.
    """
    c, (p, q) = channels, pixels
    if not low_memory:
        return cells * c * c * (p + q), cells * FLOAT * 6 * c * c
    backward = 4 * c * p + p * (p + q)
    forward = c * (p + 2 * q) + p * (p + q)  # worse where the teacher's map is larger
    macs = 2 * c * (p * p + q * q + p * q)
    return cells * macs, cells * FLOAT * max(backward, forward)


def icc_cost(
    name: str,
    loss: ICCLoss,
    student: Tensor,
    teacher: Tensor,
    *,
    repeats: int = 10,
    limit: int = 2**30,
) -> IccCost:
    """Compare both forms of an ICC loss on the maps that it compares.

    Args:
        name: what it is called.
        loss: any of its variants; the formulas are those of the row-normalised one.
        student: its map (batch, channels, height, width), not embedded.
        teacher: the teacher's.
        repeats: timed rounds.
        limit: bytes that the direct form may take; fewer images are timed where it needs more.
    """
    with torch.no_grad():
        maps = loss.embed_s(student.detach()), teacher.detach()
    channels, pixels, cells = maps[0].shape[1], *_cell_pixels(loss, maps)
    formulas = {f: icc_formula(channels, pixels, cells, low_memory=f != "direct") for f in _FORMS}
    batch = max(1, min(len(student), limit // formulas["direct"][1]))
    ours, theirs = maps[0][:batch].clone().requires_grad_(), maps[1][:batch]
    runs = {form: _in_form(loss, form, ours, theirs) for form in _FORMS}
    peaks = {}
    for form, run in runs.items():
        with PeakBytes([ours, theirs]) as memory:
            run()
        peaks[form] = memory.peak // batch
    times = time_interleaved(runs, device=ours.device, warmup=1, repeats=repeats)
    forms = {
        form: FormCost(*formulas[form], peaks[form], times[form].per_item(batch)) for form in _FORMS
    }
    auto = "low_memory" if 2 * max(pixels) <= channels else "direct"
    return IccCost(name, channels, pixels, cells, batch, auto, forms)


_FORMS = ("direct", "low_memory")


def _cell_pixels(loss: ICCLoss, maps: Sequence[Tensor]) -> tuple[tuple[int, int], int]:
    """Pixels of a cell of both maps, and the number of cells."""
    if loss.grid is None:
        return (maps[0][0, 0].numel(), maps[1][0, 0].numel()), 1
    cut = [grid_cells(m[:1], loss.grid, reference_compat=loss.reference_compat) for m in maps]
    return (cut[0][0, 0].numel(), cut[1][0, 0].numel()), len(cut[0])


def _in_form(loss: ICCLoss, form: Any, student: Tensor, teacher: Tensor) -> Callable[[], None]:
    bare = copy.deepcopy(loss)
    bare.form, bare.embed_s = form, nn.Identity()

    def run() -> None:
        bare(student, teacher).backward()
        student.grad = None

    return run


# -- steps -------------------------------------------------------------------------------------

FLOOR = "floor"
"""The step without a distillation loss: both networks' forward passes, the student's backward."""


def floor_macs(student: NetworkCost, teacher: NetworkCost) -> int:
    """Multiply-adds of an image that no distillation step can do without (section 12)."""
    return 3 * student.macs + teacher.macs


def step_times(
    student: Network, teacher: Network, terms: Sequence[Term], pixels: Tensor, repeats: int = 10
) -> dict[str, Timing]:
    """Times of whole training steps without the optimiser, by the name of the loss, and of `FLOOR`.

    Args:
        student: in train mode; its running statistics move.
        teacher: in eval mode.
        terms: losses.
        pixels: images in 0..1.
        repeats: timed rounds.
    """
    logits = student(pixels).detach()
    shape = (logits.shape[0], *logits.shape[2:])
    label = torch.zeros(shape, dtype=torch.int64, device=logits.device)

    def step(term: Term | None) -> Callable[[], None]:
        def run() -> None:
            with_taps = term is not None and term.needs_taps
            with torch.no_grad():
                theirs = _say(teacher, pixels, with_taps)
            ours = _say(student, pixels, with_taps)
            assert ours.logits is not None
            loss = F.cross_entropy(ours.logits, label)
            if term is not None:
                loss = loss + term.loss(ours, theirs)
                term.adaptors.zero_grad()
            student.zero_grad()
            loss.backward()

        return run

    runs = {FLOOR: step(None)} | {term.name: step(term) for term in terms}
    return time_interleaved(runs, device=pixels.device, warmup=1, repeats=repeats)


def _say(network: Network, pixels: Tensor, with_taps: bool) -> Taps:
    return network.taps(pixels) if with_taps else Taps(logits=network(pixels))


def term_times(
    terms: Sequence[Term], student: Taps, teacher: Taps, device: torch.device, repeats: int = 10
) -> dict[str, Timing]:
    """Times of losses alone, forward and backward, by name.

    Args:
        terms: losses, at least one.
        student: leaves, of `leaf_taps`.
        teacher: constants.
        device: where they are.
        repeats: timed rounds.
    """
    runs = {term.name: gradient_of(term, student, teacher) for term in terms}
    return time_interleaved(runs, device=device, warmup=2, repeats=repeats)
