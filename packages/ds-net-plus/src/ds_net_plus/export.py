"""Plain files of every route: ExportedProgram, ONNX, and safetensors with a manifest.

`route_k` is a whole sub-network, image -> logits. `front` is what all routes share, image ->
(features, gate logits), and `rest_k` what follows it on route k, features -> logits; together they
rebuild dynamic inference anywhere. With several gates `enter_g_b_k` and `stage_g_k` stand for the
rest: the layers behind gate g that lead from route b to route k, and what follows up to the next
gate, (features, gate logits), or to the logits. Every file is read again and must answer as the
sliced network does before the manifest names it.
"""

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ds_net_plus.convert import relative_deviation
from ds_net_plus.model import DynamicNet, check_statistics, create_model
from ds_net_plus.model.routes import LARGEST, RouteLike
from tenfold.checkpoint import atomic_file, load_state
from tenfold.errors import UserError
from tenfold.graphs import GraphFormat, check_graph_format, open_graph, write_graph

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_GRAPHS: dict[str, GraphFormat] = {"onnx": "onnx", "exported-program": "pt2"}
SUFFIXES = {"torch": ".safetensors", "onnx": ".onnx", "exported-program": ".pt2"}
TOLERANCE = 1e-5
# neither is the batch size that a dynamic axis was traced with
_TRACED, _CHECKED = 2, (1, 3)
_LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}

Run = Callable[[Tensor], Any]  # input -> output, or a tuple of outputs


@dataclass(frozen=True)
class Part:
    """A piece of the network.

    Attributes:
        kind: "route", "front", "rest", "enter" or "stage".
        route: route of the piece; None for the front.
        gate: number of the gate in front of it, of the last two kinds.
        before: route of the stage before, of "enter".
        last: whether nothing follows a "stage".
    """

    kind: str
    route: RouteLike | None = None
    gate: int | None = None
    before: int | None = None
    last: bool = False

    @property
    def name(self) -> str:
        """What its files are called."""
        keys = [key for key in (self.gate, self.before, self.route) if key is not None]
        names = ["-".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in keys]
        return "_".join([self.kind, *names])

    @property
    def ports(self) -> tuple[str, tuple[str, ...]]:
        """Names of input and outputs."""
        if self.kind == "stage":
            return "entered", ("logits",) if self.last else ("features", "gate_logits")
        return {
            "route": ("image", ("logits",)),
            "front": ("image", ("features", "gate_logits")),
            "rest": ("features", ("logits",)),
            "enter": ("features", ("entered",)),
        }[self.kind]


@dataclass(frozen=True)
class Exported:
    """One file of an export.

    Attributes:
        part: the part's name, such as "route_0" or "front".
        format: a key of `SUFFIXES`.
        path: the file.
        deviation: largest difference from the sliced network, relative to its largest output.
        batches: batch sizes that were compared.
    """

    part: str
    format: str
    path: Path
    deviation: float
    batches: tuple[int, ...]

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.batches))
        return f"{self.path}: differs by {self.deviation:.1e} at batch sizes {sizes}"


@dataclass(frozen=True)
class _Plan:
    """The network, in eval mode on the CPU, and the options that every part shares."""

    net: DynamicNet
    size: int
    batch: int | None
    fold_bn: bool
    channels_last: bool

    @property
    def recipe(self) -> dict[str, Any]:
        """What the manifest needs to rebuild the plain modules."""
        options = {"fold_bn": self.fold_bn, "channels_last": self.channels_last}
        return {"arch": self.net.name, "config": self.net.config, **options}

    @property
    def checked(self) -> tuple[int, ...]:
        return (self.batch,) if self.batch else _CHECKED

    def inputs(self, part: Part, batch: int) -> Tensor:
        """Random images, or what such images give in front of a part."""
        generator = torch.Generator().manual_seed(batch)
        shape = (batch, self.net.in_channels, self.size, self.size)
        x = torch.randn(shape, generator=generator)
        if part.ports[0] != "image":
            x = self._ahead(x, part)
        return x.contiguous(memory_format=_LAYOUTS[self.channels_last and x.ndim == 4])

    def _ahead(self, x: Tensor, part: Part) -> Tensor:
        """Features in front of a part, on the route before it throughout."""
        net, x = self.net, self.net.front(x).features
        before = part.before if part.kind == "enter" else part.route
        for gate in range(part.gate or 0):
            assert isinstance(before, int)
            x = net.stage(net.enter(x, gate, before), gate, before).features
        if part.kind == "stage":
            assert part.gate is not None
            assert isinstance(part.route, int)
            x = net.enter(x, part.gate, part.route)
        return x


