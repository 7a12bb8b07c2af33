"""probe: what a linear classifier makes of frozen image tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from filip_vl.commands.common import (
    MAX_BAD_FRACTION,
    at_least,
    check_errors,
    encode_images,
    open_model,
)
from filip_vl.data import read_class_folders
from filip_vl.model import FilipModel
from tenfold.checkpoint import atomic_file
from tenfold.errors import UserError
from tenfold.images import Split

_TEST_FOLDERS = ("test", "val", "validation")


class LinearClassifier(NamedTuple):
    """Logits of the classes as a linear function of features.

    Attributes:
        mean: of the training features.
        scale: their standard deviation, 1 where they do not vary.
        weight: of the standardised features.
        bias: of the classes.
    """

    mean: Float[Tensor, " dim"]
    scale: Float[Tensor, " dim"]
    weight: Float[Tensor, "classes dim"]
    bias: Float[Tensor, " classes"]

    def __call__(self, features: Float[Tensor, "images dim"]) -> Float[Tensor, "images classes"]:
        """Logits."""
        return F.linear((features.to(self.mean) - self.mean) / self.scale, self.weight, self.bias)


class Features(NamedTuple):
    """Mean tokens of the images that can be read, and their classes."""

    values: Float[Tensor, "images dim"]
    labels: Int64[Tensor, " images"]


def probe(
    *,
    ckpt: Path,
    images: Path,
    test: Path | None = None,
    l2: float = 1e-3,
    iterations: int = 1000,
    out: Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    max_pixels: int | None = None,
    device: str = "auto",
) -> None:
    """Fit a logistic regression (L-BFGS) on the mean of the frozen image tokens, and test it.

    Args:
        ckpt: a checkpoint or the folder of a run, a model folder, or a published CLIP.
        images: folder of train/<class>/*.jpg and test/<class>/*.jpg, or of the training classes
            with --test.
        test: folder of the test classes.
        l2: weight of half the squared norm of the weights, beside the mean cross entropy.
        iterations: of L-BFGS at most.
        out: JSON file of the accuracies.
        batch_size: images that are encoded together.
        workers: processes that read images.
        max_bad_fraction: share of the images that may be unreadable; these are left out.
        max_pixels: larger images are not read.
        device: auto, cpu, cuda, cuda:N or mps.
    """
    at_least(1, iterations=iterations)
    if not 0 <= l2 < float("inf"):
        raise UserError(f"--l2 must be 0 or more, got {l2}")
    train, held_out = _splits(images, test)
    model = open_model(ckpt, device=device, texts=False)
    options = {"batch_size": batch_size, "workers": workers, "max_pixels": max_pixels}
    known = frozen_features(model, train, most=max_bad_fraction, **options)
    asked = frozen_features(model, held_out, most=max_bad_fraction, **options)
    classifier = fit_logistic(known, len(train.names), l2=l2, iterations=iterations)
    scores = {
        "train": accuracy(classifier, known),
        "test": accuracy(classifier, asked),
        "mean_per_class": mean_per_class(classifier, asked),
    }
    counts = f"{len(known.labels)} training and {len(asked.labels)} test images"
    print(f"{counts} of {len(train.names)} classes, {known.values.shape[1]} features")
    for name, value in scores.items():
        print(f"{name.replace('_', ' '):<15} {100 * value:6.2f} %")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as file:
            file.write(json.dumps({**scores, "classes": list(train.names)}, indent=1).encode())
        print(f"wrote {out}")


def frozen_features(
    model: FilipModel,
    split: Split,
    *,
    most: float = MAX_BAD_FRACTION,
    batch_size: int = 64,
    workers: int = 0,
    max_pixels: int | None = None,
) -> Features:
    """The mean of every image's tokens, in float64 on the CPU.

    Args:
        model: in eval mode.
        split: labelled images.
        most: share of them that may be unreadable.
        batch_size: images that are encoded together.
        workers: processes that read images.
        max_pixels: larger images count as unreadable.

    Raises:
        UserError: too many cannot be read.
    """
    values, rows, errors = [], [], {}
    options = {"batch_size": batch_size, "workers": workers, "max_pixels": max_pixels}
    for part in encode_images(model, split.sources, **options):
        errors |= part.errors
        rows += part.rows
        if part.tokens is not None:
            values.append(part.tokens.tokens.double().mean(1).cpu())
    check_errors(errors, len(split.sources), most)
    labels = torch.tensor(split.labels or ())
    return Features(torch.cat(values), labels[rows])


def fit_logistic(
    known: Features, classes: int, *, l2: float = 1e-3, iterations: int = 1000
) -> LinearClassifier:
    """The weights W and biases that minimise mean cross entropy + l2 / 2 |W|^2.

    Features are standardised before, so that the weights of all are held back alike.

    Args:
        known: features with their classes.
        classes: how many there are.
        l2: see above.
        iterations: of L-BFGS at most.
    """
    mean, scale = known.values.mean(0), known.values.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    x = (known.values - mean) / scale
    weight = x.new_zeros(classes, x.shape[1]).requires_grad_()
    bias = x.new_zeros(classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), known.labels)
        loss = loss + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return LinearClassifier(mean, scale, weight.detach(), bias.detach())


def accuracy(classifier: LinearClassifier, asked: Features) -> float:
    """Share of images whose class has the largest logit, 0..1."""
    return float((classifier(asked.values).argmax(1) == asked.labels).double().mean())


def mean_per_class(classifier: LinearClassifier, asked: Features) -> float:
    """Mean over the classes of their accuracies, 0..1."""
    right = classifier(asked.values).argmax(1) == asked.labels
    there = asked.labels.unique().tolist()
    return sum(float(right[asked.labels == c].double().mean()) for c in there) / len(there)


def _splits(images: Path, test: Path | None) -> tuple[Split, Split]:
    """Training and test images, whose classes are the same."""
    if test is None:
        if not images.is_dir():
            raise UserError("no such folder", where=str(images))
        test = next((images / n for n in _TEST_FOLDERS if (images / n).is_dir()), None)
        if test is None or not (images / "train").is_dir():
            fix = f"expected {images}/train/<class>/*.jpg and {images}/test/<class>/*.jpg"
            raise UserError("no folders train and test", where=str(images), fix=f"{fix}, or --test")
        images /= "train"
    train, held_out = read_class_folders(images), read_class_folders(test)
    if len(train.names) < 2:
        raise UserError("one class alone, so that there is nothing to tell", where=str(images))
    unknown = [name for name in held_out.names if name not in train.names]
    if unknown:
        shown = ", ".join(unknown[:5])
        raise UserError(f"test classes without training images: {shown}", where=str(test))
    labels = [train.names.index(held_out.names[n]) for n in held_out.labels or ()]
    return train, Split(held_out.sources, labels, train.names)
