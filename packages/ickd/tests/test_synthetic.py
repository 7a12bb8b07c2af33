"""bound-gratings and textured-blobs against their description and slow renderers."""

import math

import numpy as np
import pytest
import torch

from ickd import synthetic
from ickd.synthetic import (
    BLOB_CLASSES,
    BLOBS_MEAN,
    BLOBS_STD,
    GRATINGS_MEAN,
    GRATINGS_STD,
    bound_gratings,
    grating_class_names,
    textured_blobs,
)

TASK_SEED = 7


def gratings_scene(count, seed=3, types=24, size=16):
    return synthetic._draw_gratings(seed, range(count), types, TASK_SEED, size)


def blobs_scene(count, seed=3):
    return synthetic._draw_blobs(seed, range(count), TASK_SEED)


def image_of(waves, n, w):
    """Numbers of one wave: colour (3,), angle, frequency, phase, (x, y) of its centre."""
    return tuple(np.asarray(part)[n, w].tolist() for part in waves)


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


def test_the_philox_of_this_file_gives_the_published_numbers():
    # the known answers that its authors ship: a counter and a key of ones
    ones = 2**64 - 1
    assert philox((ones,) * 4, (ones,) * 2) == (
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    )


@pytest.mark.parametrize(("domain", "seed", "index"), [(0, 0, 0), (2, 7, 31), (3, -5, 1)])
def test_streams_are_philox_of_seed_and_index(domain, seed, index):
    words = []
    for block in range(1, 4):
        words += philox((block, 0, 0, domain), (seed % 2**64, index))
    streams = synthetic._Streams(domain, seed, range(index, index + 1), 12)
    numbers = streams.uniform(12)[0].tolist()
    assert numbers == [((word >> 11) + 0.5) / 2**53 for word in words]
    with pytest.raises(ValueError, match="the streams have 12 numbers, not 13"):
        streams.uniform()


def test_the_normals_are_normal():
    moments = synthetic._Streams(0, 1, range(300), 300).normal(300)
    assert abs(moments.mean()) < 5 / math.sqrt(moments.size)
    assert moments.std() == pytest.approx(1, abs=5 / math.sqrt(2 * moments.size))
    assert (moments**4).mean() == pytest.approx(3, abs=5 * math.sqrt(96 / moments.size))


# ------------------------------------------------------------------------ what identifies an image


@pytest.mark.parametrize("draw", [bound_gratings, textured_blobs])
def test_an_image_depends_on_seed_and_index_alone(draw):
    whole = draw(300, seed=3)
    for count in (1, 255, 257):
        for part, all_of_it in zip(draw(count, seed=3), whole, strict=True):
            assert torch.equal(part, all_of_it[:count])
    again = draw(300, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))


@pytest.mark.parametrize("draw", [bound_gratings, textured_blobs])
def test_sets_of_three_seeds_share_no_image(draw):
    pixels = torch.cat([draw(100, seed=seed).image.flatten(1) for seed in (0, 1, -1)])
    assert len(pixels.unique(dim=0)) == 300


def test_types_and_textures_belong_to_the_task_not_to_the_set():
    types = synthetic._grating_types(24, 7)
    assert all(
        np.array_equal(a, b) for a, b in zip(types, synthetic._grating_types(24, 7), strict=True)
    )
    fewer = synthetic._grating_types(16, 7)
    assert all(np.array_equal(a[:16], b) for a, b in zip(types, fewer, strict=True))
    other = synthetic._grating_types(24, 8)
    assert not any(np.isclose(a, b).any() for a, b in zip(types, other, strict=True))
    textures, different = synthetic._textures(7), synthetic._textures(8)
    assert not np.isclose(textures.colour, different.colour).any()
    assert not torch.equal(bound_gratings(9, 0).image, bound_gratings(9, 0, task_seed=8).image)
    assert not torch.equal(textured_blobs(9, 0).image, textured_blobs(9, 0, task_seed=8).image)


# ------------------------------------------------------------------------------- the description


def test_types_are_as_described():
    angle, frequency, colour = synthetic._grating_types(2000, 7)
    for values, low, high in ((angle, 0, math.pi), (frequency, 0.18, 0.40)):
        assert values.shape == (2000, 2)
        assert low < values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() < high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
    assert np.linalg.norm(colour, axis=-1) == pytest.approx(np.ones((2000, 2)))
    assert np.abs(colour.mean((0, 1))).max() < 5 / math.sqrt(3 * 4000)
    angle, frequency, colour = synthetic._textures(7)
    assert angle[:, 0] == pytest.approx([k * math.pi / 5 for k in range(5)])
    assert ((frequency > 0.16) & (frequency < 0.28)).all()
    assert np.linalg.norm(colour, axis=-1) == pytest.approx(np.ones((5, 1)))


