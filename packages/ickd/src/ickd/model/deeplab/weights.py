"""Weights of other programs in a `DeepLab`: published ones, and backbones trained on ImageNet."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ickd.model.deeplab.mobilenet_v2 import LOW, STAGES
from ickd.model.deeplab.network import DeepLab
from tenfold.checkpoint import (
    compare_keys,
    extract_state_dict,
    load_state,
    rename_keys,
    strip_prefix,
)
from tenfold.errors import UserError

_DUPLICATE = re.compile(r"^backbone\.(?:low|high)_level_features\.")
_COUNTER = "num_batches_tracked"

# Classifiers, and the 1x1 convolution before MobileNetV2's, of torchvision and timm.
_NOT_OF_BACKBONE = re.compile(r"^(fc|classifier|head|conv_head|features\.18)\.")

_TORCHVISION_MOBILENET = (
    (r"^(features\.1\.conv)\.2\.", r"\1.4."),
    (r"^(features\.1\.conv)\.1\.", r"\1.3."),
    (r"^(features\.1\.conv)\.0\.(\d)\.", r"\1.\2."),
    (r"^(features\.(?!1\.)\d+\.conv)\.3\.", r"\1.7."),
    (r"^(features\.(?!1\.)\d+\.conv)\.2\.", r"\1.6."),
    (r"^(features\.(?!1\.)\d+\.conv)\.1\.0\.", r"\1.3."),
    (r"^(features\.(?!1\.)\d+\.conv)\.1\.1\.", r"\1.4."),
    (r"^(features\.(?!1\.)\d+\.conv)\.0\.(\d)\.", r"\1.\2."),
)


def drop_duplicates(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Keep each tensor of a MobileNetV2 backbone once.

    The published program registers the blocks three times, as `features`, `low_level_features` and
    `high_level_features`, and so its files list every tensor of the backbone twice.

    Args:
        state: of a whole DeepLab; any other passes unchanged.

    Returns:
        The state without the duplicates, and their keys. What only a duplicate holds is kept under
        the key of `features`.

    Raises:
        UserError: a duplicate that differs from its original: the file is not what it should be.
    """
    kept = {key: tensor for key, tensor in state.items() if not _DUPLICATE.match(key)}
    dropped, differing = [], []
    for key, tensor in state.items():
        if not _DUPLICATE.match(key):
            continue
        original = kept.setdefault(_DUPLICATE.sub("backbone.features.", key), tensor)
        dropped.append(key)
        if original.shape != tensor.shape or not torch.equal(original, tensor):
            differing.append(key)
    if differing:
        raise UserError(
            f"{len(differing)} tensors are listed twice with other values, first {differing[0]}",
            fix="look for another copy of the checkpoint",
        )
    return kept, dropped


def with_duplicates(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """List the blocks of a MobileNetV2 backbone twice, as the published program reads them."""
    features = {k: v for k, v in state.items() if k.startswith("backbone.features.")}
    split = ("backbone.low_level_features.", "backbone.high_level_features.")
    doubled: dict[str, Tensor] = dict(features)
    for prefix, low in zip(split, (True, False), strict=True):
        for key, tensor in features.items():
            if (int(key.split(".")[2]) <= LOW) == low:
                doubled[key.replace("backbone.features.", prefix, 1)] = tensor
    return doubled | {k: v for k, v in state.items() if k not in features}


def load_deeplab(model: DeepLab, state: Mapping[str, Tensor]) -> None:
    """Load weights strictly, from our own state dict or a published one with duplicates.

    Raises:
        UserError: duplicates that differ, or keys and shapes that do not fit the model.
    """
    kept, _ = drop_duplicates(state)
    model.load_state_dict(
        fit_state(kept, model.state_dict(), "the weights do not fit this DeepLab")
    )


def load_backbone(model: DeepLab, source: str | Path | Mapping[str, Tensor]) -> None:
    """Load an ImageNet network of torchvision or timm into the backbone; its classifier is left.

    Args:
        model: any DeepLab; its heads are not touched.
        source: the state dict of resnet18, resnet101 or mobilenet_v2 (in timm mobilenetv2_100),
            whichever the backbone is, or a file with it.

    Raises:
        UserError: an unreadable file, or weights of another network.
    """
    where, state = None, source
    if not isinstance(source, Mapping):
        where, state = str(source), extract_state_dict(load_state(source))[0]
    assert isinstance(state, Mapping)
    state = strip_prefix(state)
    if model.backbone_name == "mobilenet_v2":
        state = _mobilenet_keys(state)
    # timm's MobileNetV2 has a second batch norm at the top, ResNets have none there.
    own = {k: v for k, v in state.items() if not _NOT_OF_BACKBONE.match(k) and k[:4] != "bn2."}
    what = f"not the weights of a {model.backbone_name}"
    model.backbone.load_state_dict(fit_state(own, model.backbone.state_dict(), what, where))


def _mobilenet_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if "features.1.conv.0.0.weight" in state:
        return rename_keys(state, _TORCHVISION_MOBILENET)
    if "conv_stem.weight" in state:
        return rename_keys(state, _timm_mobilenet())
    return state


def _timm_mobilenet() -> list[tuple[str, str]]:
    rules = [(r"^conv_stem\.", "features.0.0."), (r"^bn1\.", "features.0.1.")]
    parts = {
        1: ("conv_dw", "bn1", None, "conv_pw", "bn2"),
        6: ("conv_pw", "bn1", None, "conv_dw", "bn2", None, "conv_pwl", "bn3"),
    }
    block = 1
    for stage, (expansion, _, count, _) in enumerate(STAGES):
        for index in range(count):
            rules += [
                (rf"^blocks\.{stage}\.{index}\.{part}\.", f"features.{block}.conv.{place}.")
                for place, part in enumerate(parts[expansion])
                if part
            ]
            block += 1
    return rules


def fit_state(
    state: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    what: str,
    where: str | None = None,
) -> dict[str, Tensor]:
    """The state if it loads strictly; counters that old files lack start from zero."""
    counters = {k: torch.zeros((), dtype=torch.int64) for k in wanted if k.endswith(_COUNTER)}
    whole = counters | state
    report = compare_keys(whole, wanted)
    if not report.fits:
        raise UserError(f"{what}: {report.summary()}", where=where)
    return whole
