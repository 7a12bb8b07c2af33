"""cost: what distilling with a loss costs beside training the student alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ickd.commands.common import millions, open_model
from ickd.measure import (
    FLOOR,
    IccCost,
    Term,
    TermCost,
    floor_macs,
    icc_cost,
    leaf_taps,
    network_cost,
    step_times,
    term_cost,
    term_times,
)
from ickd.module import LossChoice, Objective, parse_losses
from ickd.module.checks import check_classes
from ickd.networks import Network
from tenfold.console import at_least, columns
from tenfold.device import Timing, pick_device, report
from tenfold.distillation import ICCLoss, Taps, loss_class
from tenfold.errors import UserError


def cost(
    *,
    student: str,
    teacher: str,
    losses: dict[str, Any] | str = "ickd",
    batch: int = 64,
    image_size: int | None = None,
    num_classes: int | None = None,
    items: int = 50_000,
    repeats: int = 10,
    device: str = "auto",
    out: Path | None = None,
) -> None:
    """Tell the parameters, multiply-adds, bytes and seconds of a distillation, loss by loss.

    Args:
        student: a network such as zoo:resnet8x4, a checkpoint or a model folder.
        teacher: likewise.
        losses: with commas, several in one term with a plus (kd,ickd,kd+ickd); or one by one with
            options, such as '{"ickd_grid": {"grid": [8, 8]}}'.
        batch: images in a step.
        image_size: side of the images in pixels; what the student usually sees if left out.
        num_classes: of both networks, where they are named; their own if left out.
        items: of the training set, all of which crd remembers.
        repeats: timed rounds.
        device: cpu, cuda, mps or auto.
        out: JSON file for the result.
    """
    at_least(1, image_size=image_size, num_classes=num_classes, repeats=repeats)
    at_least(2, batch=batch, items=items)
    place = pick_device(device)
    options = {} if num_classes is None else {"num_classes": num_classes}
    ours, theirs = (open_model(name, **options).to(place) for name in (student, teacher))
    size = image_size or ours.example_size
    pixels = _pixels(ours, batch, size, place)
    found = _measure(ours, theirs, losses, pixels, items, repeats)
    print(_text(found, batch))
    if out is not None:
        setting = {"batch": batch, "image_size": size, "device": str(place), "repeats": repeats}
        result = {"machine": report(), "setting": setting, **_plain(found)}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {out}")


def _measure(
    student: Network,
    teacher: Network,
    losses: Mapping[str, Any] | str,
    pixels: Tensor,
    items: int,
    repeats: int,
) -> dict[str, Any]:
    """Everything that is told about the two networks and the losses between them."""
    size = pixels.shape[-1]
    costs = network_cost(student, size), network_cost(teacher, size)
    student.train()
    with torch.no_grad():
        says = teacher.requires_grad_(False).taps(pixels)
    taps = leaf_taps(student.taps(pixels))
    named = _objectives(losses, taps, says, items)
    terms = [_term(name, objective, taps) for name, objective in named.items()]
    return {
        "networks": costs,
        "terms": [term_cost(term, taps, says) for term in terms],
        "alone": term_times(terms, taps, says, pixels.device, repeats),
        "step": step_times(student, teacher, terms, pixels, repeats),
        "icc": _correlations(named, taps, says, repeats),
    }


def _pixels(network: Network, batch: int, size: int, place: torch.device) -> Tensor:
    shape = (batch, len(network.expects.mean), size, size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(place)


def _objectives(
    losses: Mapping[str, Any] | str, student: Taps, teacher: Taps, items: int
) -> dict[str, Objective]:
    """Every loss, or sum of losses, of the command line with adaptors of its own."""
    if isinstance(losses, str):
        asked: dict[str, Any] = {name.strip(): name.strip() for name in losses.split(",")}
    else:
        asked = {name: {name: value} for name, value in losses.items()}
    named = {}
    for name, given in asked.items():
        choices = [_with_items(choice, items) for choice in parse_losses(given)]
        if not choices:
            continue
        check_classes(choices, student, teacher)
        objective = Objective(choices, student, teacher, ce_weight=0.0, init_epochs=1)
        assert student.logits is not None
        named[name] = objective.to(student.logits.device)
    if not named:
        raise UserError(f"no loss in --losses {losses!r}", fix="name some, such as kd,ickd")
    return named


def _with_items(choice: LossChoice, items: int) -> LossChoice:
    """A loss that remembers the training set gets one, of ten classes."""
    if not hasattr(loss_class(choice.name), "set_labels"):
        return choice
    known = {"n_data": items, "labels": torch.arange(items) % 10}
    return replace(choice, options={**known, **choice.options})


def _term(name: str, objective: Objective, student: Taps) -> Term:
    assert student.logits is not None
    logits = student.logits
    shape = (len(logits), *logits.shape[2:])
    facts = {
        "label": torch.zeros(shape, dtype=torch.int64, device=logits.device),
        "index": torch.arange(len(logits), device=logits.device),
    }
    # the first epoch only prepares, and some losses act in no other
    epoch = int(all(loss_class(choice.name).stage != "init" for choice in objective.choices))

    def loss(ours: Taps, theirs: Taps) -> Tensor:
        return torch.stack(list(objective(ours, theirs, facts, epoch).values())).sum()

    return Term(name, loss, objective, objective.needs_taps)


def _correlations(
    named: Mapping[str, Objective], student: Taps, teacher: Taps, repeats: int
) -> list[IccCost]:
    """Both forms of every different ICC loss; of the plain one where none was asked for."""
    found: dict[Any, IccCost] = {}
    for name, objective in named.items():
        for loss, *maps in objective.correlations(student, teacher):
            key = (loss.grid, loss.normalize, loss.reference_compat, *(m.shape for m in maps))
            if key not in found:
                found[key] = icc_cost(name, loss, *maps, repeats=repeats)
    if not found:
        maps = student.signal("last"), teacher.signal("last")
        loss = ICCLoss.for_taps(student, teacher).to(maps[0].device)
        return [icc_cost("ickd", loss, *maps, repeats=repeats)]
    return list(found.values())


# -- what is printed ---------------------------------------------------------------------------


def _text(found: Mapping[str, Any], batch: int) -> str:
    student, teacher = found["networks"]
    step = found["step"]
    rows = [["", "network", "params", "MACs/image", "input"]]
    for role, network in (("student", student), ("teacher", teacher)):
        shape = "x".join(map(str, network.input))
        params = f"{network.parameters:,}"
        rows.append([role, network.name, params, millions(network.macs), shape])
    floor = floor_macs(student, teacher)
    parts = [
        columns(rows, left=2),
        f"floor of a step, 3 x student + teacher: {millions(floor)} MACs/image, "
        f"{step[FLOOR].median_ms:.1f} ms for {batch} images",
        _losses_table(found, floor),
        *map(_forms_table, found["icc"]),
    ]
    timings = [*step.values(), *found["alone"].values()]
    if any(timing.busy for timing in timings):
        parts.append("the machine was busy: do not quote the times")
    return "\n\n".join(parts)


def _losses_table(found: Mapping[str, Any], floor: int) -> str:
    heads = ["loss", "adaptor params", "adaptor MACs", "loss MACs", "KiB/image"]
    rows = [[*heads, "ms alone", "ms step", "floor/step, MACs", "floor/step, time"]]
    for term in found["terms"]:
        alone, step = found["alone"][term.name].median_ms, found["step"][term.name].median_ms
        rows.append(
            [
                term.name,
                f"{term.parameters:,}",
                millions(term.adaptor_macs),
                millions(term.macs),
                f"{term.bytes / 1024:.1f}",
                f"{alone:.2f}",
                f"{step:.1f}",
                f"{floor / (floor + term.macs):.1%}",
                f"{found['step'][FLOOR].median_ms / step:.1%}",
            ]
        )
    return columns(rows)


def _forms_table(icc: IccCost) -> str:
    p, q = icc.pixels
    cells = f" in each of {icc.cells} cells" if icc.cells > 1 else ""
    title = (
        f"both forms of {icc.name}: {icc.channels} channels, {p} pixels of the student and {q} of "
        f"the teacher{cells}; {icc.auto} if it is not told; times with {icc.batch} images"
    )
    rows = [["form", "MACs/image", "KiB/image", "KiB counted", "ms/image"]]
    for form, cost in icc.forms.items():
        cells = [f"{cost.bytes / 1024:.1f}", f"{cost.peak / 1024:.1f}"]
        time = f"{cost.timing.median_ms:.3f}"
        rows.append([form, millions(cost.macs), *cells, time])
    direct, low = icc.forms["direct"], icc.forms["low_memory"]
    ratios = [direct.macs / low.macs, direct.bytes / low.bytes, direct.peak / low.peak]
    ratios.append(direct.timing.median_ms / low.timing.median_ms)
    rows.append(["direct / low_memory", *(f"{ratio:.2f}" for ratio in ratios)])
    return title + "\n" + columns(rows)


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    student, teacher = found["networks"]
    step, alone = found["step"], found["alone"]
    floor = floor_macs(student, teacher)
    return {
        "student": asdict(student),
        "teacher": asdict(teacher),
        "floor": {"macs": floor, "timing": step[FLOOR].as_dict()},
        "losses": [
            {
                **asdict(term),
                **_timings(term, alone, step),
                "macs_share": floor / (floor + term.macs),
            }
            for term in found["terms"]
        ],
        "icc": [asdict(icc) for icc in found["icc"]],
    }


def _timings(
    term: TermCost, alone: Mapping[str, Timing], step: Mapping[str, Timing]
) -> dict[str, Any]:
    whole = step[term.name]
    share = step[FLOOR].median_ms / whole.median_ms
    return {
        "alone": alone[term.name].as_dict(),
        "step": whole.as_dict(),
        "time_share": share,
    }