@pytest.mark.parametrize(("classes", "types", "labels"), [("coarse3", 24, 3), ("coarse2", 24, 2)])
def test_coarse_labels_are_the_type_modulo_the_labels(classes, types, labels):
    made = bound_gratings(2400, 5, classes=classes)
    assert torch.equal(made.label, made.fine % labels)
    counts = made.fine.bincount()
    assert len(counts) == types
    assert (counts - 2400 / types).abs().max() < 4.5 * math.sqrt(2400 / types)
    assert len(grating_class_names(classes)) == labels


def test_fine_labels_are_the_type():
    made = bound_gratings(1600, 5, classes="fine16")
    assert torch.equal(made.label, made.fine)
    assert made.fine.unique().tolist() == list(range(16))
    assert len(set(grating_class_names("fine16"))) == 16


def test_coarse_tasks_differ_in_their_labels_alone():
    three, two = (bound_gratings(50, 5, classes=classes) for classes in ("coarse3", "coarse2"))
    assert torch.equal(three.image, two.image)
    assert torch.equal(three.fine, two.fine)


def test_own_gratings_are_jittered_as_described():
    scene, count = gratings_scene(1500), 3000
    angle, frequency, colour = synthetic._grating_types(24, TASK_SEED)
    turned = (scene.waves.angle[:, :2] - angle[scene.fine]).ravel()
    stretched = (scene.waves.frequency[:, :2] / frequency[scene.fine] - 1).ravel()
    for values, spread in ((turned, 0.15), (stretched, 0.08)):
        assert abs(values.mean()) < 5 * spread / math.sqrt(count)
        assert values.std() == pytest.approx(spread, rel=5 / math.sqrt(2 * count))
    # colour = 2 a (c + 0.25 n), a uniform in 0.8 .. 1.2: mean 2 c, variance about it
    # 4 (E[a²] (c² + 0.25²) − c²) with E[a²] = 1 + 0.4² / 12
    square = 1 + 0.4**2 / 12
    c = colour[scene.fine]
    residual = scene.waves.colour[:, :2] - 2 * c
    assert np.abs(residual.mean((0, 1))).max() < 5 * 0.6 / math.sqrt(count)
    expected = 4 * (square * (c**2 + 0.25**2) - c**2)
    assert (residual**2).mean() == pytest.approx(expected.mean(), rel=0.08)
    along = (residual * c).sum(-1)  # what varies along a unit colour: amplitude and one part of n
    assert along.std() == pytest.approx(2 * math.sqrt(square * (1 + 0.25**2) - 1), rel=0.08)


def test_clutter_and_places_are_as_described():
    waves = gratings_scene(1500).waves
    assert waves.centre.shape == (1500, 4, 2)
    amplitude = np.linalg.norm(waves.colour[:, 2:], axis=-1)
    ranges = [
        (amplitude, 0, 1.2),
        (waves.angle[:, 2:], 0, math.pi),
        (waves.frequency[:, 2:], 0.15, 0.40),
        (waves.phase, 0, 2 * math.pi),
        (waves.centre, 3, 13),
    ]
    for values, low, high in ranges:
        width = high - low
        assert low < values.min() < low + 0.01 * width
        assert high - 0.01 * width < values.max() < high
        assert values.std() == pytest.approx(width / math.sqrt(12), rel=0.05)
    assert gratings_scene(500, size=32).waves.centre.max() > 28


def test_ellipses_and_fillings_are_as_described():
    scene, count = blobs_scene(1000), 3000
    angle, frequency, colour = synthetic._textures(TASK_SEED)
    turned = (scene.waves.angle[:, 1:] - angle[scene.texture, 0]).ravel()
    stretched = (scene.waves.frequency[:, 1:] / frequency[scene.texture, 0] - 1).ravel()
    tinted = (scene.waves.colour[:, 1:] - colour[scene.texture, 0]).ravel()
    for values, spread in ((turned, 0.12), (stretched, 0.08), (tinted, 0.35)):
        assert abs(values.mean()) < 5 * spread / math.sqrt(count)
        assert values.std() == pytest.approx(spread, rel=5 / math.sqrt(2 * count))
    for values, low, high in ((scene.half_axes, 3, 7), (scene.centre, 0, 23)):
        assert low < values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() < high
    assert np.linalg.norm(scene.waves.colour[:, 0], axis=-1) == pytest.approx(np.full(1000, 0.5))
    assert np.abs(np.bincount(scene.texture.ravel()) - count / 5).max() < 5 * math.sqrt(count / 5)


# --------------------------------------------------------------------------------- the rendering


