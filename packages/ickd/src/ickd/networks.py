"""Networks by name, each with its own normalisation and resolution, behind one interface.

A name is "kind:name": "zoo:resnet20" (CIFAR), "embedded:gratings-student", "deeplab:resnet18",
"timm:resnet18", "torchvision:resnet18", or "python:package.module:function" for one's own. Behind a
dot may stand which of several published weights is meant: "timm:resnet18.a1_in1k",
"torchvision:resnet50.IMAGENET1K_V1".
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ickd import zoo
from ickd.convert import convert_checkpoint
from ickd.model.deeplab import DeepLab, create_deeplab, load_backbone
from ickd.model.deeplab.head import resize
from ickd.model.embedded import EMBEDDED
from ickd.synthetic import BLOBS_MEAN, BLOBS_STD, GRATINGS_MEAN, GRATINGS_STD
from ickd.taps import suggest, tap
from tenfold.checkpoint import WEIGHTS_FILE, compare_keys, strip_prefix
from tenfold.distillation import Taps
from tenfold.errors import UserError, first_line
from tenfold.training import LAST

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

KINDS = ("zoo", "embedded", "deeplab", "timm", "torchvision", "python")


class Input(NamedTuple):
    """What a network expects.

    Attributes:
        mean: of each colour of pixels in 0..1.
        std: likewise.
        size: side in pixels to which images are resized, None to take them as they are. Logits of
            every pixel are resized back to the images.
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
        example_size: side of the images on which taps are looked for; what a network of timm is
            made for, else 64, if left out.
        options: arguments of `open_network` that built it, besides its name and its input.

    Raises:
        UserError: mean and std that do not fit, or a network that cannot take the example.
    """

    def __init__(
        self,
        net: nn.Module,
        name: str = "",
        expects: Input | None = None,
        tap_names: Sequence[str] = (),
        example_size: int | None = None,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.name = net, name or type(net).__name__
        self.expects, self.options = expects or Input(), dict(options or {})
        mean, std = self.expects.mean, self.expects.std
        if not std or len(mean) != len(std) or min(std) <= 0:
            raise UserError(f"mean and std of {self.name} must be as long, and std above 0")
        for key in ("mean", "std"):
            values = torch.tensor(getattr(self.expects, key)).view(-1, 1, 1)
            self.register_buffer(key, values, persistent=False)
        self.example_size = self.expects.size or example_size or _timm_size(net) or 64
        self._classifier = _classifier(net)
        self.tap_names = tuple(tap_names)
        self.stem = False
        if not (tap_names or hasattr(net, "taps")):
            self.tap_names = self._suggested()
            # "act1" before "layer1", "layer2"; but "stages.0" is as much a stage as "stages.1"
            kinds = [re.split(r"[.\d:]", name)[0] for name in self.tap_names[:2]]
            self.stem = len({*kinds}) == 2

    def _suggested(self) -> tuple[str, ...]:
        images = self.example(1)
        try:
            return tuple(suggest(self.net, images)[0])
        except UserError:
            raise
        except Exception as error:  # whatever the network raises for images it does not like
            what = f"{self.name} does not take images {tuple(images.shape)}: {first_line(error)}"
            fix = "name its taps, or give the image_size or example_size that it wants"
            raise UserError(what, fix=fix) from error

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
        """Logits of pixels in 0..1.

        Raises:
            UserError: the network returns something else.
        """
        return self.resize_logits(self._logits(self.prepare(pixels)), pixels)

    def taps(self, pixels: Float[Tensor, "batch colours height width"]) -> Taps:
        """Logits and features of pixels in 0..1.

        Raises:
            UserError: a tap is missing, does not run or gives no map, or the network returns
                something else than logits.
        """
        with self.reading() as read:
            return self.resize_taps(read(self.prepare(pixels)), pixels)

    def resize_taps(self, taps: Taps, pixels: Float[Tensor, "batch colours height width"]) -> Taps:
        """Taps as they are, but for `resize_logits`."""
        if taps.logits is None:
            return taps
        return replace(taps, logits=self.resize_logits(taps.logits, pixels))

    def resize_logits(
        self, logits: Tensor, pixels: Float[Tensor, "batch colours height width"]
    ) -> Tensor:
        """Logits of every pixel at the size of the pixels, where `prepare` resizes these."""
        if self.expects.size is None or logits.ndim != 4:
            return logits
        return resize(logits, (pixels.shape[2], pixels.shape[3]))

    def _logits(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        if not isinstance(logits, Tensor):
            what = f"{self.name} returns a {type(logits).__name__}, not logits"
            raise UserError(what, fix="wrap the network so that it returns logits")
        return logits

    @contextmanager
    def reading(self) -> Iterator[Callable[[Tensor], Taps]]:
        """Inside, hooks stay on the network, and what is yielded reads prepared images' taps.

        Raises:
            UserError: a tap is missing.
        """
        if not self.tap_names:
            own: Any = self.net
            yield own.taps
            return
        pooled: list[Tensor] = []
        with tap(self.net, self.tap_names) as features, self._watch(pooled):

            def read(x: Tensor) -> Taps:
                logits = self._logits(x)
                for name in self.tap_names:
                    if name not in features:
                        what = f"tap {name!r} of {self.name} does not run with the network"
                        raise UserError(what, fix="see ickd taps for modules that do")
                maps = tuple(features[name] for name in self.tap_names)
                vector = pooled[-1] if pooled and pooled[-1].ndim == 2 else maps[-1].mean((2, 3))
                features.clear()
                pooled.clear()
                return Taps(maps, vector, logits, stem=self.stem)

            yield read

    def _watch(self, pooled: list[Tensor]) -> AbstractContextManager[Any]:
        """Puts what the classifier reads into a list; by its name, which copies keep."""
        if self._classifier is None:
            return nullcontext()
        return self.net.get_submodule(self._classifier).register_forward_pre_hook(
            lambda _, arguments: pooled.append(arguments[0])
        )

    def fill(
        self,
        state: Mapping[str, Tensor],
        what: str | None = None,
        *,
        where: str | None = None,
        fix: str | None = None,
    ) -> None:
        """Load weights of the network inside, all of them and no others.

        Args:
            state: as `net.state_dict()` has them.
            what: the complaint if they do not fit; that they are not of this network if left out.
            where: in which file they were, for the complaint.
            fix: how to mend it, likewise.

        Raises:
            UserError: they do not fit; lists what differs. Nothing is loaded then.
        """
        report = compare_keys(state, self.net.state_dict())
        if not report.fits:
            what = what or f"the weights are not of {self.name}"
            raise UserError(f"{what}: {report.summary()}", where=where, fix=fix)
        self.net.load_state_dict(dict(state))

    def fingerprint(self) -> str:
        """A hash of name, input and weights: what cached features belong to."""
        digest = hashlib.sha256(repr((self.name, self.expects, self.tap_names)).encode())
        for key, value in self.net.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


def _classifier(net: nn.Module) -> str | None:
    """Name of the layer that reads the pooled vector: timm tells; else the last linear layer."""
    layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    if hasattr(net, "get_classifier"):
        timm_net: Any = net
        head = timm_net.get_classifier()
        return next((name for name, module in layers.items() if module is head), None)
    return next(reversed(layers), None)


def _timm_size(net: nn.Module) -> int | None:
    """Side of the images that a network of timm is made for, or was published for."""
    made_for = getattr(getattr(net, "patch_embed", None), "img_size", None)
    published = getattr(net, "pretrained_cfg", None) or {}
    size = made_for or published.get("input_size")
    return int(size[-1]) if isinstance(size, tuple | list) else None


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
        net, expects = _BUILDERS[kind](which, dict(options))
    except TypeError as error:  # an argument that the constructor does not have
        raise UserError(f"cannot build {name}: {error}", fix="look at its options") from error
    expects = Input(
        expects.mean if mean is None else tuple(mean),
        expects.std if std is None else tuple(std),
        expects.size if image_size is None else image_size,
    )
    example = {"zoo": 32, "embedded": 24 if which.startswith("blobs") else 16, "deeplab": 65}.get(
        kind, 224
    )
    given = {"taps": list(taps), **options} if taps else options
    return Network(net, name, expects, taps, example, options=given)


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

    name = which.partition(".")[0]
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    try:
        net = timm.create_model(which, pretrained=False, **options)
    except (RuntimeError, ValueError, AssertionError) as error:  # an unknown tag among them
        raise UserError(f"timm cannot build {which!r}: {first_line(error)}") from error
    data = resolve_model_data_config(net)
    mean, std = tuple(data["mean"]), tuple(data["std"])
    colours = options.get("in_chans", len(mean))
    if colours != len(mean):
        mean, std = ((sum(values) / len(values),) * colours for values in (mean, std))
    return net, Input(mean, std, _timm_size(net))


_AUXILIARY = ("googlenet", "inception_v3")
"""These give several logits in training, and were published for inputs scaled otherwise."""


def _torchvision(which: str, options: dict[str, Any]) -> tuple[nn.Module, Input]:
    from torchvision import models

    name, _, tag = which.partition(".")
    if name not in (known := models.list_models(module=models)):
        raise _unknown("torchvision", name, known)
    tags = [weights.name for weights in models.get_model_weights(name)]
    if tag and tag not in tags:
        fix = f"there are {', '.join(tags)}"
        raise UserError(f"torchvision has no weights {tag!r} of {name}", fix=fix)
    if name in _AUXILIARY:
        usual = {"aux_logits": False, "transform_input": True, "init_weights": True}
        options = {**usual, **options}
    try:
        net = models.get_model(name, weights=None, **options)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"torchvision cannot build {name!r}: {first_line(error)}") from error
    return net, Input(IMAGENET_MEAN, IMAGENET_STD)


def _unknown(library: str, name: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(name, known, n=3)
    fix = f"did you mean {', '.join(near)}?" if near else f"{library}'s list_models() has them"
    return UserError(f"{library} has no model {name!r} that classifies images", fix=fix)


def _python(which: str, options: dict[str, Any]) -> tuple[nn.Module, Input]:
    module, _, attribute = which.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        fix = "write python:package.module:function, in a place that Python imports from"
        raise UserError(f"no such function: {error}", where=which, fix=fix) from error
    made = function(**options)
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
    """Fill in the weights that timm or torchvision publish, those of ImageNet.

    A classifier of other classes stays as it is. A DeepLab gets a backbone, those of torchvision
    with which the published ones began (IMAGENET1K_V1).

    Raises:
        UserError: this kind of network has none, or they cannot be had.
    """
    kind, _, which = network.name.partition(":")
    if kind not in _PUBLISHED:
        fix = "give a file of weights instead"
        raise UserError(f"nobody publishes weights of {network.name}", fix=fix)
    try:
        state = _PUBLISHED[kind](network, which)
    except Exception as error:  # the hub, the network and the disk raise many kinds
        what = f"no pretrained weights: {first_line(error)}"
        fix = "check the connection, or give a file of weights instead"
        raise UserError(what, where=network.name, fix=fix) from error
    if isinstance(network.net, DeepLab):
        load_backbone(network.net, state)
        return
    own = network.net.state_dict()
    state = {key: value for key, value in state.items() if key in own}  # no auxiliary classifiers
    for key, value in state.items():
        if value.shape[1:] == own[key].shape[1:] and value.shape != own[key].shape:
            state[key] = own[key]  # a classifier of other classes
    network.fill(state, "the pretrained weights do not fit its options", where=network.name)


def _from_timm(network: Network, which: str) -> dict[str, Tensor]:
    import timm

    # with the options, so that timm fits positions and colours to them
    options = {key: value for key, value in network.options.items() if key != "taps"}
    made = timm.create_model(which, pretrained=True, **{**options, "num_classes": None})
    return made.state_dict()


def _from_torchvision(network: Network, which: str) -> dict[str, Tensor]:
    from torchvision import models

    name, _, tag = which.partition(".")
    weights: Any = models.get_model_weights(name)
    # the first weights are those that papers of that time measured against
    usual = weights.IMAGENET1K_V1 if hasattr(weights, "IMAGENET1K_V1") else weights.DEFAULT
    chosen = weights[tag] if tag else usual
    return chosen.get_state_dict(progress=False, check_hash=True)


def _of_backbone(network: Network, which: str) -> dict[str, Tensor]:
    assert isinstance(network.net, DeepLab)
    return _from_torchvision(network, f"{network.net.backbone_name}.IMAGENET1K_V1")


_PUBLISHED = {"timm": _from_timm, "torchvision": _from_torchvision, "deeplab": _of_backbone}


def load_weights(network: Network, path: str | Path) -> list[str]:
    """Load a file into a network: a state dict, a published checkpoint, or one of `ickd fit`.

    Args:
        network: any; all its weights must be in the file, and no others.
        path: the file, the folder of a run, or a model folder.

    Returns:
        Notes for the person, such as keys that were left out.

    Raises:
        UserError: it is missing, damaged, or of another network; lists what differs.
    """
    path = Path(path)
    if path.is_dir():
        path /= WEIGHTS_FILE if (path / WEIGHTS_FILE).is_file() else LAST
    found = convert_checkpoint(path)
    state, own = found.state, network.net.state_dict()
    if state.keys() != own.keys() and all(key.startswith("net.") for key in state):
        state = strip_prefix(state, "net.")  # a `Network` was saved, not what is inside
    network.fill(state, where=str(path), fix=f"the file seems to be of {found.network}")
    return list(found.notes)
