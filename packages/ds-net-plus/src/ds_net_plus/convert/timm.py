"""A network of timm as a dynamic one: a DeiT or ViT, or a bottleneck ResNet.

Its units are sorted, the most important first, so that prefixes keep them; that leaves the function
as it was. The full route equals the original; the narrower ones want Stage I.
"""

import difflib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ds_net_plus.convert import timm_resnet, timm_vit
from ds_net_plus.convert.importance import taylor_scores
from ds_net_plus.convert.official import check_finite_weights, relative_deviation
from ds_net_plus.model import DynamicNet
from tenfold.checkpoint import compare_keys, extract_state_dict, load_state, strip_prefix
from tenfold.errors import UserError

IMPORTANCE = ("magnitude", "taylor", "none")


def from_timm(
    model: str | nn.Module,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    routes: Sequence[Sequence[float]] | None = None,
    front_blocks: int | None = None,
    rhos: Sequence[float] | None = None,
    gates: int | None = None,
    importance: str = "magnitude",
    images: Iterable[Any] | None = None,
    sort_embedding: bool = False,
    **overrides: object,
) -> DynamicNet:
    """A timm network as a dynamic one whose full route computes the same.

    A DeiT or ViT (class token, learned positions, no layer scale, no distillation token) becomes a
    `DSViT` with a front of full size. A ResNet of bottlenecks (7x7 stem, no groups) becomes a
    `DSResNet` with batch norm, whose narrow routes start with slices of the original statistics:
    recalibrate them. Attention of the gates is the identity, the gates themselves are untrained.

    Example:
        >>> net = from_timm("deit_small_patch16_224")
        >>> [round(route.madds / 1e9, 2) for route in net.routes]
        [1.88, 2.71, 3.53, 4.6]
        >>> net(images, route=3)  # what timm's network answers

    Args:
        model: a name of timm, or a network that timm built.
        pretrained: fetch the weights of that name.
        weights: a file to read them from instead.
        routes: (features, heads, MLP ratio, blocks behind the front) of every route of a ViT, the
            last one the whole network; four of full depth where None.
        front_blocks: blocks of a ViT in front of the gate; 2 where None.
        rhos: slimming ratios of a ResNet, the last one 1; quarters where None.
        gates: of a ResNet, 4 or 1; 4 where None.
        importance: what heads, hidden units and channels are sorted by: "magnitude" (mean |w| of
            the weights that write and read them), "taylor" (first order, on `images`), or "none".
        images: batches (images, labels, ...) for "taylor", of which 1000 images are read.
        sort_embedding: also sort the features of a ViT's tokens, by the weights of its norms, for
            routes of fewer features.
        **overrides: other constructor arguments of `DSViT` or `DSResNet`.

    Returns:
        The network in eval mode, on the device and of the type of the original.

    Raises:
        UserError: a network of another kind, an option that does not fit it, or weights that
            cannot be had.
    """
    if isinstance(model, str):
        model = load_timm(model, pretrained, weights)
    if (importance == "taylor") != (images is not None) or importance not in IMPORTANCE:
        raise UserError(
            f"importance {importance!r} {'without' if images is None else 'with'} images",
            fix=f"choose from {', '.join(IMPORTANCE)}; taylor alone needs images, and reads them",
        )
    family = _family(model)
    options = {"routes": routes, "front_blocks": front_blocks, "rhos": rhos, "gates": gates}
    options = {key: value for key, value in options.items() if value is not None}
    _check_options(family, [*options, "sort_embedding"] if sort_embedding else options, overrides)
    family.check(model)
    net = family.build(model, **options, **overrides)

    scores = _scores(family, model, importance, images)
    if sort_embedding:
        scores[timm_vit.EMBEDDING] = timm_vit.embedding_scores(model)
    orders = {key: score.argsort(descending=True, stable=True) for key, score in scores.items()}
    state = family.renamed(net, family.reordered(model, orders))
    check_finite_weights(state, None)
    gate = {key: value for key, value in net.state_dict().items() if key.startswith("gate")}
    net.to(next(model.parameters())).load_state_dict({**gate, **state})
    net.gate_trained = False
    return net.eval()


