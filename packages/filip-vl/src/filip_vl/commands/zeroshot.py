"""zeroshot: images by class names alone."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from filip_vl.commands.common import (
    encode_images,
    open_model,
    refused,
    tell_truncated,
    tell_unknown,
)
from filip_vl.data import read_images, read_labelled
from filip_vl.data.folder import class_name
from filip_vl.data.table import IMAGE_COLUMN, read_rows
from filip_vl.data.writers import text_file
from filip_vl.model import FilipModel
from filip_vl.report import confusion_matrix, save_all
from filip_vl.tokenizers.bpe import Layout
from filip_vl.zeroshot import ZeroShotClassifier, class_sets, prompt_table, read_classes
from filip_vl.zeroshot.classifier import Ensemble
from filip_vl.zeroshot.prompts import Average
from tenfold.checkpoint import atomic_file
from tenfold.console import at_least, columns
from tenfold.errors import UserError
from tenfold.images import IMAGE_SUFFIXES

_LISTED = 20  # classes of which every accuracy is printed


@dataclass(frozen=True)
class Labelled:
    """Images to be classified.

    Attributes:
        sources: what `read_source` opens.
        names: what they are called in the table.
        labels: number of the class of each, -1 where it is not known.
    """

    sources: Sequence[object]
    names: Sequence[str]
    labels: Sequence[int]


class Measured(NamedTuple):
    """How often the right class was found.

    Attributes:
        counts: row t, column p: images of class t that were taken for p.
        top: images whose class was among the best.
    """

    counts: Int[ndarray, "classes classes"]
    top: int

    def summary(
        self, names: Sequence[str], topk: int, average: Average | None = None
    ) -> dict[str, object]:
        """Accuracies in 0..1; those of classes without an image are left out.

        Args:
            names: of the classes.
            topk: how many were taken as the best.
            average: how the protocol of a data set averages, where it is one.
        """
        totals, right = self.counts.sum(1), self.counts.diagonal()
        per_class = {
            name: float(hit / total)
            for name, hit, total in zip(names, right, totals, strict=True)
            if total
        }
        images = int(totals.sum())
        protocol = {"macro": "mean_per_class", "micro": "accuracy", None: None}[average]
        return {
            "images": images,
            "protocol": protocol,
            "accuracy": float(right.sum() / images),
            f"top{topk}": self.top / images,
            "mean_per_class": float(np.mean(list(per_class.values()))),
            "per_class": per_class,
        }


def zeroshot(
    *,
    ckpt: Path,
    images: Path,
    classes: str | None = None,
    dataset: str | None = None,
    templates: str = "imagenet",
    ensemble: Ensemble = "similarity",
    topk: int = 5,
    out: Path = Path("preds.csv"),
    label_column: str = "label",
    image_column: str = IMAGE_COLUMN,
    tokenizer: str | None = None,
    tokenizer_layout: Layout = "clip",
    batch_size: int = 64,
    workers: int = 0,
    max_pixels: int | None = None,
    device: str = "auto",
) -> None:
    """Classify images by the names of classes, with the paper's prompts.

    Written are the best classes of every image; where labels are known (folders that are called
    like classes, a column of a table, a named data set), also accuracies and a confusion matrix.
    The figure of a named data set is the mean over its classes where CLIP's protocol says so.

    Args:
        ckpt: a checkpoint or the folder of a run, a model folder, or a published CLIP.
        images: a folder, an image, or a table with the paths of images.
        classes: names with commas between them, a text file with one a line, a folder of folders,
            or a data set such as cifar10; those of --dataset if left out.
        dataset: layout of a released set under --images, such as cifar10 or oxford_pets, which
            tells the labels.
        templates: a data set whose prompts the paper has, such as imagenet, or a text file with one
            a line, {} for the name.
        ensemble: similarity takes the mean over all templates, none the first template alone.
        topk: classes that are written for every image.
        out: table to write; metrics and picture are put beside it.
        label_column: of a table: names or numbers of classes.
        image_column: of a table: paths of images.
        tokenizer: CLIP's merges file or a folder with them, for a model that has none.
        tokenizer_layout: declip for the ids of DeCLIP's checkpoints.
        batch_size: images that are encoded together.
        workers: processes that read images.
        max_pixels: larger images are not read.
        device: auto, cpu, cuda, cuda:N or mps.
    """
    at_least(1, topk=topk)
    names = _class_names(classes) if classes is not None else None
    found, names = read_to_classify(images, names, dataset, label_column, image_column)
    model = open_model(ckpt, tokenizer, tokenizer_layout, device)
    with refused("--templates"):
        classifier = ZeroShotClassifier(model, names, templates, ensemble=ensemble)
    best, scores, errors = _classify(
        model, classifier, found, topk, batch_size=batch_size, workers=workers, pixels=max_pixels
    )
    _write_table(out, found, names, best, scores, errors)
    read = len(found.sources) - len(errors)
    if not read:
        raise UserError("no image can be read", where=str(images), fix=next(iter(errors.values())))
    print(f"{read} images, {len(names)} classes, {len(classifier.templates)} prompts each")
    tell_truncated(model, "prompts")
    tell_unknown(model, names)
    if errors:
        print(f"{len(errors)} images cannot be read: see the column error")
    print(f"wrote {out}")
    measured = measure(best, found.labels, len(names))
    if measured is not None:
        average = None if dataset is None else prompt_table(dataset).average
        _report(out, measured.summary(names, best.shape[1], average), measured, names)


def read_to_classify(
    images: Path,
    classes: Sequence[str] | None,
    dataset: str | None,
    label_column: str = "label",
    image_column: str = IMAGE_COLUMN,
) -> tuple[Labelled, list[str]]:
    """Images with what is known about their classes, and the names of these.

    Args:
        images: see `zeroshot`.
        classes: names; None for those of the data set.
        dataset: see `zeroshot`.
        label_column: see `zeroshot`.
        image_column: see `zeroshot`.

    Raises:
        UserError: nothing there, classes that are not named or not as many as the data set has, or
            a label that is no class.
    """
    if dataset is not None:
        split = read_labelled(images, dataset)
        names = list(classes or split.names)
        if len(names) != len(split.names):
            what = f"{len(names)} class names for the {len(split.names)} classes of {dataset}"
            raise UserError(what, where="--classes", fix="leave them out, or name all in order")
        keys = [
            str(s) if isinstance(s, str | Path) else str(n) for n, s in enumerate(split.sources)
        ]
        return Labelled(split.sources, keys, split.labels or [-1] * len(keys)), names
    if classes is None:
        raise UserError("class names are needed", fix="give --classes NAMES or FILE, or --dataset")
    if images.is_dir():
        return _of_folder(images, classes), list(classes)
    if not images.is_file():
        raise UserError("no such folder, image or table", where=str(images))
    if images.suffix.lower() in IMAGE_SUFFIXES:
        return Labelled([images], [images.name], [-1]), list(classes)
    return _of_table(images, classes, label_column, image_column), list(classes)


def measure(
    best: Int[Tensor, "images topk"], labels: Sequence[int], classes: int
) -> Measured | None:
    """Count right and wrong; None if no label is known.

    Args:
        best: classes of every image, best first; -1 where it could not be read.
        labels: the class of each, -1 where it is not known.
        classes: how many there are.
    """
    counts, top = np.zeros((classes, classes), dtype=np.int64), 0
    for row, label in zip(best.tolist(), labels, strict=True):
        if label >= 0 and row[0] >= 0:
            counts[label, row[0]] += 1
            top += label in row
    return Measured(counts, top) if counts.any() else None


def _class_names(given: str) -> list[str]:
    """What --classes says."""
    # a list of names may be longer than a path can be, of which Path.exists would complain
    known = given.lower() in class_sets() or os.path.exists(given)
    with refused("--classes"):
        if known or "," not in given:
            try:
                return read_classes(given)
            except UserError as error:
                fix = f"{error.fix}; a single name needs a comma behind it: {given},"
                raise UserError(error.what, where=error.where, fix=fix) from error
        return read_classes([name.strip() for name in given.split(",") if name.strip()])


def _key(name: str) -> str:
    return class_name(name).lower()


def _of_folder(root: Path, classes: Sequence[str]) -> Labelled:
    """Images below a folder; the label of each is the first folder, where that is a class."""
    pairs = read_images(root)
    numbers = {_key(name): n for n, name in enumerate(classes)}
    folders = [Path(key).parts[0] if len(Path(key).parts) > 1 else "" for key in pairs.keys]
    labels = [numbers.get(_key(folder), -1) for folder in folders]
    strange = sorted({f for f, n in zip(folders, labels, strict=True) if n < 0 and f})
    if strange and max(labels) >= 0:
        shown = ", ".join(strange[:5]) + (", ..." if len(strange) > 5 else "")
        print(f"no label for the images in folders that are not called like a class: {shown}")
    return Labelled(list(pairs.images), list(pairs.keys), labels)


def _of_table(file: Path, classes: Sequence[str], label: str, image: str) -> Labelled:
    """Images of a table, with the classes that it names or numbers where it has such a column."""
    numbers = {_key(name): n for n, name in enumerate(classes)}
    paths, labels = [], []
    for row, line in read_rows(file, None, image):
        paths.append(row[image] or "")
        text = (row.get(label) or "").strip()
        number = numbers.get(_key(text), int(text) if text.isdecimal() else None) if text else -1
        if number is None or number >= len(classes):
            fix = f"name a class, or number it in 0..{len(classes) - 1}"
            raise UserError(f"the label {text!r} is no class", where=f"{file}:{line}", fix=fix)
        labels.append(number)
    if not paths:
        raise UserError("the table has no row", where=str(file))
    return Labelled([str(file.parent / path) for path in paths], paths, labels)


def _classify(
    model: FilipModel,
    classifier: ZeroShotClassifier,
    found: Labelled,
    topk: int,
    *,
    batch_size: int,
    workers: int,
    pixels: int | None,
) -> tuple[Int[Tensor, "images topk"], Float[Tensor, "images topk"], dict[int, str]]:
    """Best classes and their scores, -1 and 0 where an image could not be read, and why not."""
    topk = min(topk, len(classifier.classes))
    best = torch.full((len(found.sources), topk), -1)
    scores = torch.zeros(best.shape)
    errors: dict[int, str] = {}
    options = {"batch_size": batch_size, "workers": workers, "max_pixels": pixels}
    for part in encode_images(model, found.sources, **options):
        errors |= part.errors
        if part.tokens is not None:
            top = classifier.top(part.tokens, topk)
            best[part.rows], scores[part.rows] = top.classes.cpu(), top.scores.float().cpu()
    return best, scores, errors


def _write_table(
    out: Path,
    found: Labelled,
    names: Sequence[str],
    best: Int[Tensor, "images topk"],
    scores: Float[Tensor, "images topk"],
    errors: Mapping[int, str],
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    places = range(1, best.shape[1] + 1)
    with text_file(out) as file:
        table = csv.writer(file, lineterminator="\n")
        heads = [f"{what}_{n}" for n in places for what in ("class", "score")]
        table.writerow(["image", "label", *heads, "error"])
        rows = zip(found.names, found.labels, best.tolist(), scores.tolist(), strict=True)
        for row, (name, label, chosen, values) in enumerate(rows):
            cells = ["", ""] * len(chosen)
            if row not in errors:
                pairs = zip(chosen, values, strict=True)
                cells = [cell for n, value in pairs for cell in (names[n], f"{value:.6f}")]
            known = names[label] if label >= 0 else ""
            table.writerow([name, known, *cells, errors.get(row, "")])


def _report(
    out: Path, summary: Mapping[str, object], measured: Measured, names: Sequence[str]
) -> None:
    """Print the accuracies, and write them and the picture beside the table."""
    per_class = summary["per_class"]
    assert isinstance(per_class, dict)
    for name, value in summary.items():
        if isinstance(value, float):
            told = "  the figure of CLIP's protocol" if name == summary["protocol"] else ""
            print(f"{name.replace('_', ' '):<16} {100 * value:6.2f} %{told}")
    worst = sorted(per_class.items(), key=lambda item: item[1])
    shown = per_class.items() if len(worst) <= _LISTED else worst[:_LISTED]
    heads = ["class" if len(worst) <= _LISTED else f"the {_LISTED} worst classes", "accuracy"]
    print(columns([heads, *([name, f"{100 * value:.2f} %"] for name, value in shown)]))
    metrics = out.with_name(f"{out.stem}-metrics.json")
    with atomic_file(metrics) as file:
        file.write(json.dumps(summary, indent=1).encode())
    figure = confusion_matrix(measured.counts, names, "Zero-shot classification")
    for path in (metrics, *save_all({f"{out.stem}-confusion": figure}, out.parent)):
        print(f"wrote {path}")