def slow_gratings(scene, n):
    """One image, a pixel after the other."""
    size = scene.noise.shape[-1]
    value = 0.6 * scene.noise[n]
    for w in range(4):
        colour, angle, frequency, phase, (cx, cy) = image_of(scene.waves, n, w)
        for row in range(size):
            for column in range(size):
                dx, dy = column - cx, row - cy
                along = dx * math.cos(angle) + dy * math.sin(angle)
                wave = math.exp(-(dx * dx + dy * dy) / (2 * 3**2)) * math.cos(
                    2 * math.pi * frequency * along + phase
                )
                for c in range(3):
                    value[c, row, column] += colour[c] * wave
    return value


def slow_blobs(scene, n):
    """One image and its classes, a pixel after the other."""
    value, label = 0.5 * scene.noise[n], np.zeros((24, 24), dtype=int)
    for row in range(24):
        for column in range(24):
            seen = 0
            for e in range(3):
                turn = scene.angle[n, e]
                dx, dy = column - scene.centre[n, e, 0], row - scene.centre[n, e, 1]
                u = dx * math.cos(turn) + dy * math.sin(turn)
                v = -dx * math.sin(turn) + dy * math.cos(turn)
                a, b = scene.half_axes[n, e]
                if (u / a) ** 2 + (v / b) ** 2 <= 1:
                    seen = e + 1
            colour, angle, frequency, phase, _ = image_of(scene.waves, n, seen)
            along = column * math.cos(angle) + row * math.sin(angle)
            wave = math.cos(2 * math.pi * frequency * along + phase)
            if seen:
                label[row, column] = scene.texture[n, seen - 1] + 1
                wave = 1.2 * wave + 0.3
            value[:, row, column] += np.array(colour) * wave
    return value, label


