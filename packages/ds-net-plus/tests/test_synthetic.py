"""glyph-mix against its description and a slow renderer."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from ds_net_plus.synthetic import _GOLDEN, MEAN, STD, GlyphMix, _mix, alphabet, glyph_mix


def test_alphabet_is_as_described():
    glyphs = alphabet()
    assert glyphs.shape == (70, 4, 2, 2)
    assert set(glyphs.unique().tolist()) == {-1.0, 0.0, 1.0}
    lengths = (glyphs[:, :, 0] - glyphs[:, :, 1]).square().sum(2)
    assert lengths.min() >= 1
    assert lengths.max() <= 5
    sets = [
        {frozenset(map(tuple, segment)) for segment in glyph} for glyph in glyphs.int().tolist()
    ]
    assert all(len(s) == 4 for s in sets)
    assert max(len(a & b) for a, b in combinations(sets, 2)) <= 2


def test_shares_of_classes_and_of_hard_images():
    glyphs = glyph_mix(4000, seed=5)
    counts = glyphs.label.bincount(minlength=10)
    assert (counts / 4000 - 0.1).abs().max() < 4 * (0.09 / 4000) ** 0.5
    assert abs(float(glyphs.hard.double().mean()) - 0.4) < 4 * (0.24 / 4000) ** 0.5


def test_an_image_depends_on_seed_and_index_alone():
    whole = glyph_mix(50, seed=3)
    some = GlyphMix(seed=3).render(torch.tensor([41, 7, 7]))
    assert torch.equal(some.image, whole.image[[41, 7, 7]])
    assert torch.equal(some.label, whole.label[[41, 7, 7]])
    assert not torch.equal(whole.image, glyph_mix(50, seed=4).image)


def test_the_streams_are_splitmix64():
    # the first outputs for seed 1234567, as its authors' C program prints them
    published = (
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    )
    states = 1234567 + torch.arange(1, 6) * _GOLDEN
    assert [word % 2**64 for word in _mix(states).tolist()] == list(published)


def unit_pieces(glyph: list) -> frozenset:
    """A glyph as its pieces between neighbouring lattice points, which is what one sees."""
    pieces = set()
    for (x0, y0), (x1, y1) in glyph:
        parts = math.gcd(x1 - x0, y1 - y0)
        dx, dy = (x1 - x0) // parts, (y1 - y0) // parts
        points = [(x0 + k * dx, y0 + k * dy) for k in range(parts + 1)]
        pieces |= {frozenset(pair) for pair in pairwise(points)}
    return frozenset(pieces)


def test_no_two_glyphs_look_alike():
    assert len({unit_pieces(glyph) for glyph in alphabet().int().tolist()}) == 70


def test_scenes_keep_to_the_stated_ranges():
    scene = GlyphMix(seed=8).scene(torch.arange(3000))
    variant = scene.glyph - 7 * scene.label
    assert variant[~scene.hard].unique().tolist() == [0]
    assert variant[scene.hard].unique().tolist() == [1, 2, 3, 4, 5, 6]
    for which, thickness, contrast in (
        (~scene.hard, (1.2, 1.6), (0.85, 1.0)),
        (scene.hard, (0.9, 1.4), (0.6, 1.0)),
    ):
        for values, (low, high) in (
            (scene.thickness[which], thickness),
            (scene.contrast[which, 0], contrast),
        ):
            assert low <= values.min() < low + 0.01
            assert high - 0.01 < values.max() <= high
    assert scene.contrast[~scene.hard, 1].unique().tolist() == [0]
    relative = (scene.contrast[:, 1] / scene.contrast[:, 0])[scene.hard]
    assert 0.5 <= relative.min() < 0.51 < 0.99 < relative.max() <= 1
    length = (scene.ends[:, 4, 0] - scene.ends[:, 4, 1]).norm(dim=1)
    assert 3 <= length.min() < 3.1 < 7.9 < length.max() <= 8


def test_all_lengths_grow_with_the_image():
    small, large = (GlyphMix(size, seed=6).scene(torch.arange(9)) for size in (32, 64))
    assert torch.equal(large.ends, 2 * small.ends)
    assert torch.equal(large.thickness, 2 * small.thickness)
    assert torch.equal(large.noise, small.noise)
    assert torch.equal(large.label, small.label)


@pytest.mark.parametrize(("size", "count"), [(32, 3), (64, 1)])
def test_drawing_equals_a_slow_renderer(size, count):
    generator = GlyphMix(size=size, seed=1)
    hard = generator.scene(torch.arange(50)).hard
    easy_and_hard = [*hard.nonzero()[:count, 0], *(~hard).nonzero()[:1, 0]]
    scene = generator.scene(torch.stack(easy_and_hard))
    fast = generator.draw(scene)
    for n in range(count + 1):
        strokes = scene.ends[n].double().numpy()
        slow = np.zeros((size, size))
        thickness = float(scene.thickness[n])
        contrast = scene.contrast[n].tolist()
        for k, (a, b) in enumerate(strokes):
            for row in range(size):
                for column in range(size):
                    point = np.array([column, row]) - (size - 1) / 2
                    along = np.clip((point - a) @ (b - a) / max((b - a) @ (b - a), 1e-12), 0, 1)
                    away = np.linalg.norm(point - a - along * (b - a))
                    ink = np.clip(thickness + 0.5 - away, 0, 1) * contrast[k == 4]
                    slow[row, column] = max(slow[row, column], ink)
        assert np.abs(fast[n].double().numpy() - slow).max() < 1e-4


def test_noise_has_the_stated_spread():
    generator = GlyphMix(seed=2)
    scene = generator.scene(torch.arange(40))
    noise = glyph_mix(40, seed=2).image[:, 0] * STD + MEAN - generator.draw(scene)
    measured = noise.flatten(1).std(1)
    assert torch.allclose(measured, scene.noise.float(), rtol=0.1)
    hard = scene.hard
    assert scene.noise[~hard].max() <= 0.06
    assert scene.noise[hard].max() <= 0.11
