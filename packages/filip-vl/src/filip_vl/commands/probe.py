"""probe: what a linear classifier makes of frozen image tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from filip_vl.commands.common import MAX_BAD_FRACTION, check_errors, encode_images, open_model
from filip_vl.data import read_class_folders
from filip_vl.model import FilipModel
from filip_vl.optim import warmup_cosine
from tenfold.checkpoint import atomic_file
from tenfold.console import at_least
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
    solver: Literal["lbfgs", "sgd"] = "lbfgs",
    l2: float = 1e-3,
    iterations: int = 1000,
    epochs: int = 90,
    lr: float = 0.1,
    warmup: int = 10,
    fit_batch: int = 4096,
    seed: int = 0,
    out: Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    max_pixels: int | None = None,
    device: str = "auto",
) -> None:
    """Fit a linear classifier on the mean of the frozen image tokens, and test it.

    The paper takes L-BFGS (--l2, --iterations), and for ImageNet SGD behind a batch norm (--epochs,
    --lr, --warmup, --fit-batch, --seed).

    Args:
        ckpt: a checkpoint or the folder of a run, a model folder, or a published CLIP.
        images: folder of train/<class>/*.jpg and test/<class>/*.jpg, or of the training classes
            with --test.
        test: folder of the test classes.
        solver: lbfgs for a logistic regression, or sgd as for ImageNet.
        l2: weight of half the squared norm of the weights, beside the mean cross entropy.
        iterations: of L-BFGS at most.
        epochs: of SGD.
        lr: the highest learning rate of SGD.
        warmup: epochs in which it grows; a cosine to 0 follows.
        fit_batch: images in a step of SGD.
        seed: of the order of SGD.
        out: JSON file of the accuracies.
        batch_size: images that are encoded together.
        workers: processes that read images.
        max_bad_fraction: share of the images that may be unreadable; these are left out.
        max_pixels: larger images are not read.
        device: auto, cpu, cuda, cuda:N or mps.
    """
    at_least(1, iterations=iterations, epochs=epochs, fit_batch=fit_batch)
    at_least(0, lr=lr, warmup=warmup)
    if warmup >= epochs and solver == "sgd":
        raise UserError(f"--warmup {warmup} leaves none of --epochs {epochs}")
    if not 0 <= l2 < float("inf"):
        raise UserError(f"--l2 must be 0 or more, got {l2}")
    train, held_out = _splits(images, test)
    model = open_model(ckpt, device=device, texts=False)
    options = {"batch_size": batch_size, "workers": workers, "max_pixels": max_pixels}
    known = frozen_features(model, train, most=max_bad_fraction, **options)
    asked = frozen_features(model, held_out, most=max_bad_fraction, **options)
    classes = len(train.names)
    if solver == "lbfgs":
        classifier = fit_logistic(known, classes, l2=l2, iterations=iterations)
    else:
        sizes = {"epochs": epochs, "warmup": warmup, "batch_size": fit_batch, "seed": seed}
        classifier = fit_sgd(known, classes, lr=lr, **sizes)
    scores = {
        "train": accuracy(classifier, known),
        "test": accuracy(classifier, asked),
        "mean_per_class": mean_per_class(classifier, asked),
    }
    counts = f"{len(known.labels)} training and {len(asked.labels)} test images"
    print(f"{counts} of {classes} classes, {known.values.shape[1]} features")
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
        UserError: too many cannot be read, or all of them.
    """
    values, rows, errors = [], [], {}
    options = {"batch_size": batch_size, "workers": workers, "max_pixels": max_pixels}
    for part in encode_images(model, split.sources, **options):
        errors |= part.errors
        rows += part.rows
        if part.tokens is not None:
            values.append(part.tokens.tokens.cpu().double().mean(1))
    check_errors(errors, len(split.sources), most)
    if not values:
        raise UserError("no image can be read", where=next(iter(errors.values())))
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


def fit_sgd(
    known: Features,
    classes: int,
    *,
    epochs: int = 90,
    lr: float = 0.1,
    warmup: int = 10,
    batch_size: int = 4096,
    seed: int = 0,
) -> LinearClassifier:
    """The paper's classifier for ImageNet: SGD with momentum 0.9 and no decay behind a batch norm.

    Weights start from zero, the norm has none. Its statistics are means over all batches.

    Args:
        known: features with their classes.
        classes: how many there are.
        epochs: of the training.
        lr: the highest learning rate.
        warmup: epochs in which it grows; a cosine to 0 follows.
        batch_size: images in a step at most; the batches of an epoch are of the same size.
        seed: of the order.
    """
    (count, dim), dtype = known.values.shape, known.values.dtype
    norm = nn.BatchNorm1d(dim, affine=False, momentum=None, dtype=dtype)
    weight = known.values.new_zeros(classes, dim).requires_grad_()
    bias = known.values.new_zeros(classes).requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], lr, momentum=0.9)
    batches = -(-count // batch_size)
    schedule = warmup_cosine(optimizer, steps=epochs * batches, warmup=warmup * batches)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        # a batch of one has no variance: parts of the same size have none
        for rows in torch.randperm(count, generator=generator).tensor_split(batches):
            logits = F.linear(norm(known.values[rows]), weight, bias)
            optimizer.zero_grad()
            F.cross_entropy(logits, known.labels[rows]).backward()
            optimizer.step()
            schedule.step()
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    return LinearClassifier(mean, (variance + norm.eps).sqrt(), weight.detach(), bias.detach())


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
