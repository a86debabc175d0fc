"""KID, precision and recall against brute force; which images a score is of, and what its name says."""

from __future__ import annotations

import statistics
import warnings

import numpy as np
import pytest
import torch

from mlem.metrics import FID, FewImagesWarning, Measure, Score, kernel_distance, precision_recall
from mlem.metrics.kernel import SUBSETS
from mlem.metrics.neighbours import _ROWS
from tests.test_fid import digits, noise

few_images = pytest.mark.filterwarnings("ignore::mlem.metrics.fid.FewImagesWarning")


def points(n: int, seed: int, shift: float = 0.0, d: int = 12) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate, by sums over pairs."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    def within(z: np.ndarray) -> float:
        return sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (len(z) * (len(z) - 1))

    return within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


def test_kid_of_equal_counts_is_the_unbiased_estimate_of_all() -> None:
    x, y = points(30, 0), points(30, 1, shift=0.5)
    value, spread = kernel_distance(x, y)
    assert value == pytest.approx(mmd(x.numpy(), y.numpy()), rel=1e-10)
    assert spread == pytest.approx(0, abs=1e-10)


def test_kid_is_the_mean_over_its_fixed_subsets() -> None:
    x, y = points(25, 0), points(40, 1, shift=0.5)
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(SUBSETS):
        real = y[torch.randperm(40, generator=generator)[:25]]
        torch.randperm(25, generator=generator)  # all of x, in some order
        values.append(mmd(x.numpy(), real.numpy()))
    assert kernel_distance(x, y) == pytest.approx((statistics.fmean(values), statistics.pstdev(values)), rel=1e-9)
    before = torch.get_rng_state()
    assert kernel_distance(x, y) == kernel_distance(x, y)
    assert torch.equal(before, torch.get_rng_state())


def test_kid_is_unbiased_where_fid_is_not() -> None:
    values, distances = [], []
    for seed in range(60):
        x, y = points(20, 2 * seed), points(20, 2 * seed + 1)
        values.append(kernel_distance(x, y)[0])
        distances.append(float((x.mean(0) - y.mean(0)).square().sum()))
    error = statistics.stdev(values) / len(values) ** 0.5
    assert abs(statistics.fmean(values)) < 3 * error
    assert statistics.fmean(distances) > 10 * statistics.stdev(distances) / len(values) ** 0.5