def export_routes(
    net: DynamicNet,
    folder: str | Path,
    routes: RouteLike | Sequence[RouteLike] = "all",
    formats: Sequence[str] = ("torch", "onnx", "exported-program"),
    image_size: int | None = None,
    batch: str | int = "dynamic",
    fold_bn: bool = True,
    channels_last: bool = False,
    preprocessing: Mapping[str, object] | None = None,
) -> list[Exported]:
    """Writes the parts of `net` into `folder`, each compared with the sliced network.

    Args:
        net: a network with measured statistics; it is not changed.
        folder: made if need be; its manifest is written last, when every file has passed.
        routes: "all" for every route index; one route; or a list, "largest" and paths of several
            gates allowed (as whole sub-networks only).
        formats: keys of `SUFFIXES`.
        image_size: image side of programs and ONNX graphs; the network's own where None.
        batch: "dynamic", or a fixed batch size.
        fold_bn: fold the batch norms into the convolutions.
        channels_last: keep weights and activations in that memory format.
        preprocessing: what images go through before (mean, std, resize), for the manifest.

    Returns:
        One entry for each part and format.

    Raises:
        UserError: an unknown route or format, ONNX without its packages, unmeasured statistics.
        RuntimeError: a file that does not answer as the network does.
    """
    chosen = _check_routes(net, routes)
    _check_formats(formats)
    if batch != "dynamic" and (not isinstance(batch, int) or batch < 1):
        raise UserError(f"batch must be 'dynamic' or a size from 1 on, got {batch!r}")
    net = copy.deepcopy(net).cpu().float().eval().requires_grad_(False)
    check_statistics(net, chosen)
    if net.gate_trained is False:
        log.warning("the gate is untrained: the exported gate logits mean nothing yet")
    fixed = None if batch == "dynamic" else int(batch)
    plan = _Plan(net, image_size or net.image_size, fixed, fold_bn, channels_last)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    exported, entries = [], []
    for part in _parts(net, chosen):
        done = _export_part(plan, part, folder, formats)
        exported += done
        entries.append(_entry(plan, part, done))
    with atomic_file(folder / MANIFEST) as file:
        manifest = _manifest(plan, preprocessing) | {"parts": entries}
        file.write((json.dumps(manifest, indent=2) + "\n").encode())
    return exported


def _check_routes(net: DynamicNet, routes: RouteLike | Sequence[RouteLike]) -> list[RouteLike]:
    if routes == "all":
        return list(range(net.num_routes))
    alone = isinstance(routes, int | str)
    # a tuple of as many indices as there are gates is one path
    path = isinstance(routes, tuple) and len(routes) == net.num_gates > 1
    chosen: list[RouteLike] = [routes] if alone or path else list(routes)  # pyright: ignore[reportAssignmentType, reportArgumentType]
    if not chosen:
        raise UserError("there are no routes to export")
    return list(dict.fromkeys(net.check_route(route) for route in chosen))


def _check_formats(formats: Sequence[str]) -> None:
    unknown = ", ".join(repr(name) for name in formats if name not in SUFFIXES)
    if unknown or not formats:
        fix = f"choose from {', '.join(SUFFIXES)}"
        raise UserError(f"unknown export format {unknown or 'none'}", fix=fix)
    if "onnx" in formats:
        check_graph_format("onnx", "ds-net-plus")


