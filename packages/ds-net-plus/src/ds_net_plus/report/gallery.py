"""Images by the route that they take."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ds_net_plus.report.common import madds_unit, route_colors, route_names, short
from tenfold.plotting import Tile, TileGroup, image_grid

Statistic = float | Sequence[float]


def gallery(
    images: Tensor | Sequence[Any],
    choice: Tensor | Sequence[int],
    madds: Sequence[int],
    *,
    captions: Sequence[str] = (),
    routes: Sequence[int | str] | None = None,
    counts: Sequence[int] | None = None,
    colors: Sequence[str] | None = None,
    mean: Statistic = 0.0,
    std: Statistic = 1.0,
    columns: int = 10,
    title: str = "Images by the route that the gate chooses, cheapest first",
) -> Figure:
    """One row of images for each route, cheapest at the top; the frame has the route's colour.

    Args:
        images: (N, C, H, W), normalised, C = 1 or 3; or N pictures of PIL.
        choice: position of the route that each image takes, (N,) or (N, 1).
        madds: cost of every route.
        captions: one an image, such as its class; none if empty.
        routes: indices of the routes in the network; 0 to K - 1 where None.
        counts: images that took each route, where `images` are a part of them.
        colors: one a route, where `madds` are of some routes of a larger set; its own where None.
        mean: subtracted in the normalisation, of all channels or of each.
        std: divided by in the normalisation.
        columns: at most so many images of a route.
        title: over everything.

    Raises:
        ValueError: choices or captions that are not one an image.
    """
    tiles = _tiles(images, captions, mean, std)
    groups = _groups(tiles, _positions(choice, len(tiles)), madds, routes, columns, counts, colors)
    return image_grid(groups, columns=columns, title=title)


def cheapest_against_widest(
    images: Tensor | Sequence[Any],
    choice: Tensor | Sequence[int],
    madds: Sequence[int],
    *,
    captions: Sequence[str] = (),
    routes: Sequence[int | str] | None = None,
    colors: Sequence[str] | None = None,
    mean: Statistic = 0.0,
    std: Statistic = 1.0,
    columns: int = 10,
    rows: int = 2,
    title: str = "What the network finds easy, and what it finds hard",
) -> Figure:
    """Two blocks: images that take the cheapest route, and images that take the widest.

    Args:
        images: (N, C, H, W), normalised, C = 1 or 3; or N pictures of PIL.
        choice: position of the route that each image takes, (N,) or (N, 1).
        madds: cost of every route.
        captions: one an image, such as its class; none if empty.
        routes: indices of the routes in the network; 0 to K - 1 where None.
        colors: one a route, where `madds` are of some routes of a larger set; its own where None.
        mean: subtracted in the normalisation, of all channels or of each.
        std: divided by in the normalisation.
        columns: of a block.
        rows: at most so many of a block.
        title: over everything.

    Raises:
        ValueError: choices or captions that are not one an image.
    """
    tiles = _tiles(images, captions, mean, std)
    groups = _groups(
        tiles, _positions(choice, len(tiles)), madds, routes, columns * rows, colors=colors
    )
    return image_grid([groups[0], groups[-1]], columns=columns, title=title)


def _positions(choice: Tensor | Sequence[int], count: int) -> list[int]:
    positions = torch.as_tensor(choice).reshape(-1).tolist()
    if len(positions) != count:
        raise ValueError(f"{len(positions)} choices for {count} images")
    return positions


def _tiles(
    images: Tensor | Sequence[Any], captions: Sequence[str], mean: Statistic, std: Statistic
) -> list[Tile]:
    if captions and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    if isinstance(images, Tensor):
        scale, shift = (torch.as_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (std, mean))
        pictures = list((images.detach().cpu().float() * scale + shift).clamp(0, 1))
    else:
        pictures = [np.asarray(image.convert("RGB")) for image in images]
    texts = captions or [""] * len(pictures)
    return [Tile(picture, text) for picture, text in zip(pictures, texts, strict=True)]


def _groups(
    tiles: Sequence[Tile],
    positions: Sequence[int],
    madds: Sequence[int],
    routes: Sequence[int | str] | None,
    most: int,
    counts: Sequence[int] | None = None,
    colors: Sequence[str] | None = None,
) -> list[TileGroup]:
    """One group a route, with at most `most` of its images."""
    unit, letter = madds_unit(madds[-1])
    counts = counts or [positions.count(k) for k in range(len(madds))]
    colors, names = colors or route_colors(len(madds)), route_names(len(madds), routes)
    groups = []
    for k, (name, color) in enumerate(zip(names, colors, strict=True)):
        mine = [tile for tile, position in zip(tiles, positions, strict=True) if position == k]
        share = 100 * counts[k] / max(sum(counts), 1)
        groups.append(
            TileGroup(
                f"{name}: {short(madds[k] / unit)} {letter} multiply-adds",
                [Tile(tile.image, tile.caption, color) for tile in mine[:most]],
                note=f"{share:.0f} % of the images" if mine else "no image takes it",
                color=color,
            )
        )
    return groups
