"""Networks by name, each with its own normalisation and resolution, behind one interface.

A name is "kind:name": "zoo:resnet20" (CIFAR), "embedded:gratings-student", "deeplab:resnet18",
"timm:resnet18", "torchvision:resnet18", or "python:package.module:function" for one's own.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ickd import zoo
from ickd.convert import convert_checkpoint
from ickd.model.deeplab import create_deeplab
from ickd.model.embedded import EMBEDDED
from ickd.synthetic import BLOBS_MEAN, BLOBS_STD, GRATINGS_MEAN, GRATINGS_STD
from ickd.taps import suggest, tap
from tenfold.checkpoint import compare_keys
from tenfold.distillation import Taps
from tenfold.errors import UserError
from tenfold.training import LAST

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

KINDS = ("zoo", "embedded", "deeplab", "timm", "torchvision", "python")


class Input(NamedTuple):
    """What a network expects.

    Attributes:
        mean: of each colour of pixels in 0..1.
        std: likewise.
        size: side in pixels to which images are resized, None to take them as they are.
    """

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    size: int | None = None


class Network(nn.Module):
    """A network that takes pixels in 0..1 and tells its features.

    Normalisation and resolution belong to the network, not to the data: a teacher and a student
    that see the same images may want them differently.

    Args:
        net: any network that maps normalised images to logits.
        name: what it is called.
        expects: its normalisation and resolution.
        tap_names: modules to read, shallow to deep; if left out, what the network's own `taps`
            gives, or what `ickd.taps.suggest` finds.
        example_size: side of the images on which taps are looked for.
    """

    def __init__(
        self,
        net: nn.Module,
        name: str = "",
        expects: Input | None = None,
        tap_names: Sequence[str] = (),
        example_size: int = 64,
    ) -> None:
        super().__init__()
        self.net, self.name = net, name or type(net).__name__
        self.expects = expects or Input()
        if len(self.expects.mean) != len(self.expects.std) or min(self.expects.std) <= 0:
            raise UserError(f"mean and std of {self.name} must be as long, and std above 0")
        for key in ("mean", "std"):
            values = torch.tensor(getattr(self.expects, key)).view(-1, 1, 1)
            self.register_buffer(key, values, persistent=False)
        self.example_size = self.expects.size or example_size
        self._classifier = _classifier(net)
        self.tap_names = tuple(tap_names)
        self.stem = not tap_names
        if not (tap_names or hasattr(net, "taps")):
            self.tap_names = tuple(suggest(net, self.example(1))[0])

    def example(self, batch: int) -> Tensor:
        """Images of the right size, of zeros, where the weights are."""
        place = next(self.net.parameters(), self.get_buffer("mean"))
        side = self.example_size
        return place.new_zeros(batch, len(self.expects.mean), side, side)

    def prepare(
        self, pixels: Float[Tensor, "batch colours height width"]
    ) -> Float[Tensor, "batch colours height_in width_in"]:
        """Resize and normalise pixels in 0..1."""
        size = self.expects.size
        if size is not None and pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
        return (pixels - self.get_buffer("mean")) / self.get_buffer("std")

    def forward(self, pixels: Float[Tensor, "batch colours height width"]) -> Tensor:
        """Logits of pixels in 0..1."""
        return self.net(self.prepare(pixels))

    def taps(self, pixels: Float[Tensor, "batch colours height width"]) -> Taps:
        """Logits and features of pixels in 0..1.

        Raises:
            UserError: a tap is missing or gives no map.
        """
        x = self.prepare(pixels)
        if not self.tap_names:
            own: Any = self.net
            return own.taps(x)
        pooled: list[Tensor] = []
        with tap(self.net, self.tap_names) as features:
            watch = self._classifier and self._classifier.register_forward_pre_hook(
                lambda _, arguments: pooled.append(arguments[0])
            )
            try:
                logits = self.net(x)
            finally:
                if watch:
                    watch.remove()
        maps = tuple(features[name] for name in self.tap_names)
        vector = pooled[-1] if pooled and pooled[-1].ndim == 2 else maps[-1].mean((2, 3))
        return Taps(maps, vector, logits, stem=self.stem)

    def fingerprint(self) -> str:
        """A hash of name, input and weights: what cached features belong to."""
        digest = hashlib.sha256(repr((self.name, self.expects, self.tap_names)).encode())
        for key, value in self.net.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


def _classifier(net: nn.Module) -> nn.Module | None:
    """The layer whose input is the pooled vector: timm tells; else the last linear layer."""
    if hasattr(net, "get_classifier"):
        timm_net: Any = net
        found = timm_net.get_classifier()
        return found if isinstance(found, nn.Linear) else None
    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    return layers[-1] if layers else None


def open_network(
    name: str,
    *,
    num_classes: int | None = None,
    taps: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    **options: Any,
) -> Network:
    """Build a network by its name; its weights are random until `load_weights`.

    Args:
        name: "kind:name", see the top of this file.
        num_classes: of its classifier; its own default if left out.
        taps: modules to read, see `Network`.
        mean: of the pixels that it expects; its own if left out.
        std: likewise.
        image_size: side to which images are resized; those of timm keep their own, all others take
            images as they come.
        **options: further arguments of the network's constructor.

    Raises:
        UserError: an unknown kind, name or option.
    """
    kind, _, which = name.partition(":")
    if kind not in KINDS or not which:
        known = ", ".join(f"{k}:NAME" for k in KINDS)
        raise UserError(f"no network is called {name!r}", fix=f"write {known}")
    if num_classes is not None:
        if num_classes < 1:
            raise UserError(f"num_classes must be 1 or more, got {num_classes}", where=name)
        options["num_classes"] = num_classes
    try:
        net, expects = _BUILDERS[kind](which, options)
    except TypeError as error:  # an argument that the constructor does not have
        raise UserError(f"cannot build {name}: {error}", fix="look at its options") from error
    expects = Input(
        expects.mean if mean is None else tuple(mean),
        expects.std if std is None else tuple(std),
        expects.size if image_size is None else image_size,
    )
    example = {"zoo": 32, "embedded": 24, "deeplab": 65}.get(kind, 224)
    return Network(net, name, expects, taps, example)


def _zoo(which: str, options: dict[str, Any]) -> tuple[nn.Module, Input]:
    return zoo.create(which, **options), Input(CIFAR100_MEAN, CIFAR100_STD)


def _embedded(which: str, options: dict[str, Any]) -> tuple[nn.Module, Input]:
    if which not in EMBEDDED:
        raise UserError(f"no embedded network {which!r}", fix=f"there are {', '.join(EMBEDDED)}")
    blobs = which.startswith("blobs")
    mean, std = (BLOBS_MEAN, BLOBS_STD) if blobs else (GRATINGS_MEAN, GRATINGS_STD)
    return EMBEDDED[which](**options), Input((mean,) * 3, (std,) * 3)


def _deeplab(which: str, options: dict[str, Any]) -> tuple[nn.Module, Input]:
    return create_deeplab(which, **options), Input(IMAGENET_MEAN, IMAGENET_STD)


def _timm(which: str, options: dict[str, Any]) -> tuple[nn.Module, Input]:
    import timm
    from timm.data.config import resolve_model_data_config

    if not timm.is_model(which.partition(".")[0]):
        near = timm.list_models(f"*{which}*")[:3]
        fix = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise UserError(f"timm has no model {which!r}", fix=fix)
    try:
        net = timm.create_model(which, pretrained=False, **options)
    except RuntimeError as error:  # an unknown tag of pretrained weights
        raise UserError(f"timm cannot build {which!r}: {error}") from error
    data = resolve_model_data_config(net)
    return net, Input(tuple(data["mean"]), tuple(data["std"]), data["input_size"][-1])


def _torchvision(which: str, options: dict[str, Any]) -> tuple[nn.Module, Input]:
    from torchvision import models

    if which not in models.list_models():
        near = [m for m in models.list_models() if which in m][:3]
        fix = f"did you mean {', '.join(near)}?" if near else "torchvision.models lists them"
        raise UserError(f"torchvision has no model {which!r}", fix=fix)
    return models.get_model(which, weights=None, **options), Input(IMAGENET_MEAN, IMAGENET_STD)


def _python(which: str, options: dict[str, Any]) -> tuple[nn.Module, Input]:
    module, _, attribute = which.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)(**options)
    except (ImportError, AttributeError) as error:
        fix = "write python:package.module:function, in a place that Python imports from"
        raise UserError(f"no such function: {error}", where=which, fix=fix) from error
    if not isinstance(made, nn.Module):
        raise UserError(f"{which} made a {type(made).__name__}, not a torch.nn.Module")
    return made, Input(IMAGENET_MEAN, IMAGENET_STD)


_BUILDERS = {
    "zoo": _zoo,
    "embedded": _embedded,
    "deeplab": _deeplab,
    "timm": _timm,
    "torchvision": _torchvision,
    "python": _python,
}


def load_pretrained(network: Network) -> None:
    """Fill in the weights that timm or torchvision publish; the classifier stays if it differs.

    Raises:
        UserError: this kind of network has none, or they cannot be had.
    """
    kind, _, which = network.name.partition(":")
    try:
        if kind == "timm":
            import timm

            source = timm.create_model(which, pretrained=True).state_dict()
        elif kind == "torchvision":
            from torchvision import models

            source = models.get_model(which, weights="DEFAULT").state_dict()
        else:
            fix = "give a file of weights instead"
            raise UserError(f"nobody publishes weights of {network.name}", fix=fix)
    except (OSError, RuntimeError, ValueError) as error:
        fix = "give a file of weights instead"
        raise UserError(f"no pretrained weights: {error}", where=network.name, fix=fix) from error
    own = network.net.state_dict()
    fitting = {k: v for k, v in source.items() if k in own and v.shape == own[k].shape}
    network.net.load_state_dict({**own, **fitting})


def load_weights(network: Network, path: str | Path) -> list[str]:
    """Load a file into a network: a state dict, a published checkpoint, or one of `ickd fit`.

    Returns:
        Notes for the person, such as keys that were left out.

    Raises:
        UserError: it is missing, damaged, or of another network; lists what differs.
    """
    path = Path(path)
    path = path / LAST if path.is_dir() else path
    found = convert_checkpoint(path)
    report = compare_keys(found.state, network.net.state_dict())
    if not report.fits:
        what = f"the weights are not of {network.name}: {report.summary()}"
        raise UserError(what, where=str(path), fix=f"the file seems to be of {found.network}")
    network.net.load_state_dict(found.state)
    return list(found.notes)
