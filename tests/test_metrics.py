"""Quantisation, the pathwise error, PSNR and SSIM."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from mlem.metrics import ImageMean, PathwiseError, pathwise_error, psnr, quantise, ssim


def test_quantise_rounds_and_clamps():
    # (x + 1) * 127.5: 0.4 below and 0.6 above an integer tell rounding from truncation
    x = torch.tensor([[-1.0, 1.0, -7.0, 7.0, 100.6 / 127.5 - 1, 100.4 / 127.5 - 1]])
    assert quantise(x).tolist() == [[0, 255, 0, 255, 101, 100]]
    assert quantise(x).dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_quantise_inverts_every_pixel_value(dtype):
    pixels = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(quantise((pixels.double() / 127.5 - 1).to(dtype)), pixels)


def test_quantise_agrees_with_png(tmp_path):
    pixels = quantise(torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) * 3 - 1.5)
    Image.fromarray(pixels[0].numpy()).save(tmp_path / "image.png")
    read = np.asarray(Image.open(tmp_path / "image.png"))
    assert torch.equal(torch.from_numpy(read.copy()), pixels[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_quantise_names_the_sample_that_is_not_finite(value):
    x = torch.zeros(4, 1, 8, 8)
    x[2, 0, 3, 3] = value
    with pytest.raises(ValueError, match="sample 2 of 4"):
        quantise(x)


def test_quantise_refuses_integers():
    with pytest.raises(ValueError, match=r"torch\.int64"):
        quantise(torch.ones(2, 3, dtype=torch.int64))


def test_importing_metrics_loads_neither_torchmetrics_nor_lightning():
    code = "import sys, mlem.metrics; print([m for m in ('torch', 'torchmetrics', 'lightning') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_public_name_is_found():
    import mlem.metrics

    assert all(getattr(mlem.metrics, name).__name__ == name for name in mlem.metrics.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fid_score'"):
        _ = mlem.metrics.fid_score


def test_pathwise_error_by_hand():
    # per-sample errors: (1 + 9)/2 = 5, (4 + 4)/2 = 4, 0; mean 3, variance (4 + 1 + 9)/2 = 7
    x = torch.tensor([[1.0, 3.0], [2.0, -2.0], [5.0, 5.0]])
    reference = torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 5.0]])
    mse, standard_error = pathwise_error(x, reference)
    assert mse == pytest.approx(3.0, abs=1e-14)
    assert standard_error == pytest.approx(math.sqrt(7 / 3), rel=1e-14)


def test_pathwise_error_is_float64_inside():
    # the square of 1 + 2^-20 needs more bits than float32 has
    x = torch.full((2, 4), 1 + 2.0**-20)
    assert pathwise_error(x, torch.zeros(2, 4))[0] == (1 + 2.0**-20) ** 2


def test_standard_error_is_the_spread_of_the_mean():
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randn(400, 100, 3, generator=generator)
    results = torch.tensor([pathwise_error(block, torch.zeros_like(block)) for block in blocks])
    # the standard deviation of 400 block means is known to 1/sqrt(800) = 3.5 %: 5 standard errors allowed
    assert float(results[:, 0].std() / results[:, 1].mean()) == pytest.approx(1, abs=5 / math.sqrt(800))


def test_pathwise_error_refuses():
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3, 1\)"):
        pathwise_error(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"at least 2 dimensions, got \(3,\)"):
        pathwise_error(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        pathwise_error(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="sample 1 of 2"):
        pathwise_error(torch.tensor([[0.0], [math.nan]]), torch.zeros(2, 1))


def test_accumulated_error_equals_one_pass():
    generator = torch.Generator().manual_seed(2)
    x, reference = torch.randn(2, 101, 1, 8, 8, generator=generator)
    metric = PathwiseError()
    for rows in (slice(0, 1), slice(1, 70), slice(70, 70), slice(70, 101)):
        metric.update(x[rows], reference[rows])
    assert metric.compute() == pytest.approx(pathwise_error(x, reference), rel=1e-12)
    metric.reset()
    metric.update(x[:0], reference[:0])
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        metric.compute()


@pytest.mark.parametrize("count", range(2, 30))  # some of these round the variance to below zero
def test_equal_errors_have_no_standard_error(count):
    metric = PathwiseError()
    metric.update(torch.full((count, 3), 0.3, dtype=torch.float64), torch.zeros(count, 3))
    mse, standard_error = metric.compute()
    assert mse == pytest.approx(0.09, rel=1e-14)
    assert 0 <= standard_error < 1e-8


def alike(count, channels, height, width):
    """Pictures in [-1.2, 1.2] and others near them, float64."""
    generator = torch.Generator().manual_seed(3)
    x, z = torch.rand(2, count, channels, height, width, generator=generator, dtype=torch.float64)
    return 2.4 * x - 1.2, 2.4 * x - 1.2 + 0.3 * (z - 0.5)


def test_psnr_by_hand():
    x = torch.zeros(3, 1, 2, 2)
    y = torch.tensor([0.0, 0.02, -7.0])[:, None, None, None].expand(3, 1, 2, 2)
    # the range is 2, and -7 is shown as -1
    assert psnr(x, y).tolist() == pytest.approx([math.inf, 10 * math.log10(4 / 0.02**2), 10 * math.log10(4)], rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "radius", "sigma"),
    [((3, 16, 16), 5, 1.5), ((1, 28, 28), 5, 1.5), ((1, 8, 8), 3, 0.9), ((2, 12, 5), 2, 0.6)],
)
def test_ssim_is_that_of_the_paper_in_a_window_that_fits(shape, radius, sigma):
    x, y = alike(9, *shape)

    def blurred(images):
        return gaussian_filter(images, sigma, mode="mirror", radius=radius, axes=(2, 3))

    a, b = (images.clamp(-1, 1).numpy() for images in (x, y))
    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b, cov = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2, blurred(a * b) - mean_a * mean_b
    c_1, c_2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    top, bottom = (2 * mean_a * mean_b + c_1) * (2 * cov + c_2), (mean_a**2 + mean_b**2 + c_1) * (var_a + var_b + c_2)
    expected = (top / bottom).mean((1, 2, 3))
    assert 0.2 < expected.min() < expected.max() < 0.99
    np.testing.assert_allclose(ssim(x, y), expected, rtol=1e-10)
    np.testing.assert_allclose(ssim(x, x), np.ones(9), rtol=1e-12)


def test_similarities_of_an_image_know_no_batch():
    x, y = alike(19, 1, 8, 8)
    for measure in (psnr, ssim):
        whole = ImageMean(measure)
        whole.update(x, y)
        parts = ImageMean(measure)
        for rows in (slice(0, 1), slice(1, 12), slice(12, 12), slice(12, 19)):
            parts.update(x[rows], y[rows])
        assert torch.equal(torch.cat(parts.values), torch.cat(whole.values))
        assert parts.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_similarities_refuse():
    x = torch.zeros(2, 1, 8, 8)
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match=r"both be \(N, C, H, W\), got \(2, 1, 8, 8\) and \(2, 1, 8, 7\)"):
            measure(x, x[..., :7])
    with pytest.raises(ValueError, match="at least 3x3, got"):
        ssim(x[..., :2], x[..., :2])


def test_a_picture_that_is_its_reference_has_a_psnr_without_end():
    mean = ImageMean(psnr)
    mean.update(torch.zeros(2, 1, 8, 8), torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 8, 8))
    value, error = mean.compute()
    assert (value, math.isnan(error)) == (math.inf, True)
