"""FID: exact answers, independence of ranks, names, guards, and the cache of reference sums."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mlem.metrics import (
    FID,
    FewImagesWarning,
    Measure,
    RandomFeatures,
    frechet_distance,
    reference_path,
    reference_statistics,
)

few_images = pytest.mark.filterwarnings("ignore::mlem.metrics.fid.FewImagesWarning")


class TableFeatures(nn.Module):
    """Feature space itself: the first two pixels of an image are the number of a row of a table."""

    protocol = "table"

    def __init__(self, table):
        super().__init__()
        self.table, self.num_features = table, table.shape[1]

    def forward(self, images):
        return self.table[images[:, 0, 0, 0].long() * 256 + images[:, 0, 0, 1].long()]


def numbered_images(numbers):
    images = torch.zeros(len(numbers), 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers // 256, numbers % 256
    return images


def exact_samples(n, mean, cov, seed):
    """n points whose sample mean is `mean` and unbiased sample covariance is `cov`, to round-off."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    return mean + (torch.linalg.cholesky(cov) @ white).T


def spd(d, seed):
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


def fid_of_points(real, generated):
    fid = FID(TableFeatures(torch.cat([real, generated])))
    fid.update_real(numbered_images(torch.arange(len(real))))
    fid.update(numbered_images(torch.arange(len(generated)) + len(real)))
    return fid.compute()


def digits():
    """The 1,797 real digits in [-1, 1]: (N, 1, 8, 8), float32."""
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32)[:, None]


