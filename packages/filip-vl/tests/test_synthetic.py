"""shapes against its description, closed forms and a slow renderer."""

import math
import re
from collections import Counter

import numpy as np
import pytest

from filip_vl import synthetic
from filip_vl.synthetic import (
    CLASS_NAMES,
    CLASS_TEMPLATE,
    COLOURS,
    SHAPES,
    TEST_SEED,
    TRAIN_SEED,
    exchanged_caption,
    near_duplicates,
    scene,
    single_object,
)
from filip_vl.tokenizers import WordTokenizer

# of the radius's square
AREAS = {
    "circle": math.pi,
    "square": 1.7**2,
    "triangle": 1.98 * 1.8 / 2,
    "cross": 2 * 0.64 * 2 - 0.64**2,
    "ring": math.pi * (1 - 0.55**2),
    "diamond": 2 * 1.1**2,
}
ARTICLES = {colour: "an" if colour == "orange" else "a" for colour in COLOURS}


@pytest.fixture(scope="module")
def scenes():
    return [scene(TRAIN_SEED, index) for index in range(500)]


@pytest.fixture(scope="module")
def groups():
    return [near_duplicates(TEST_SEED, group) for group in range(60)]


def evenly(counts, kinds):
    """Whether `kinds` outcomes are equally likely, from how often each was seen."""
    mean = sum(counts.values()) / kinds
    return len(counts) == kinds and all(
        abs(count - mean) < 4.5 * math.sqrt(mean) for count in counts.values()
    )


def told(caption):
    """How a caption begins, and the (colour, shape) pairs it names."""
    article = r"\b(?:a|an) "
    first = re.search(rf"{article}({'|'.join(COLOURS)}) ", caption).start()
    pairs = []
    for phrase in caption[first:].split(" and "):
        article, colour, shape = phrase.split(" ")
        assert article == ARTICLES[colour]
        pairs.append((colour, shape))
    return caption[:first], pairs


def shown(made):
    return [(shape.colour, shape.shape) for shape in made.objects]


# -------------------------------------------------------------------------- random numbers