def _parts(net: DynamicNet, chosen: Sequence[RouteLike]) -> list[Part]:
    """All parts of an export: sub-networks, front, and what dynamic inference needs behind it."""
    parts = [Part("route", route) for route in chosen] + [Part("front")]
    routes = [route for route in chosen if isinstance(route, int)]
    if net.num_gates == 1:
        return parts + [Part("rest", route) for route in routes]
    for gate in range(net.num_gates):
        last = gate + 1 == net.num_gates
        # the first stage has nothing but the front before it
        befores = [None] if gate == 0 else routes
        parts += [Part("enter", k, gate, before) for before in befores for k in routes]
        parts += [Part("stage", k, gate, last=last) for k in routes]
    return parts


def _plain(net: DynamicNet, part: Part, fold_bn: bool) -> nn.Module:
    """A part as a plain module."""
    if part.kind == "front":
        module = net.materialize_front(fold_bn=fold_bn)
    elif part.kind == "enter":
        module = net.materialize_enter(part.gate, part.before, part.route, fold_bn)  # pyright: ignore[reportArgumentType]
    elif part.kind == "stage":
        module = net.materialize_stage(part.gate, part.route, fold_bn)  # pyright: ignore[reportArgumentType]
    else:
        build = net.materialize if part.kind == "route" else net.materialize_rest
        module = build(part.route, fold_bn=fold_bn)  # pyright: ignore[reportArgumentType]
    return module.requires_grad_(False).eval()


def _sliced(net: DynamicNet, part: Part, x: Tensor) -> Any:
    """What a part must compute."""
    if part.kind == "front":
        features, gate_input = net.front(x)
        return features, net.gate_logits(gate_input)
    if part.kind == "route":
        return net(x, route=part.route)
    if part.kind == "rest":
        return net.rest(x, part.route)  # pyright: ignore[reportArgumentType]
    assert part.gate is not None
    assert isinstance(part.route, int)
    if part.kind == "enter":
        return net.enter(x, part.gate, part.route)
    features, gate_input = net.stage(x, part.gate, part.route)
    return features if part.last else (features, net.gate_logits(gate_input, part.gate + 1))


@torch.no_grad()
def _export_part(plan: _Plan, part: Part, folder: Path, formats: Sequence[str]) -> list[Exported]:
    """Writes one part in every format, and compares each file with the sliced network."""
    module = _plain(plan.net, part, plan.fold_bn)
    module = module.to(memory_format=_LAYOUTS[plan.channels_last])  # pyright: ignore[reportCallIssue]
    program = None
    if set(formats) - {"torch"}:
        shapes = None if plan.batch else ({0: torch.export.Dim("batch")},)
        example = plan.inputs(part, plan.batch or _TRACED)
        program = torch.export.export(module, (example,), dynamic_shapes=shapes)
    done = []
    for name in formats:
        path = folder / (part.name + SUFFIXES[name])
        _save(module, program, part, name, path)
        run, deviation = _open(path, name, plan.recipe, part), 0.0
        for x in (plan.inputs(part, size) for size in plan.checked):
            expected = _sliced(plan.net, part, x)
            deviation = max(deviation, *map(relative_deviation, _tuple(run(x)), _tuple(expected)))
        if not deviation <= TOLERANCE:
            limit = f"{deviation:.2g} of its largest output, more than {TOLERANCE:g}"
            raise RuntimeError(f"{path.name} differs from the sliced network by {limit}")
        done.append(Exported(part.name, name, path, deviation, plan.checked))
    return done


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _save(module: nn.Module, program: Any, part: Part, format: str, path: Path) -> None:
    if format == "torch":
        layout = torch.contiguous_format  # the only one that safetensors knows
        state = {k: v.clone(memory_format=layout) for k, v in module.state_dict().items()}
        safetensors.torch.save_file(state, path)
    else:
        write_graph(program, path, _GRAPHS[format], [part.ports[0]], part.ports[1])