def test_kid_takes_no_more_than_its_subset_size(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = points(60, 0), points(50, 1, shift=0.5)
    monkeypatch.setattr("mlem.metrics.kernel.SUBSET_SIZE", 10)
    value, spread = kernel_distance(x, y)
    assert spread > 0
    assert value == pytest.approx(mmd(x.numpy(), y.numpy()), abs=4 * spread / SUBSETS**0.5)


def share_inside(points_: np.ndarray, members: np.ndarray) -> float:
    """Equation 1 of the paper, k = 3, one pair at a time."""

    def radius(i: int) -> float:
        return sorted(np.linalg.norm(members[i] - members[j]) for j in range(len(members)) if j != i)[2]

    radii = [radius(i) for i in range(len(members))]
    return statistics.fmean(
        any(np.linalg.norm(point - member) <= r for member, r in zip(members, radii, strict=True)) for point in points_
    )


@pytest.mark.parametrize(("n", "m", "rows"), [(30, 30, _ROWS), (37, 22, 5), (4, 50, 7)])
def test_precision_and_recall_by_brute_force(n: int, m: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlem.metrics.neighbours._ROWS", rows)
    x, y = points(n, 0, d=3), points(m, 1, shift=0.8, d=3)
    precision, recall = precision_recall(x, y)
    assert precision == pytest.approx(share_inside(x.numpy(), y.numpy()), abs=1e-12)
    assert recall == pytest.approx(share_inside(y.numpy(), x.numpy()), abs=1e-12)
    assert 0 < precision < 1


def test_precision_sees_quality_and_recall_variety() -> None:
    real = points(200, 0, d=4)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 100, real) == (0, 0)
    precision, recall = precision_recall(0.1 * points(200, 1, d=4), real)
    assert precision > 0.95
    assert recall < 0.05


def measure(fid: FID, count: int = 400, **options) -> Measure:
    reals = [(range(count), digits()[:count])]
    return Measure(fid, reals, {"count": count}, **options)


def scores_of(images: torch.Tensor, **options) -> list[Score]:
    one = measure(FID(keep=Measure.keeps(**options)), **options)
    fid = one.start("cpu")
    fid.update(images, range(len(images)))
    return one.scores(fid, expected=len(images))


@few_images
def test_everything_comes_from_the_features_of_fid() -> None:
    images = digits()[600:900]
    fid, kid, precision, recall = scores_of(images, kid=True, precision_recall=True)
    network = FID().network
    pixels = [((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8) for x in (images, digits()[:400])]
    generated, real = (network(x) for x in pixels)
    assert scores_of(images) == [fid]
    assert (kid.value, kid.spread) == pytest.approx(kernel_distance(generated, real), rel=1e-9)
    assert (precision.value, recall.value) == precision_recall(generated, real)
    assert [score.name for score in (fid, kid, precision, recall)] == [
        f"{kind}_random256@300" for kind in ("fid", "kid", "precision", "recall")
    ]
    assert {(score.count, score.real_count) for score in (fid, kid, precision, recall)} == {(300, 400)}
    assert (kid.parts, fid.spread) == ("100 subsets", None)


@few_images
def test_blocks_are_runs_of_indices_named_by_their_count() -> None:
    images = digits()[600:902]
    found = {score.name: score for score in scores_of(images, precision_recall=True, blocks=3)}
    assert list(found) == [f"{kind}_random256@{n}" for n in (302, 100) for kind in ("fid", "precision", "recall")]
    alone = [scores_of(images[i : i + 100], precision_recall=True) for i in (0, 100, 200)]  # the last two left out
    for kind, parts in zip(("fid", "precision", "recall"), zip(*alone, strict=True), strict=True):
        score, values = found[f"{kind}_random256@100"], [part.value for part in parts]
        assert score.value == pytest.approx(statistics.fmean(values), rel=1e-9)
        assert score.spread == pytest.approx(statistics.stdev(values), rel=1e-6)
        assert (score.count, score.parts) == (100, "3 blocks")
    assert found["fid_random256@100"].value > found["fid_random256@302"].value  # the bias of small counts


def test_few_images_in_a_block_are_warned_of_by_its_count() -> None:
    one = measure(FID(keep=True), blocks=2)
    fid = one.start("cpu")
    fid.update(digits()[:300], range(300))
    with pytest.warns(FewImagesWarning, match="fid_random256@150: 150 generated and 400 real images for 256 features"):
        one.scores(fid)


def test_features_are_kept_only_where_they_are_needed() -> None:
    assert not Measure.keeps()
    for options in ({"kid": True}, {"precision_recall": True}, {"blocks": 2}):
        assert Measure.keeps(**options)
    fid = measure(FID()).start("cpu")
    fid.update(digits()[:300])
    assert fid.bank.gather().shape == fid.real_bank.gather().shape == (0, 256)


@pytest.mark.parametrize(
    ("options", "count", "says"),
    [
        ({}, 1, "fid_random256 needs at least 2 images, got 1"),
        ({"precision_recall": True}, 3, "metric.precision_recall=true needs at least 4 images, got 3"),
        ({"precision_recall": True, "blocks": 6}, 20, r"metric.blocks must be in \[1, 5\] for 20 images, got 6"),
        ({"blocks": 11}, 20, r"metric.blocks must be in \[1, 10\] for 20 images, got 11"),
    ],
)
def test_too_few_images_are_refused_before_anything_is_computed(options: dict, count: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        measure(FID(), **options).check(count)
    if options.get("precision_recall"):
        with pytest.raises(ValueError, match="at least 4 reference images, got 3"):
            measure(FID(), count=3, precision_recall=True).check(20)


def test_features_need_an_index_each_and_each_once() -> None:
    fid = FID(keep=True)
    for indices, told in ((None, "none"), (range(3), "3")):
        with pytest.raises(ValueError, match=f"4 images need as many, got {told}"):
            fid.update(noise(4), indices)
    fid.update(noise(4), range(4))
    fid.update(noise(2), [9, 3])
    with pytest.raises(ValueError, match="image 3 was added twice"):
        fid.bank.gather()
    fid.reset()
    assert len(fid.bank.gather()) == 0


def test_a_fresh_one_shares_network_and_reference_and_leaves_the_first_alone() -> None:
    one = measure(FID(keep=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = one.start("cpu"), one.start("cpu")
    first.update(noise(5), range(5))
    assert first.network is second.network is one.fid.network
    kept, same = (vars(bank)["_features"][-1] for bank in (first.real_bank, second.real_bank))
    assert kept is same
    assert [len(fid.bank.gather()) for fid in (first, second, one.fid)] == [5, 0, 0]
    assert int(one.fid.metric.fake_features_num_samples) == 0
