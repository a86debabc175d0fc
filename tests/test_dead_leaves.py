"""Dead leaves: the rasteriser against brute force, and the laws of radii, overlaps and colours."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq

from mlem.data.datasets.dead_leaves import DeadLeaves, nearest_disk, power_law_radii


def test_radii_follow_the_power_law():
    r_min, r_max, n = 1.0, 16.0, 200_000
    logs = np.log(power_law_radii(np.random.default_rng(0).random(n), r_min, r_max) / r_min)
    top = math.log(r_max / r_min)
    assert logs.min() >= 0
    assert logs.max() <= top
    # r^-a between bounds: log r is exponential with rate a - 1, cut at `top`; fit a by maximum likelihood
    rate = brentq(lambda rate: 1 / rate - top / math.expm1(rate * top) - logs.mean(), 0.1, 10)
    standard_error = 1 / (logs.std() * math.sqrt(n))
    assert abs(rate + 1 - 3) < 4 * standard_error
    assert standard_error < 0.01


def test_nearest_disk_equals_brute_force():
    rng = np.random.default_rng(1)
    size = 20
    centre = np.arange(size) + 0.5
    for disks in (1, 5, 60, 400):
        x, y = rng.uniform(-8, size + 8, (2, disks))
        r = rng.uniform(0.1, 8, disks)
        inside = (centre - x[:, None, None]) ** 2 + (centre[:, None] - y[:, None, None]) ** 2 <= r[:, None, None] ** 2
        expected = np.where(inside.any(0), inside.argmax(0), -1)
        np.testing.assert_array_equal(nearest_disk(x, y, r, size).reshape(size, size), expected)


@pytest.mark.parametrize("distance", [1, 3, 7])
def test_two_pixels_share_a_leaf_as_often_as_the_law_says(distance):
    """P(same leaf at distance d) = A(d) / (2 A(0) - A(d)), A(d) the mean overlap of a disk with itself moved by d."""
    r_min, r_max = 1.0, 8.0

    def overlap(r: float) -> float:
        if distance >= 2 * r:
            return 0.0
        return 2 * r**2 * math.acos(distance / (2 * r)) - distance / 2 * math.sqrt(4 * r**2 - distance**2)

    kink = min(max(distance / 2, r_min), r_max)
    shared = sum(quad(lambda r: overlap(r) * r**-3, *ends)[0] for ends in ((r_min, kink), (kink, r_max)))
    alone = math.pi * math.log(r_max / r_min)
    images = DeadLeaves(size=16, r_min=r_min, r_max=r_max, seed=11).build().images(0, 1500)
    for columns in (16, distance + 1):  # pairs everywhere, and from the border inwards: one law
        pixels = images[:, :, :columns]
        same = (pixels[:, :, distance:] == pixels[:, :, :-distance]).all(-1).mean((1, 2))
        standard_error = same.std() / math.sqrt(len(same))
        assert abs(same.mean() - shared / (2 * alone - shared)) < 4 * standard_error
        assert standard_error < 0.01


def test_image_depends_on_seed_and_index_only():
    images = DeadLeaves(size=12, seed=4).build().images(0, 40)
    for start, stop in ((0, 1), (7, 19), (39, 40)):
        np.testing.assert_array_equal(DeadLeaves(size=12, seed=4).build().images(start, stop), images[start:stop])
    assert len({image.tobytes() for image in images}) == 40
    others = DeadLeaves(size=12, seed=5).build().images(0, 40)
    assert not {image.tobytes() for image in others} & {image.tobytes() for image in images}


def test_colours_are_uniform():
    images = DeadLeaves(size=16, seed=2).build().images(0, 1000).astype(float)
    means = images.mean((1, 2))  # one independent mean an image
    standard_error = means.std(0) / math.sqrt(len(means))
    assert (np.abs(means.mean(0) - 127.5) < 4 * standard_error).all()
    assert (images.min(), images.max()) == (0, 255)
