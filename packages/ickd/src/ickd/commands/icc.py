"""icc: how the channels of networks relate on a folder of images, as pictures and figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

from ickd.commands.common import open_model, open_saved
from ickd.diagnostics import (
    ChannelMapFit,
    Diversity,
    DiversityMeter,
    cell_distances,
    cell_icc,
)
from ickd.networks import Network, load_pretrained
from ickd.report import CellCorrelations, icc_cells, icc_triptych, save_all
from ickd.report.cells import MOST_CELLS
from ickd.report.correlation import DISTANCE, HOMOLOGY
from ickd.taps import find_module
from ickd.taps import tap as tap_modules
from tenfold.console import at_least, columns
from tenfold.device import pick_device
from tenfold.errors import UserError
from tenfold.images import image_files, read_image
from tenfold.progress import track
from tenfold.verbs import numbered

ROLES = ("Teacher", "Distilled student", "Plain student")
FIGURES = "icc.json"
PIXELS_PER_CHANNEL = 10
"""Pixels for each channel of a student below which a map from its channels is hardly a fit."""


def icc(
    *,
    model: str,
    images: Path,
    other: str | None = None,
    plain: str | None = None,
    out: Path | None = None,
    tap: str | None = None,
    student_tap: str | None = None,
    grid: list[int] | None = None,
    limit: int = 256,
    batch: int = 32,
    image_size: int | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
    names: list[str] | None = None,
    on_error: str = "fail",
    device: str = "auto",
) -> None:
    """Draw the channel correlations of a network, or of a teacher and its students.

    The students' maps are brought to the teacher's channels by a linear (1x1) map that least
    squares fits on every second image; all figures are of the other images. Channels are drawn in
    the order of a clustering of the teacher's. Where there are fewer than 10 pixels to fit on for
    each channel of a student, its distance is marked as unreliable. Writes icc.png, icc.json, and
    with a grid icc_cells.png.

    Args:
        model: a network such as timm:resnet18, a checkpoint, the folder of a run, or a model
            folder; the teacher, where there are others.
        images: folder of image files.
        other: the student that learned from it.
        plain: a student that did not.
        out: folder for icc.png, which says what its figures mean, and icc.json; icc if left out,
            or icc-2, icc-3 and so on, where those before hold some.
        tap: module whose output is looked at; what ICKD compares if left out, see ickd taps.
        student_tap: likewise of the students; the teacher's own tap is not taken for theirs.
        grid: rows and columns of cells, such as [4,4], for the picture of ICKD-S.
        limit: at most so many images, spread evenly over the folder.
        batch: images that are run at once.
        image_size: side of the square that is cut out of every image; if left out, what the
            networks were trained on, else what they expect, else images are taken as they are.
        num_classes: of networks that are named.
        pretrained: fill networks that are named with the weights that timm or torchvision publish.
        names: titles in the pictures, one for each network.
        on_error: what to do with an unreadable image: fail, or skip it and count.
        device: auto, cpu, cuda or mps.
    """
    at_least(1, limit=limit, batch=batch, image_size=image_size)
    if on_error not in ("fail", "skip"):
        raise UserError(f"--on-error must be fail or skip, got {on_error!r}")
    cells = _check_grid(grid, other)
    if plain is not None and other is None:
        raise UserError("--plain is the third network", fix="give the second one with --other")
    given = [(model, tap), (other, student_tap), (plain, student_tap)]
    given = [(name, at) for name, at in given if name is not None]
    if names is not None and len(names) != len(given):
        raise UserError(f"--names are {len(names)} for {len(given)} networks")
    place = pick_device(device)
    probes = [_open(name, at, num_classes, pretrained, place) for name, at in given]
    alone = [probes[0].network.name]
    titles = names or (list(ROLES[: len(given)]) if len(given) > 1 else alone)
    size, whose = (image_size, "as given") if image_size else _common_size(probes)
    files = _choose(images, limit)
    reader = _Reader(size, batch, skip=on_error == "skip")
    measured = _measure(probes, files, reader, cells)
    for path in reader.skipped:
        print(f"skipped {path}")
    looks = {"names": titles, "doubtful": measured.doubtful}
    figures = {"icc": icc_triptych(*measured.found, **looks)}
    if measured.grids:
        figures["icc_cells"] = icc_cells(*measured.grids, image=reader.shown, **looks)
    out = out or next(f for f in numbered(Path("icc")) if not (f / FIGURES).exists())
    done = _write(out, figures, _facts(probes, measured, titles, reader))
    print(_told(measured, reader, whose))
    print(_table(probes, measured))
    print("\n".join([HOMOLOGY, DISTANCE] if other else [HOMOLOGY]))
    print(done)


def _write(out: Path, figures: Mapping[str, Figure], facts: Mapping[str, Any]) -> str:
    """Pictures and figures into the folder; returned is a line that names them."""
    done = "replaced" if (out / FIGURES).exists() else "wrote"
    written = save_all(figures, out)
    (out / FIGURES).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return f"{done} " + ", ".join(map(str, [*written, out / FIGURES]))


class _Probe(NamedTuple):
    """A network and the place at which it is looked at.

    Attributes:
        name: as it was given.
        network: in eval mode, where it runs.
        tap: name of a module, None for what ICKD compares.
        trained: side of the images that it was trained on, None where its file does not tell.
    """

    name: str
    network: Network
    tap: str | None
    trained: int | None

    @torch.no_grad()
    def maps(
        self, pixels: Float[Tensor, "batch 3 height width"], files: Sequence[Path]
    ) -> Float[Tensor, "batch channels _ _"]:
        """The map at the tap.

        Raises:
            UserError: the network does not take such images, or says nothing finite about one.
        """
        try:
            found = self._run(pixels.to(next(self.network.net.parameters()).device))
        except (RuntimeError, ValueError) as error:
            shape = "x".join(map(str, pixels.shape[1:]))
            line = str(error).partition("\n")[0]
            what = f"{self.name} does not take images of {shape}: {line}"
            raise UserError(what, fix="give another --image-size") from error
        bad = ~torch.isfinite(found).flatten(1).all(1)
        if bad.any():
            where = str(files[int(bad.nonzero()[0])])
            raise UserError(f"{self.name} gives NaN or infinite features", where=where)
        return found

    def _run(self, pixels: Tensor) -> Tensor:
        if self.tap is None:
            return self.network.taps(pixels).signal("last")
        with tap_modules(self.network.net, [self.tap]) as features:
            self.network(pixels)
        if self.tap not in features:
            raise UserError(f"{self.name} does not run {self.tap!r}", fix="see ickd taps")
        return features[self.tap]


class _Reader:
    """Reads images from files, batch by batch, all of one size.

    Attributes:
        skipped: files that could not be read, if these are to be skipped.
        shape: channels, height and width of all images, once one was read.
        shown: the first image of the latest `batches`, (height, width, 3) in 0..1.
    """

    def __init__(self, size: int | None, batch: int, *, skip: bool) -> None:
        self.size, self.batch, self.skip = size, batch, skip
        self.skipped: list[Path] = []
        self.shown: np.ndarray | None = None
        self.shape: tuple[int, ...] | None = None

    def batches(self, files: Sequence[Path]) -> Iterator[tuple[Tensor, list[Path]]]:
        """Pixels in 0..1 (batch, 3, height, width), and their files.

        Raises:
            UserError: an unreadable file, or images of different size.
        """
        self.shown = None
        images: list[Tensor] = []
        paths: list[Path] = []
        for path in files:
            image = self._read(path)
            if image is None:
                continue
            if self.shown is None:
                self.shown = image.permute(1, 2, 0).numpy()
            images.append(image)
            paths.append(path)
            if len(images) == self.batch:
                yield torch.stack(images), paths
                images, paths = [], []
        if images:
            yield torch.stack(images), paths

    def _read(self, path: Path) -> Tensor | None:
        try:
            picture = read_image(path)
        except UserError as error:
            if self.skip:
                self.skipped.append(path)
                return None
            fix = "mend it, or add --on-error skip"
            raise UserError(error.what, where=error.where, fix=fix) from error
        if self.size is not None:  # the middle, its shorter side brought to the size
            picture = ImageOps.fit(picture, (self.size, self.size), Image.Resampling.BILINEAR)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        if self.shape is not None and tuple(image.shape) != self.shape:
            first = "x".join(map(str, self.shape[1:]))
            what = f"{picture.height}x{picture.width} pixels, where other images have {first}"
            raise UserError(what, where=str(path), fix="give --image-size, such as 224")
        self.shape = tuple(image.shape)
        return image


class _Measured(NamedTuple):
    """What was measured of every network.

    Attributes:
        found: its figures.
        grids: its correlations in cells; empty without a grid.
        fitted: images that the students' maps were fitted on.
        doubtful: positions of the students whose distance says little.
    """

    found: list[Diversity]
    grids: list[CellCorrelations]
    fitted: int
    doubtful: list[int]


def _open(
    name: str, tap: str | None, num_classes: int | None, pretrained: bool, place: torch.device
) -> _Probe:
    trained = None
    if Path(name).exists():
        saved = open_saved(name)
        network, trained = saved.network, saved.image_size
    else:
        options = {} if num_classes is None else {"num_classes": num_classes}
        network = open_model(name, **options)
        if pretrained:
            load_pretrained(network)
        else:
            print(f"{name} has random weights; give a checkpoint, or --pretrained true")
    if tap is not None:
        find_module(network.net, tap)
    return _Probe(name, network.to(place), tap, trained)


def _common_size(probes: Sequence[_Probe]) -> tuple[int | None, str]:
    """The side of the images, and in words whose it is; None for their own."""
    trained = [(probe.trained, f"as {probe.name} was trained") for probe in probes]
    expected = [(probe.network.expects.size, f"as {probe.name} expects") for probe in probes]
    for choices in (trained, expected):
        known = [(size, whose) for size, whose in choices if size]
        if known:
            return max(known, key=lambda choice: choice[0])
    return None, "their own size"


def _check_grid(grid: list[int] | None, other: str | None) -> tuple[int, int] | None:
    if grid is None:
        return None
    if len(grid) != 2 or not all(1 <= side <= MOST_CELLS for side in grid):
        what = f"--grid must be rows and columns of at most {MOST_CELLS} cells, got {grid}"
        raise UserError(what, fix="write it as [4,4]")
    if other is None:
        raise UserError("--grid compares two networks", fix="give the second one with --other")
    return grid[0], grid[1]


def _choose(folder: Path, limit: int) -> list[Path]:
    """Files spread evenly over a folder, so that folders of classes all have their share."""
    files = image_files(folder)
    if not files:
        raise UserError("there is no image in the folder", where=str(folder))
    picks = np.linspace(0, len(files) - 1, min(limit, len(files))).round().astype(int)
    return [files[k] for k in picks]


def _measure(
    probes: Sequence[_Probe],
    files: Sequence[Path],
    reader: _Reader,
    grid: tuple[int, int] | None,
) -> _Measured:
    """The figures of every network, and where there is a grid the correlations in its cells."""
    several = len(probes) > 1 and len(files) > 1
    fitted, measured = (files[::2], files[1::2]) if several else (files, files)
    if len(probes) > 1 and not several:
        print("a single image: the 1x1 map is fitted on it too, so that distances are too small")
    fits = _fit(probes, fitted, reader)
    doubtful = [k for k, fit in enumerate(fits, start=1) if not several or _is_short(fit)]
    lifts = [None, *(fit.solve() for fit in fits)]
    meters = [DiversityMeter(lift) for lift in lifts]
    first: list[Tensor] = []
    totals = [torch.zeros(()) for _ in probes]
    for pixels, paths in track(reader.batches(measured), label="measuring"):
        maps = [probe.maps(pixels, paths) for probe in probes]
        meters[0].update(maps[0])
        for k in range(1, len(probes)):
            meters[k].update(maps[k], maps[0])
            if grid is not None:
                apart = cell_distances(maps[k], maps[0], grid, lifts[k])
                totals[k] = totals[k] + len(pixels) * apart
        first = first or [map_[:1] for map_ in maps]
    if not first:
        raise UserError("there is no readable image", where=str(files[0].parent))
    found = [meter.result() for meter in meters]
    images = len(fitted) - sum(path in fitted for path in reader.skipped) if fits else 0
    measured = _Measured(found, [], images, doubtful)
    if grid is None:
        return measured
    correlations = [
        cell_icc(map_, grid, "cosine", lift) for map_, lift in zip(first, lifts, strict=True)
    ]
    count = found[0].images
    distances = [None, *(total / count for total in totals[1:])]
    pairs = zip(correlations, distances, strict=True)
    return measured._replace(grids=[CellCorrelations(*pair, count) for pair in pairs])


def _fit(probes: Sequence[_Probe], files: Sequence[Path], reader: _Reader) -> list[ChannelMapFit]:
    """What maps each student's channels to the teacher's, who is the first."""
    fits = [ChannelMapFit() for _ in probes[1:]]
    if not fits:
        return []
    for pixels, paths in track(reader.batches(files), label="fitting"):
        teacher, *students = (probe.maps(pixels, paths) for probe in probes)
        for fit, student in zip(fits, students, strict=True):
            fit.update(student, teacher)
    if not all(fit.moments.pixels for fit in fits):
        raise UserError("there is no readable image to fit the 1x1 map on")
    for probe, fit in zip(probes[1:], fits, strict=True):
        if _is_short(fit):
            print(
                f"{probe.name}: {fit.moments.pixels} pixels for a map from {fit.channels} channels "
                "are few: its distance is unreliable; more images give a truer one"
            )
    return fits


def _is_short(fit: ChannelMapFit) -> bool:
    return fit.moments.pixels < PIXELS_PER_CHANNEL * fit.channels


def _told(measured: _Measured, reader: _Reader, whose: str) -> str:
    """Which images the figures are of."""
    size = "x".join(map(str, (reader.shape or ())[1:]))
    line = f"{measured.found[0].images} images at {size} pixels ({whose})"
    if not measured.fitted:
        return line
    return f"{line}; the students' maps to the teacher's channels are fitted on {measured.fitted}"


def _table(probes: Sequence[_Probe], measured: _Measured) -> str:
    head = ["network", "tap", "channels", "effective rank", "homologous pairs", "dead channels"]
    rows = [[*head, "ICC distance"]]
    for k, (probe, figures) in enumerate(zip(probes, measured.found, strict=True)):
        distance = "–" if figures.icc_distance is None else f"{figures.icc_distance:.3f}"
        distance += " (unreliable)" if k in measured.doubtful else ""
        rows.append(
            [
                probe.name,
                probe.tap or "ICKD's",
                str(figures.channels),
                f"{figures.effective_rank:.1f}",
                f"{100 * figures.homology_ratio:.1f} %",
                f"{100 * figures.dead:.1f} %",
                distance,
            ]
        )
    return columns(rows, left=2)


def _facts(
    probes: Sequence[_Probe], measured: _Measured, titles: Sequence[str], reader: _Reader
) -> dict[str, Any]:
    """What the table says and more, as plain values."""
    networks = []
    for k, (probe, figures, title) in enumerate(zip(probes, measured.found, titles, strict=True)):
        cells = measured.grids[k].distances if measured.grids else None
        networks.append(
            {
                "title": title,
                "model": probe.name,
                "network": probe.network.name,
                "tap": probe.tap,
                "channels": figures.channels,
                "effective_rank": figures.effective_rank,
                "homology_ratio": figures.homology_ratio,
                "dead_channels": figures.dead,
                "icc_distance": figures.icc_distance,
                "reliable": k not in measured.doubtful if k else None,
                "cell_distances": None if cells is None else cells.tolist(),
                "singular_values": figures.spectrum.tolist(),
            }
        )
    images = {"images": measured.found[0].images, "fitted_images": measured.fitted}
    return {**images, "image_size": list(reader.shape or ())[1:], "networks": networks}
