"""glyph-mix against its description and a slow renderer."""

from itertools import combinations

import numpy as np
import pytest
import torch

from ds_net_plus.synthetic import MEAN, STD, GlyphMix, alphabet, glyph_mix


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


@pytest.mark.parametrize("size", [32, 64])
def test_drawing_equals_a_slow_renderer(size):
    generator = GlyphMix(size=size, seed=1)
    scene = generator.scene(torch.arange(6))
    fast = generator.draw(scene)
    for n in range(6):
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