def _family(model: nn.Module) -> Any:
    """The module with the functions of the network's family.

    Raises:
        UserError: neither of the two.
    """
    if isinstance(model, VisionTransformer):
        return timm_vit
    if isinstance(model, ResNet):
        return timm_resnet
    raise UserError(
        f"a {type(model).__name__} cannot be converted",
        fix="take a ViT or a bottleneck ResNet of timm, such as deit_small_patch16_224, resnet50",
    )


def _check_options(family: Any, given: Iterable[str], overrides: Iterable[str]) -> None:
    """Makes sure that the options are the family's, and overrides change nothing that is fixed.

    Raises:
        UserError: names the first that is or does not.
    """
    for option in given:
        if option not in family.OPTIONS:
            own = ", ".join(family.OPTIONS)
            raise UserError(f"{option} is no option of this family", fix=f"its options are {own}")
    for option in overrides:
        if option in family.FIXED:
            raise UserError(
                f"{option} cannot be changed: the timm network, or exactness, leaves no choice"
            )


def _scores(
    family: Any, model: nn.Module, importance: str, images: Iterable[Any] | None
) -> dict[str, Tensor]:
    """Importance of the units of every group; no group where they are to stay."""
    if importance == "magnitude":
        return family.magnitude_scores(model)
    return {} if images is None else taylor_scores(model, family.readers(model), images)


def load_timm(name: str, pretrained: bool = True, weights: str | Path | None = None) -> nn.Module:
    """A timm network by name, which `from_timm` can convert.

    Args:
        name: such as deit_small_patch16_224, or with a tag resnet50.a1_in1k.
        pretrained: fetch the weights of that name.
        weights: a file to read them from instead, .pth or .safetensors; its classifier may have any
            number of classes.

    Returns:
        The network in eval mode.

    Raises:
        UserError: no such name, a network that cannot be converted, or weights that cannot be
            fetched or do not fit.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 3)
        fix = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise UserError(f"timm has no model {name!r}", fix=fix)
    with torch.device("meta"):  # before anything large is fetched
        plan = _create(name)
    _family(plan).check(plan)
    if weights is not None:
        return _with_weights(name, weights)
    if not pretrained:
        return _create(name).eval()
    try:
        with _quiet_hub():
            return timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # the network, the disk or the hub, each in exceptions of its own
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise UserError(
            f"the weights of {name} cannot be fetched",
            where=reason,
            fix=f"give a file: --source timm:{name}:FILE, or weights= in Python",
        ) from error


def _create(name: str, **options: Any) -> nn.Module:
    """The network with random weights.

    Raises:
        UserError: a tag that timm does not know.
    """
    try:
        return timm.create_model(name, pretrained=False, **options)
    except RuntimeError as error:
        raise UserError(f"timm cannot build {name}, {error}") from error


def _with_weights(name: str, path: str | Path) -> nn.Module:
    """The network with the weights of a file.

    Raises:
        UserError: an unreadable file, or one that does not fit.
    """
    found, _ = extract_state_dict(load_state(path), ("state_dict", "model", "state_dict_ema"))
    state = strip_prefix(found, "module.")
    classifier = state.get("head.weight", state.get("fc.weight"))
    classes = {} if classifier is None else {"num_classes": len(classifier)}
    model = _create(name, **classes)
    wanted = model.state_dict()
    counters = {key: wanted[key] for key in wanted if key.endswith("num_batches_tracked")}
    state = {**counters, **state}  # older files have none
    keys = compare_keys(state, wanted)
    if not keys.fits:
        raise UserError(f"the weights are not those of {name}: {keys.summary()}", where=str(path))
    check_finite_weights(state, str(path))
    model.load_state_dict(state)
    return model.eval()


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keeps the hub from telling of every attempt; the last one's failure is told."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def timm_deviation(net: DynamicNet, model: nn.Module, images: int = 2) -> float:
    """Largest relative deviation of the full route from timm's network, on random images.

    Args:
        net: what `from_timm` made of `model`; both in eval mode.
        model: the original.
        images: how many.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (images, net.in_channels, net.image_size, net.image_size)
    x = torch.randn(shape, generator=generator).to(next(net.parameters()))
    full = net(x, route=net.num_routes - 1)
    assert isinstance(full, Tensor)
    return relative_deviation(full, model(x))