def _entry(plan: _Plan, part: Part, done: Sequence[Exported]) -> dict[str, Any]:
    """A part's lines in the manifest."""
    inputs, outputs = part.ports
    entry: dict[str, Any] = {"name": part.name, **asdict(part)}
    entry |= {"input": inputs, "outputs": list(outputs)}
    if part.kind in ("route", "rest"):
        route = part.route
        assert route is not None
        madds, params = plan.net.madds(route, plan.size), plan.net.active_params(route)
        entry |= {"widths": list(plan.net.route_widths(route)), "madds": madds, "params": params}
    entry["files"] = {item.format: item.path.name for item in done}
    return entry | {"deviation": {item.format: item.deviation for item in done}}


def _manifest(plan: _Plan, preprocessing: Mapping[str, object] | None) -> dict[str, Any]:
    net, space = plan.net, plan.net.routing_space
    return {
        "format_version": 1,
        **plan.recipe,
        "num_gates": net.num_gates,
        "gate": net.gate_state() | {"gate_trained": net.gate_trained},
        "decision": "route = routing_space[argmax_k(score_k - tau * madds_k / madds_last)], "
        "score = sigmoid(gate_logits) for gate_score 'probability', else gate_logits; "
        "every gate takes these same prices",
        "space_madds": dict(zip(map(str, space), net.space_madds(plan.size), strict=True)),
        "image": {
            "shape": [plan.batch or "batch", net.in_channels, plan.size, plan.size],
            "dtype": "float32",
            "preprocessing": None if preprocessing is None else dict(preprocessing),
        },
        "checked_batches": list(plan.checked),
        "tolerance": TOLERANCE,
    }


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an export.

    Raises:
        UserError: there is none, or it is not one of ours.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"no finished export, no readable {MANIFEST}", where=str(folder)) from error
    if isinstance(manifest, dict) and "parts" in manifest:
        return manifest
    raise UserError("not the manifest of an export", where=str(path))


def load_exported(folder: str | Path, part: RouteLike = "front", format: str = "torch") -> Run:
    """Opens one part of an export for use from Python.

    Args:
        folder: that of `export_routes`.
        part: a route index, "largest", or a part's name, such as "front" or "rest_2".
        format: which of its files; "torch" gives an ordinary module.

    Returns:
        A callable: input -> output, or the front's (features, gate logits).

    Raises:
        UserError: no such part or format.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    name = Part("route", part).name if not isinstance(part, str) or part == LARGEST else part
    entries = {entry["name"]: entry for entry in manifest["parts"]}
    if name not in entries or format not in entries[name]["files"]:
        raise UserError(
            f"the export has no {format} file of {name}",
            where=str(folder),
            fix=f"choose from {', '.join(entries)}",
        )
    entry = entries[name]
    keys = {key: entry.get(key) for key in ("kind", "route", "gate", "before")}
    if isinstance(keys["route"], list):  # JSON has no tuples
        keys["route"] = tuple(keys["route"])
    described = Part(**keys, last=bool(entry.get("last")))
    return _open(folder / entry["files"][format], format, manifest, described)


def _open(path: Path, format: str, recipe: Mapping[str, Any], part: Part) -> Run:
    """Opens a file; `recipe` says how to rebuild the module whose weights a "torch" file holds."""
    if format in _GRAPHS:
        return open_graph(path, _GRAPHS[format])
    with torch.device("meta"):
        net = create_model(recipe["arch"], **recipe["config"])
        module = _plain(net, part, recipe["fold_bn"])
    module = module.to_empty(device="cpu")
    module.load_state_dict(load_state(path))
    return module.to(memory_format=_LAYOUTS[recipe["channels_last"]])  # pyright: ignore[reportCallIssue]