def to_pixels(value, width):
    """Eight bits for the values from -width/2 to width/2."""
    return np.clip(np.round(255 * (0.5 + value / width)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [16, 20])
def test_gratings_equal_a_slow_renderer(size):
    scene, made = gratings_scene(3, size=size), bound_gratings(3, 3, size=size)
    fast = synthetic._render_gratings(scene)
    for n in range(3):
        slow = slow_gratings(scene, n)
        assert np.abs(fast[n] - slow).max() < 1e-12
        assert np.array_equal(made.image[n].numpy(), to_pixels(slow, 12))
    assert made.fine.tolist() == scene.fine.tolist()


def test_blobs_equal_a_slow_renderer():
    scene, made = blobs_scene(4), textured_blobs(4, 3)
    for n in range(4):
        slow, label = slow_blobs(scene, n)
        assert np.array_equal(made.image[n].numpy(), to_pixels(slow, 8))
        assert np.array_equal(made.label[n].numpy(), label)


def peak(image, padded=512):
    """Where the spectrum of a (height, width) image is largest: cycles a pixel, (x, y), x >= 0."""
    spectrum = np.abs(np.fft.rfft2(image - image.mean(), (padded, padded)))
    row, column = np.unravel_index(spectrum.argmax(), spectrum.shape)
    return column / padded, np.fft.fftfreq(padded)[row]


def distance(found, angle, frequency):
    """To the frequency of a wave, which is the same in both directions."""
    x, y = frequency * math.cos(angle), frequency * math.sin(angle)
    return min(math.hypot(found[0] - s * x, found[1] - s * y) for s in (1, -1))


def test_a_lone_grating_has_its_type_s_frequency_and_orientation():
    angle, frequency, colour = synthetic._grating_types(24, TASK_SEED)
    scene = gratings_scene(24, size=32)
    waves = scene.waves._replace(
        colour=np.concatenate([colour, np.zeros((24, 2, 3))], axis=1),
        angle=np.concatenate([angle, np.zeros((24, 2))], axis=1),
        frequency=np.concatenate([frequency, np.full((24, 2), 0.2)], axis=1),
        centre=np.full((24, 4, 2), 16.0),
    )
    for k in (0, 1):
        lone = waves.colour.copy()
        lone[:, 1 - k] = 0
        images = synthetic._render_gratings(
            scene._replace(waves=waves._replace(colour=lone), noise=np.zeros_like(scene.noise))
        )
        for n in range(24):
            strongest = np.abs(colour[n, k]).argmax()
            found = peak(images[n, strongest])
            assert distance(found, angle[n, k], frequency[n, k]) < 0.006
            # the channels are multiples of one wave, in the proportions of the colour
            shown = images[n].reshape(3, -1) / images[n, strongest].ravel()[None]
            expected = colour[n, k] / colour[n, k, strongest]
            assert np.median(shown, axis=1) == pytest.approx(expected)


def test_a_region_has_its_texture_s_frequency_and_orientation():
    scene = blobs_scene(20)
    scene = scene._replace(
        centre=np.full_like(scene.centre, 11.5),
        half_axes=np.full_like(scene.half_axes, 100.0),
        noise=np.zeros_like(scene.noise),
    )
    owner = synthetic._visible_ellipse(scene)
    assert (owner == 3).all()
    images = synthetic._render_blobs(scene, owner)
    for n in range(20):
        colour, angle, frequency, *_ = image_of(scene.waves, n, 3)
        strongest = np.abs(colour).argmax()
        window = np.hanning(24)[:, None] * np.hanning(24)
        value = images[n, strongest] / colour[strongest] - 0.3
        assert distance(peak(value * window), angle, frequency) < 0.01
        assert 1.1 < np.abs(value).max() <= 1.2 + 1e-9


def test_a_later_ellipse_hides_an_earlier_one():
    scene = blobs_scene(1)
    scene = scene._replace(
        centre=np.full((1, 3, 2), 12.0),
        half_axes=np.array([[[9.0, 9.0], [6.0, 3.0], [2.0, 2.0]]]),
        angle=np.array([[0.0, 0.0, 0.0]]),
        texture=np.array([[4, 0, 2]]),
    )
    label = synthetic._classes_of(scene, synthetic._visible_ellipse(scene))[0]
    across, down = label[12], label[:, 12]
    assert across.tolist() == [0] * 3 + [5] * 3 + [1] * 4 + [3] * 5 + [1] * 4 + [5] * 3 + [0] * 2
    assert down.tolist() == [0] * 3 + [5] * 6 + [1] + [3] * 5 + [1] + [5] * 6 + [0] * 2
    reversed_ = scene._replace(half_axes=scene.half_axes[:, ::-1])
    assert set(synthetic._visible_ellipse(reversed_).ravel()) == {0, 3}


def test_all_six_classes_are_seen():
    label = textured_blobs(200, 1).label
    shares = label.flatten().bincount(minlength=6) / label.numel()
    assert len(shares) == len(BLOB_CLASSES) == 6
    assert 0.5 < shares[0] < 0.8
    assert (shares[1:] > 0.035).all()
    assert (shares[1:] < 0.1).all()


# ------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize(
    ("made", "rendered", "mean", "std"),
    [
        (
            lambda: bound_gratings(64, 3).image,
            lambda: synthetic._render_gratings(gratings_scene(64)),
            GRATINGS_MEAN,
            GRATINGS_STD,
        ),
        (
            lambda: textured_blobs(64, 3).image,
            lambda: synthetic._render_blobs(
                blobs_scene(64), synthetic._visible_ellipse(blobs_scene(64))
            ),
            BLOBS_MEAN,
            BLOBS_STD,
        ),
    ],
)
def test_the_normalisation_gives_back_the_value(made, rendered, mean, std):
    pixels, value = made(), torch.from_numpy(rendered())
    inside = (pixels > 0) & (pixels < 255)
    given = (pixels.double() / 255 - mean) / std
    assert (given - value)[inside].abs().max() <= 0.5 / 255 / std + 1e-9


def test_next_to_nothing_is_clipped():
    for image in (bound_gratings(600, 4).image, textured_blobs(300, 4).image):
        assert float(((image == 0) | (image == 255)).double().mean()) < 1e-4


def test_noise_has_the_stated_spread():
    scene, pixels = gratings_scene(60), bound_gratings(60, 3).image
    clean = synthetic._render_gratings(scene._replace(noise=np.zeros_like(scene.noise)))
    noise = (pixels.double().numpy() / 255 - GRATINGS_MEAN) / GRATINGS_STD - clean
    assert noise.std() == pytest.approx(0.6, rel=0.02)
    scene, pixels = blobs_scene(30), textured_blobs(30, 3).image
    owner = synthetic._visible_ellipse(scene)
    clean = synthetic._render_blobs(scene._replace(noise=np.zeros_like(scene.noise)), owner)
    noise = (pixels.double().numpy() / 255 - BLOBS_MEAN) / BLOBS_STD - clean
    assert noise.std() == pytest.approx(0.5, rel=0.02)


# ---------------------------------------------------------------------------------- bad input


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="at least 1 image of at least 8 pixels, not 0 of 16"):
        bound_gratings(0, 0)
    with pytest.raises(ValueError, match="not 1 of 7"):
        bound_gratings(1, 0, size=7)
    with pytest.raises(ValueError, match="at least 1 image, not 0"):
        textured_blobs(0, 0)
    with pytest.raises(ValueError, match=r"one of \('coarse3', .*\), got 'coarse4'"):
        synthetic._types_and_labels("coarse4")