def noise(n, seed=0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_two_gaussians_with_one_eigenbasis():
    """Commuting covariances by hand: |m1 - m2|^2 + sum (sqrt(a) - sqrt(b))^2."""
    d = 12
    basis = torch.linalg.eigh(spd(d, 0))[1]
    a, b = torch.linspace(0.1, 4, d, dtype=torch.float64), torch.linspace(3, 0.5, d, dtype=torch.float64)
    mean = torch.linspace(-1, 1, d, dtype=torch.float64)
    real = exact_samples(150, mean, basis @ a.diag() @ basis.T, seed=1)
    generated = exact_samples(90, 3 * mean, basis @ b.diag() @ basis.T, seed=2)
    expected = float((4 * mean**2).sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert fid_of_points(real, generated).value == pytest.approx(expected, rel=1e-10)


def test_two_general_gaussians():
    """Covariances that do not commute, against the matrix square root of scipy."""
    from scipy.linalg import sqrtm

    mean_1, mean_2, cov_1, cov_2 = torch.zeros(10).double(), torch.ones(10).double(), spd(10, 3), spd(10, 4)
    assert (cov_1 @ cov_2 - cov_2 @ cov_1).norm() > 1
    root = sqrtm((cov_1 @ cov_2).numpy())
    expected = 10 + float(cov_1.trace() + cov_2.trace()) - 2 * np.trace(root).real
    real, generated = exact_samples(300, mean_1, cov_1, seed=5), exact_samples(64, mean_2, cov_2, seed=6)
    assert fid_of_points(real, generated).value == pytest.approx(expected, rel=1e-10)
    assert float(frechet_distance(mean_1, cov_1, mean_2, cov_2)) == pytest.approx(expected, rel=1e-10)


@few_images
@pytest.mark.parametrize("count", [2, 20, 900])
def test_equals_torchmetrics_also_where_the_covariance_is_singular(count):
    real, generated = digits()[:count], noise(count)
    fid = FID()
    fid.update_real(real)
    fid.update(generated)
    value = fid.compute().value
    assert math.isfinite(value)
    assert value == pytest.approx(float(fid.metric.compute()), rel=1e-6)


def test_real_against_real_is_zero():
    fid = FID()
    fid.update_real(digits())
    fid.update(digits())
    assert abs(fid.compute().value) < 1e-10


def test_tells_digits_from_noise_and_sees_layout_and_colour():
    real = digits()
    fid = FID()
    fid.update_real(real[::2])
    values = {}
    changed = {"digits": real[1::2], "flipped": real[1::2].flip(3), "noise": noise(898), "darker": real[1::2] - 0.2}
    for name, images in changed.items():
        fid.reset()
        fid.update(images)
        values[name] = fid.compute().value
    assert values["flipped"] > 10 * values["digits"]
    assert values["darker"] > 3 * values["digits"]
    assert values["noise"] > 30 * values["digits"]
    colour = RandomFeatures(3, 16)
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    image[:, 0] = 255
    assert (colour(image) - colour(image.roll(1, 1))).abs().max() > 0.1


PINNED = [-0.03912120096866415, 0.2083760772076611, -0.07594661488438943]


def test_random_features_are_pinned():
    """The protocol is its weights: another generator or architecture needs another name."""
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8) * 4
    features = RandomFeatures(1, 8)(image)
    assert features.shape == (1, 256)
    assert features[0, [0, 100, 255]].tolist() == pytest.approx(PINNED, rel=1e-9)


def test_random_features_leave_the_global_generator_alone_and_ignore_batches():
    before = torch.get_rng_state()
    features = RandomFeatures(3, 11)
    assert torch.equal(before, torch.get_rng_state())
    images = torch.randint(0, 256, (7, 3, 11, 13), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    together, apart = features(images), torch.cat([features(image[None]) for image in images])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_random_features_are_not_degenerate():
    features = RandomFeatures(1, 8)(((digits() + 1) * 127.5).round().to(torch.uint8))
    values = torch.linalg.eigvalsh(torch.cov(features.T)).flip(0)
    assert values[100] > 1e-4 * values[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomFeatures(1, 7), "at least 8x8, got size 7"),
        (lambda: RandomFeatures(0, 8), "channels must be >= 1"),
        (lambda: RandomFeatures(1, 8)(torch.zeros(1, 1, 8, 8)), "got torch.float32"),
        (lambda: RandomFeatures(1, 8)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), r"\(1, 3, 8, 8\)"),
        (lambda: RandomFeatures(1, 8)(torch.zeros(1, 1, 8, 4, dtype=torch.uint8)), "need at least 8x8"),
        (lambda: FID("resnet"), "got 'resnet'"),
        (lambda: FID("inception", (4, 8, 8)), "1 or 3 channels"),
        (lambda: FID().update(torch.zeros(2, 3, 8, 8)), r"images \(1, 8, 8\), got a batch \(2, 3, 8, 8\)"),
        (lambda: FID().update(torch.full((2, 1, 8, 8), math.nan)), "sample 0 of 2"),
    ],
)
def test_refusals_name_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@few_images
def test_out_of_range_values_clamp_and_png_equals_tensor(tmp_path):
    wild = noise(40, seed=3) * 2
    assert wild.abs().max() > 3
    values = []
    for index, image in enumerate(wild):
        pixels = np.clip(np.rint((image[0].double().numpy().clip(-1, 1) + 1) * 127.5), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    read = np.stack([np.asarray(Image.open(tmp_path / f"{index}.png")) for index in range(len(wild))])
    for images in (wild, wild.clamp(-1, 1), torch.from_numpy(read)[:, None]):
        fid = FID()
        fid.update_real(digits()[:300])
        fid.update(images)
        values.append(fid.compute().value)
    assert values[0] == values[1] == values[2]


def test_name_carries_protocol_and_count_and_few_images_warn_once():
    fid = FID()
    fid.update_real(digits()[:300])
    fid.update(digits()[300:550])
    with pytest.warns(FewImagesWarning, match="fid_random256@250: 250 generated and 300 real images for 256 features"):
        result = fid.compute()
    assert (result.name, result.count, result.real_count) == ("fid_random256@250", 250, 300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fid.compute()
        fid.update(digits()[550:556])
        assert fid.compute().name == "fid_random256@256"


@few_images
def test_fewer_images_than_asked_or_than_two_are_refused():
    fid = FID()
    fid.update_real(digits()[:10])
    for count, batch in ((0, 0), (1, 1)):
        fid.update(digits()[:batch])
        with pytest.raises(ValueError, match=f"at least 2 images on each side, got {count} generated and 10 real"):
            fid.compute()
    fid.update(digits()[:4])
    with pytest.raises(ValueError, match="fid_random256: expected 6 generated images, got only 5"):
        fid.compute(expected=6)
    assert fid.compute(expected=5).count == 5


@few_images
def test_reset_keeps_the_reference_unless_told():
    fid = FID()
    fid.update_real(digits()[:20])
    fid.update(noise(5))
    fid.reset()
    fid.update(digits()[:20])
    assert fid.compute().count == fid.compute().real_count == 20
    fid.reset(real=True)
    fid.update(digits()[:20])
    with pytest.raises(ValueError, match="20 generated and 0 real"):
        fid.compute()


KEY = {"data": "digits", "manifest": "abc", "size": 8, "count": 300}


def unread():
    raise AssertionError("the real images were read")
    yield


def real_batches(start, stop, size=128):
    for first in range(start, stop, size):
        last = min(first + size, stop)
        yield range(first, last), digits()[first:last]


@few_images
def test_reference_sums_are_cached_and_not_read_again(tmp_path):
    fresh, cached = FID(), FID()
    assert not reference_statistics(real_batches(0, 300), fresh, tmp_path / "cache", KEY)
    assert reference_statistics(unread(), cached, tmp_path / "cache", KEY)
    for fid in (fresh, cached):
        fid.update(noise(300))
    assert cached.compute() == fresh.compute()
    assert cached.compute().real_count == 300
    path = reference_path(tmp_path / "cache", fresh, KEY)
    assert list((tmp_path / "cache").iterdir()) == [path]
    assert path.name.startswith("random256@300_")


@few_images
def test_references_of_other_keys_stand_side_by_side_and_damaged_ones_are_made_again(tmp_path):
    other = {**KEY, "manifest": "def"}
    reference_statistics(real_batches(0, 300), FID(), tmp_path, KEY)
    assert not reference_statistics(real_batches(300, 600), FID(), tmp_path, other)
    wide, tables = FID(image_shape=(1, 16, 16)), FID(TableFeatures(torch.zeros(1, 4)))
    for fid, key in ((wide, KEY), (tables, KEY), (FID(), {**KEY, "count": 299})):
        with pytest.raises(AssertionError, match="were read"):
            reference_statistics(unread(), fid, tmp_path, key)
    assert reference_statistics(unread(), FID(), tmp_path, KEY)
    path = reference_path(tmp_path, FID(), KEY)
    for damaged in (path.read_bytes()[:100], reference_path(tmp_path, FID(), other).read_bytes()):
        path.write_bytes(damaged)
        assert not reference_statistics(real_batches(0, 300), FID(), tmp_path, KEY)
        assert reference_statistics(unread(), FID(), tmp_path, KEY)


def test_kept_features_are_cached_with_the_sums(tmp_path):
    sums, kept, again = FID(), FID(keep=True), FID(keep=True)
    reference_statistics(real_batches(0, 300), sums, tmp_path, KEY)
    assert not reference_statistics(real_batches(0, 300), kept, tmp_path, KEY)  # the file had sums alone
    assert reference_statistics(unread(), again, tmp_path, KEY)
    assert reference_statistics(unread(), FID(), tmp_path, KEY)
    assert torch.equal(again.real_bank.gather(), kept.real_bank.gather())


def test_reference_sums_guard_their_count(tmp_path):
    fid = FID()
    with pytest.raises(ValueError, match="should hold 300 images, but 299 were read"):
        reference_statistics(real_batches(0, 299), fid, tmp_path, KEY)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"call fid\.reset\(real=True\) first"):
        reference_statistics(real_batches(0, 300), fid, None, KEY)


CUTS = {2: (0, 133, 401), 3: (0, 150, 150, 401)}  # of 401 images; one rank has none


def fid_on_ranks(rank, folder):
    """One process of three: with all of them, then the first two again in a group of two."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for ranks, cuts in CUTS.items():
        if rank >= ranks:
            continue
        rendezvous = f"file://{folder}/meet{ranks}"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
        share = slice(cuts[rank], cuts[rank + 1])
        results = {}
        for name in ("read", "cached"):
            fid = FID()
            reals = [(range(401)[share], digits()[:401][share])]
            cached = reference_statistics(reals, fid, folder / str(ranks), {"count": 401})
            assert cached == (name == "cached")
            fid.update(noise(401)[share])
            result = fid.compute(expected=401)
            results[name] = [result.name, result.value, result.real_count]
        results["scores"] = [some_scores(folder / f"kept{ranks}", rank, ranks) for _ in range(2)]
        from mlem.metrics import PathwiseError

        error = PathwiseError()
        error.update(noise(401)[share], digits()[:401][share])
        results["pathwise"] = error.compute()
        (folder / f"{ranks}-{rank}.json").write_text(json.dumps(results))
        torch.distributed.destroy_process_group()


def some_scores(folder, rank=0, ranks=1):
    """Everything, of 53 images against 61, read from the end by rank 0; the last rank of three has none."""
    share = slice(rank, None, 2) if ranks == 3 else slice(rank, None, ranks)
    mine, reals = ([], []) if rank == 2 else (list(range(53))[share], list(range(61))[share])
    if rank == 0:
        mine.reverse()
    batches = [(part, digits()[part]) for part in (reals[:9], reals[9:])]
    measure = Measure(FID(keep=True), batches, {"count": 61}, folder, kid=True, precision_recall=True, blocks=4)
    for _ in range(2):  # the second start reads nothing
        fid = measure.start("cpu")
        for part in (mine[:20], mine[20:]):
            fid.update(some_noise()[part], part)
        scores = measure.scores(fid, expected=53)
    return [[score.name, score.real_count, score.value, score.spread or 0.0] for score in scores]


def some_noise():
    """Noise in part, so that precision and recall are neither 0 nor 1."""
    return digits()[700:753] + 0.3 * noise(53)


def test_one_two_and_three_ranks_agree(tmp_path):
    fid = FID()
    fid.update_real(digits()[:401])
    fid.update(noise(401))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewImagesWarning)
        scores = some_scores(tmp_path / "kept1")
    assert [name for name, *_ in scores] == [
        f"{kind}_random256@{count}" for count in (53, 13) for kind in ("fid", "kid", "precision", "recall")
    ]
    assert 0 < scores[2][2] < 1
    assert 0 < scores[3][2] < 1
    expected = fid.compute()
    from mlem.metrics import pathwise_error

    # forked, so that they need no imports
    torch.multiprocessing.start_processes(fid_on_ranks, (tmp_path,), nprocs=3, start_method="fork")
    for ranks in CUTS:
        for rank in range(ranks):
            results = json.loads((tmp_path / f"{ranks}-{rank}.json").read_text())
            for name, value, real_count in (results["read"], results["cached"]):
                assert (name, real_count) == (expected.name, expected.real_count) == ("fid_random256@401", 401)
                assert value == pytest.approx(expected.value, rel=1e-12)
            for one, two, again in zip(scores, *results["scores"], strict=True):
                for value, other in ((two, one), (again, one)):
                    assert value[:2] == other[:2]
                    assert value[2:] == pytest.approx(other[2:], rel=1e-6)
            assert results["pathwise"] == pytest.approx(pathwise_error(noise(401), digits()[:401]), rel=1e-12)
