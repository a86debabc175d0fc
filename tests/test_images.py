"""Pictures side by side: exact pixels, one-line refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlem.images import GUTTER, image_grid


def test_grid_pixels_are_exact():
    images = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 1, 2).clone()
    images[2, 0, 0, 1] = -5.0
    g = GUTTER
    expected = np.full((2 + 2 * (2 + 2), 2 + 2 * (4 + 2)), g, dtype=np.uint8)
    expected[2:4, 2:6] = 0
    expected[2:4, 8:12] = 128  # 127.5 rounds to the even neighbour
    expected[6:8, 2:4], expected[6:8, 4:6] = 255, 0
    grid = image_grid(images, columns=2, scale=2)
    assert grid.mode == "L"
    np.testing.assert_array_equal(np.asarray(grid), expected)


def test_grid_keeps_colours_and_sides():
    images = torch.zeros(1, 3, 8, 16, dtype=torch.uint8)
    images[0, 0, 0, 15] = 255  # red in the upper right corner
    grid = image_grid(images)
    assert grid.mode == "RGB"
    assert grid.size == (16 * 8 + 4, 8 * 8 + 4)
    assert grid.getpixel((2 + 128 - 1, 2)) == (255, 0, 0)
    assert grid.getpixel((2, 2)) == (0, 0, 0)
    assert grid.getpixel((1, 1)) == (GUTTER, GUTTER, GUTTER)


def test_grid_is_nearly_square_by_default():
    side = 64 + 2
    assert image_grid(torch.zeros(10, 1, 64, 64)).size == (4 * side + 2, 3 * side + 2)


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (1, 8, 8), (2, 2, 8, 8)])
def test_grid_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"images must be \(N, C, H, W\)"):
        image_grid(torch.zeros(shape))


@pytest.mark.parametrize("bad", [{"columns": 0}, {"scale": 0}])
def test_grid_refuses_zero_columns_or_scale(bad):
    with pytest.raises(ValueError, match="must be >= 1"):
        image_grid(torch.zeros(1, 1, 8, 8), **bad)