def philox(counter, key, rounds=10):
    """Philox4x64 as its authors describe it (Salmon et al., 2011, section 4.3)."""
    mask = 2**64 - 1
    for _ in range(rounds):
        first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = (
            (second >> 64) ^ counter[1] ^ key[0],
            second & mask,
            (first >> 64) ^ counter[3] ^ key[1],
            first & mask,
        )
        key = (key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask
    return counter


@pytest.mark.parametrize(("domain", "seed", "index"), [(0, 0, 0), (2, 7, 31), (1, -5, 1)])
def test_streams_are_philox_of_seed_and_index(domain, seed, index):
    bits = []
    for block in range(1, 4):
        bits += philox((block, 0, 0, domain), (seed % 2**64, index))
    stream = synthetic._Stream(domain, seed, index)
    numbers = [stream.number(), *stream.uniform(10).tolist(), stream.number()]
    assert numbers == [((word >> 11) + 0.5) / 2**53 for word in bits]


def test_the_normals_are_normal():
    numbers = synthetic._Stream(0, 1, 2).normal(99_999)
    assert numbers.shape == (99_999,)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (numbers**power).mean() - moment
        assert abs(error) < 4 * math.sqrt(variance / numbers.size)
    neighbours = (numbers[:-1] * numbers[1:]).mean()
    assert abs(neighbours) < 4 / math.sqrt(numbers.size)


def test_integers_are_drawn_evenly():
    stream = synthetic._Stream(0, 1, 3)
    assert evenly(Counter(stream.below(3) for _ in range(900)), 3)
    for count, stop in ((2, 9), (4, 4)):
        drawn = [stream.chosen(count, stop) for _ in range(900)]
        assert all(len(set(some)) == count for some in drawn)
        for place in range(count):
            assert evenly(Counter(some[place] for some in drawn), stop)


# ---------------------------------------------------------------- what identifies a scene


def same(a, b):
    return (
        np.array_equal(a.image, b.image)
        and np.array_equal(a.instances, b.instances)
        and a[2:] == b[2:]
    )


def test_a_scene_depends_on_seed_and_index_alone(scenes):
    for index in (400, 3, 41):
        assert same(scene(TRAIN_SEED, index), scenes[index])
    assert same(single_object(7, 50), single_object(7, 50))
    assert all(map(same, near_duplicates(7, 5), near_duplicates(7, 5)))


def test_no_two_scenes_are_alike():
    made = [scene(seed, index) for seed in (0, 1, -1, 2**40) for index in range(30)]
    made += [single_object(seed, index) for seed in (0, 1) for index in range(30)]
    made += [near_duplicates(seed, group)[0] for seed in (0, 1) for group in range(30)]
    assert len({some.image.tobytes() for some in made}) == len(made) == 240


# --------------------------------------------------------------------------- the objects


def test_objects_are_as_described(scenes):
    assert evenly(Counter(len(made.objects) for made in scenes), 3)
    shapes = [shape for made in scenes for shape in made.objects]
    assert evenly(Counter(shape.colour for shape in shapes), 8)
    assert evenly(Counter(shape.shape for shape in shapes), 6)
    assert {len(made.objects) for made in scenes} == {2, 3, 4}
    assert all(len(set(shown(made))) == len(made.objects) for made in scenes)
    radius = np.array([shape.radius for shape in shapes])
    assert 5.12 < radius.min() < 5.14
    assert 7.18 < radius.max() < 7.2
    assert radius.std() == pytest.approx(2.08 / math.sqrt(12), rel=0.05)


def test_every_object_has_a_cell_of_its_own(scenes):
    places = []
    for made in scenes:
        cells = [(int(shape.x // 16), int(shape.y // 16)) for shape in made.objects]
        assert len(set(cells)) == len(cells)
        places += [
            (cell, (shape.x - 16 * cell[0] - 7.5, shape.y - 16 * cell[1] - 7.5))
            for cell, shape in zip(cells, made.objects, strict=True)
        ]
    assert evenly(Counter(cell for cell, _ in places), 9)
    offsets = Counter(offset for _, offset in places)
    assert evenly(offsets, 9)
    assert set(offsets) == {(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)}


def inside(shape, column, row):
    """Section 9, a pixel at a time."""
    r, x, y = shape.radius, column - shape.x, row - shape.y
    return {
        "circle": x * x + y * y <= r * r,
        "square": max(abs(x), abs(y)) <= 0.85 * r,
        "triangle": -r <= y <= 0.8 * r and abs(x) <= 0.55 * (y + r),
        "cross": min(abs(x), abs(y)) <= 0.32 * r and max(abs(x), abs(y)) <= r,
        "ring": (0.55 * r) ** 2 <= x * x + y * y <= r * r,
        "diamond": abs(x) + abs(y) <= 1.1 * r,
    }[shape.shape]


def test_the_instances_are_those_of_a_slow_renderer(scenes):
    for made in scenes[:12]:
        for row in range(48):
            for column in range(48):
                seen = 0
                for n, shape in enumerate(made.objects, 1):
                    if inside(shape, column, row):
                        seen = n
                assert made.instances[row, column] == seen


def test_areas_are_those_of_the_shapes():
    shares = {shape: [] for shape in SHAPES}
    for index in range(480):
        made = single_object(3, index)
        (shape,) = made.objects
        shares[shape.shape].append((made.instances == 1).sum() / shape.radius**2)
    for shape, found in shares.items():
        # the border of the picture cuts next to nothing off
        assert np.mean(found) == pytest.approx(AREAS[shape], rel=0.03), shape


# ---------------------------------------------------------------------------- the pixels


def test_colours_are_those_of_the_palette(scenes):
    tints, grains = [], []
    for made in scenes:
        for n, shape in enumerate(made.objects, 1):
            pixels = made.image[made.instances == n].astype(float)
            middle = np.abs(np.array(COLOURS[shape.colour]) - 127.5) < 77  # never cut off
            tints += (pixels.mean(0) - COLOURS[shape.colour])[middle].tolist()
            grains.append(pixels[:, middle].var(0, ddof=1))
    count = len(tints)
    # the mean of at least 30 pixels hardly adds to the variance of the tint
    assert abs(np.mean(tints)) < 4 * 12 / math.sqrt(count)
    assert np.std(tints) == pytest.approx(
        math.sqrt(12**2 + 8**2 / 70), rel=4 / math.sqrt(2 * count)
    )
    # 1/12 for the rounding
    assert np.concatenate(grains).mean() == pytest.approx(8**2 + 1 / 12, rel=0.02)


def test_the_background_is_as_described(scenes):
    y, x = np.mgrid[:48, :48] / 47 - 0.5
    slopes, bases, scatter, pixels = [], [], np.zeros((3, 3)), 0
    for made in scenes:
        free = made.instances == 0
        plane = np.stack([np.ones(free.sum()), x[free], y[free]], 1)
        values = made.image[free].astype(float)
        fit, *_ = np.linalg.lstsq(plane, values, rcond=None)
        inner = (fit[0] - 12.5 > 60).all()  # dark pixels would be cut off at 0
        bases.append(fit[0])
        if inner:
            slopes.append(fit[1:])
            rest = values - plane @ fit
            scatter += rest.T @ rest
            pixels += len(rest) - 3
    # luminance noise is shared by the channels, chroma noise is not
    expected = np.full((3, 3), 18.0**2) + (7.2**2 + 1 / 12) * np.eye(3)
    assert scatter / pixels == pytest.approx(expected, rel=0.03)
    slopes = np.array(slopes)
    assert np.abs(slopes).max() < 25 + 6
    assert np.abs(slopes.mean(0)).max() < 4 * 14.5 / math.sqrt(len(slopes))
    assert slopes.std() == pytest.approx(50 / math.sqrt(12), rel=0.08)
    bases = np.array(bases)
    assert bases.mean() == pytest.approx(80, abs=3)
    assert bases.std() == pytest.approx(100 / math.sqrt(12), rel=0.05)
    assert 28 < bases.min() < bases.max() < 132


# -------------------------------------------------------------------------- the captions


def test_a_caption_names_exactly_the_objects(scenes):
    places = Counter()
    for made in scenes:
        _, pairs = told(made.caption)
        assert sorted(pairs) == sorted(shown(made))
        for shape, phrase in zip(made.objects, made.phrases, strict=True):
            texts = [made.caption[slice(*span)] for span in phrase]
            assert texts == [ARTICLES[shape.colour], shape.colour, shape.shape]
            assert made.caption[phrase.article[0] : phrase.shape[1]] == " ".join(texts)
        places[pairs.index(shown(made)[0]), len(pairs)] += 1
    for count in (2, 3, 4):
        assert evenly({p: n for p, n in places.items() if p[1] == count}, count)
    prefixes = Counter(told(made.caption)[0].strip() for made in scenes)
    assert evenly(prefixes, 5)
    assert set(prefixes) == {"a photo of", "a picture of", "an image of", "there is", ""}


def test_captions_have_27_words_and_at_most_20_tokens(scenes):
    captions = [made.caption for made in scenes]
    tokenizer = WordTokenizer.train(captions)
    assert tokenizer.vocab_size == 27
    lengths = tokenizer.encode(captions, 24).lengths
    # start, end, 2.2 words of prefix, and 4 k - 1 of k objects
    assert lengths.float().mean() == pytest.approx(15.2, abs=0.4)
    assert (lengths.min(), lengths.max()) == (2 + 7, 2 + 3 + 15)
    assert tokenizer.truncated == 0
    # so that the places of phrases are those of `spans`
    assert [tokenizer.clean(caption) for caption in captions] == captions


def test_exchanged_captions_are_false(scenes):
    for made in scenes:
        caption, pairs = exchanged_caption(made), told(made.caption)[1]
        possible = any(a != c and b != d for a, b in pairs for c, d in pairs)
        assert (caption is not None) == possible
        if caption is None:
            continue
        prefix, false = told(caption)
        assert prefix == told(made.caption)[0]
        changed = [n for n, pair in enumerate(pairs) if pair != false[n]]
        assert len(changed) == 2
        (a, b), (c, d) = (pairs[n] for n in changed)
        assert [false[n] for n in changed] == [(c, b), (a, d)]
        assert sorted(false) != sorted(pairs)


# ------------------------------------------------------------------ sets for evaluation


def test_near_duplicates_differ_in_one_colour_or_shape(groups):
    kinds = Counter()
    for first, *others in groups:
        assert len({frozenset(shown(made)) for made in (first, *others)}) == 4
        for made in others:
            assert len(set(shown(made))) == len(made.objects)
            pairs = zip(first.objects, made.objects, strict=True)
            changed = [(a, b) for a, b in pairs if a != b]
            ((a, b),) = changed
            kinds[a.colour != b.colour] += 1
            assert (a.colour == b.colour) != (a.shape == b.shape)
            assert (a.x, a.y, a.radius) == (b.x, b.y, b.radius)
    assert evenly(kinds, 2)


def test_near_duplicates_share_every_other_pixel_and_word(groups):
    for first, *others in groups:
        for made in others:
            (n,) = [n for n, a in enumerate(first.objects, 1) if a != made.objects[n - 1]]
            touched = (first.instances == n) | (made.instances == n)
            assert np.array_equal(first.image[~touched], made.image[~touched])
            assert not np.array_equal(first.image[touched], made.image[touched])
            pairs, other = told(first.caption), told(made.caption)
            assert pairs[0] == other[0]
            assert sum(a != b for a, b in zip(pairs[1], other[1], strict=True)) == 1


def test_a_single_object_is_one_of_48_classes():
    assert len(set(CLASS_NAMES)) == 48
    cells = Counter()
    for index in range(144):
        made = single_object(TEST_SEED, index)
        (shape,), (phrase,) = made.objects, made.phrases
        assert shape.name == f"{shape.colour} {shape.shape}" == CLASS_NAMES[index % 48]
        assert made.caption == CLASS_TEMPLATE.format(shape.name) == f"a photo of a {shape.name}"
        texts = [made.caption[slice(*span)] for span in phrase]
        assert texts == ["a", shape.colour, shape.shape]
        assert phrase.article[0] == len("a photo of ")
        assert set(np.unique(made.instances)) == {0, 1}
        cells[shape.x // 16, shape.y // 16] += 1
    assert evenly(cells, 9)


def test_a_shape_that_does_not_exist():
    strange = synthetic.Shape("red", "blob", 8.0, 8.0, 6.0)
    with pytest.raises(ValueError, match=r"a shape is one of .*not 'blob'"):
        synthetic._inside(strange, np.zeros((1, 4)), np.zeros((4, 1)))
