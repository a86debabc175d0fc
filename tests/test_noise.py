"""Keyed noise and Brownian paths: known answers, independence of the batch, and their laws.

Statistical tests fix the seed; tolerances are in standard errors of the estimate.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlem.brownian import BrownianPath
from mlem.noise import GOLDEN, RESERVED, USER_INDICES, NoiseStream, mix, reserved_indices
from mlem.schedule import NoiseSchedule
from tests.problems import SCHEDULES

COSINE = NoiseSchedule.cosine()
SAMPLES = 20_000


def indices(count: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + count)


def brownian(
    count: int, shape: tuple[int, ...] = (1,), seed: int = 0, schedule: NoiseSchedule = COSINE
) -> BrownianPath:
    return BrownianPath(schedule, seed, indices(count), shape, torch.float64)


def assert_correlation(a: Tensor, b: Tensor, expected: float = 0.0) -> None:
    """Correlation of two standard normals within 4 standard errors of `expected`."""
    a, b = a.double().flatten(), b.double().flatten()
    error = ((1 + expected**2) / len(a)) ** 0.5
    assert abs((a * b).mean().item() - expected) < 4 * error


# --- the generator -------------------------------------------------------------------------------------------------


def test_splitmix64_known_answers() -> None:
    known = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    words = mix(1234567 + torch.arange(1, 6) * GOLDEN)
    assert [word % 2**64 for word in words.tolist()] == known


def test_mix_leaves_its_argument_alone() -> None:
    words = torch.arange(5)
    mix(words)
    assert torch.equal(words, torch.arange(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 8, 8), (3, 5, 7), (3, 16, 16), (1023,)])
def test_noise_of_an_index_does_not_know_its_batch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    stream = NoiseStream(7, "start")
    alone = torch.stack([stream.normal(indices(1, i), [0], shape, dtype)[0, 0] for i in range(32)])
    assert alone.dtype == dtype
    for batch in (7, 32):
        for start in range(0, 32, batch):
            index = indices(32)[start : start + batch]
            assert torch.equal(stream.normal(index, [0], shape, dtype)[0], alone[start : start + batch])
    backwards = stream.normal(indices(32).flip(0), [3, 0], shape, dtype)[1]
    assert torch.equal(backwards.flip(0), alone)


def test_uniform_does_not_know_its_batch() -> None:
    stream = NoiseStream(7, "midpoint")
    alone = torch.cat([stream.uniform(indices(1, i), [5], torch.float32)[0] for i in range(32)])
    assert torch.equal(stream.uniform(indices(32), [5], torch.float32)[0], alone)


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**64 + 5, 10**30])
def test_any_seed_gives_standard_normals(seed: int) -> None:
    z = NoiseStream(seed, "start").normal(indices(100), [0], (1000,), torch.float64).flatten()
    n = len(z)
    # Var of z, z^2, z^3 and z^4 is 1, 2, 15 and 96
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean().item() - mean) < 4 * (variance / n) ** 0.5
    inside = (z.abs() < 1).double().mean().item()
    assert abs(inside - 0.6826895) < 4 * (0.6826895 * 0.3173105 / n) ** 0.5
    assert z.abs().max() < 6.7


def test_elements_samples_slots_and_shifts_are_uncorrelated() -> None:
    z = NoiseStream(0, "start").normal(indices(200), list(range(5)), (100,), torch.float64)
    assert_correlation(z[..., :50], z[..., 50:])  # the two halves of Box and Muller
    assert_correlation(z[..., :50] ** 2 - 1, (z[..., 50:] ** 2 - 1) / 2)
    assert_correlation(z[..., 1:], z[..., :-1])
    assert_correlation(z[:, 1:], z[:, :-1])
    assert_correlation(z[1:], z[:-1])
    assert_correlation(z[:-1, 1:], z[1:, :-1])  # index + 1 is not slot + 1
    assert_correlation(z[:, 1:, :-1], z[:, :-1, 1:])  # nor element + 1


def test_keys_differ() -> None:
    def draw(seed: int, purpose: str, index: int, slot: int) -> Tensor:
        return NoiseStream(seed, purpose).normal(indices(1, index), [slot], (1000,), torch.float64)[0, 0]

    keys = [(0, "start", 0, 0), (1, "start", 0, 0), (-1, "start", 0, 0), (2**64, "start", 0, 0)]
    keys += [(0, "brownian", 0, 0), (0, "start", 1, 0), (0, "start", 0, 1), (0, "start", 2**40, 0)]
    keys += [(0, "start", 0, 2**62)]
    drawn = [draw(*key) for key in keys]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert not (one == other).any()
            assert_correlation(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_strictly_inside_and_even(dtype: torch.dtype) -> None:
    u = NoiseStream(0, "midpoint").uniform(indices(200_000), [0], dtype)[0]
    assert u.dtype == dtype
    assert u.min() > 0
    assert u.max() < 1
    counts = np.histogram(u.double().numpy(), bins=20, range=(0, 1))[0]
    expected = len(u) / 20
    # chi-squared with 19 degrees of freedom: mean 19, standard deviation sqrt(38)
    assert abs(((counts - expected) ** 2 / expected).sum() - 19) < 4 * 38**0.5


# --- Brownian paths ------------------------------------------------------------------------------------------------


def clock(t: float, schedule: NoiseSchedule = COSINE) -> float:
    return schedule.kappa(t).item() ** 2


def assert_law(values: dict[float, Tensor], schedule: NoiseSchedule = COSINE) -> None:
    """Covariance of B over all pairs of times, normalised, within 4 standard errors of sqrt(min / max) of the clock."""
    for s, b_s in values.items():
        for t, b_t in values.items():
            c_s, c_t = clock(s, schedule), clock(t, schedule)
            expected = (min(c_s, c_t) / max(c_s, c_t)) ** 0.5
            assert_correlation(b_s / c_s**0.5, b_t / c_t**0.5, expected)


@pytest.mark.parametrize("name", ["cosine", "linear", "zero_snr"])
def test_law_on_a_random_grid(name: str) -> None:
    schedule = SCHEDULES[name]()
    times = np.sort(np.random.default_rng(0).uniform(size=12))[::-1].tolist()
    path = brownian(SAMPLES, schedule=schedule)
    assert_law({t: path.at(t) for t in [1.0, *times]}, schedule)


def test_law_with_many_times_in_one_cell() -> None:
    cell = 300 / 1000
    times = [301 / 1000, cell + 0.9 / 1000, cell + 0.5 / 1000, cell + 0.1 / 1000, cell, cell - 0.01 / 1000]
    path = brownian(SAMPLES)
    assert_law({t: path.at(t) for t in times})


def test_law_below_the_first_node() -> None:
    path = brownian(SAMPLES)
    assert_law({t: path.at(t) for t in (2 / 1000, 1.5 / 1000, 1 / 1000, 0.5 / 1000, 0.25 / 1000)})


@pytest.mark.parametrize("steps", [7, 50, 1500])
def test_increments_are_independent_in_both_clocks(steps: int) -> None:
    """Of B in kappa^2 and of M(1/c) = B(c) / c in 1/kappa^2; with 1500 steps several times fall in one cell."""
    path = brownian(SAMPLES, seed=1)
    times = [i / steps for i in range(steps, 0, -1)]
    window = times[: 7 if steps == 7 else 12]
    values = [(clock(t), path.at(t)) for t in window]
    in_kappa = [(b - b_next) / (c - c_next) ** 0.5 for (c, b), (c_next, b_next) in itertools.pairwise(values)]
    in_snr = [
        (b_next / c_next - b / c) / (1 / c_next - 1 / c) ** 0.5
        for (c, b), (c_next, b_next) in itertools.pairwise(values)
    ]
    for increments in (in_kappa, in_snr):
        for i, one in enumerate(increments):
            assert_correlation(one, one, 1.0)
            for other in increments[:i]:
                assert_correlation(one, other)


def test_zero_at_time_zero() -> None:
    for times in ([0.0], [0.7, 0.0], [1.0, 1 / 1000, 1 / 4096, 0.0]):
        path = brownian(3, (2, 5))
        values = [path.at(t) for t in times]
        assert torch.equal(values[-1], torch.zeros(3, 2, 5, dtype=torch.float64))


def test_uniform_grids_share_one_path_bitwise() -> None:
    seen: dict[float, Tensor] = {}
    met = 0
    divisors = [n for n in range(1, 1001) if 1000 % n == 0]
    for steps in [*divisors, 3, 7, 64, 96, 933]:
        path = brownian(2, (3,))
        for i in range(steps + 1):
            t = (steps - i) / steps
            value = path.at(t)
            met += t in seen
            assert torch.equal(seen.setdefault(t, value), value)
    assert met > 1000


def test_finer_grids_agree_to_the_width_of_a_cell() -> None:
    """With two times in a cell the second depends on the first, so grids meet up to one bridge."""
    fine, coarse = brownian(200, (5,)), brownian(200, (5,))
    read = [i for i in range(1000, 0, -1) if i % 250 < 75]  # at both ends and in the middle
    inside = {i for n in read for i in range(round(n * 4.096) - 5, round(n * 4.096) + 6) if 0 < i <= 4096}
    values = {i / 4096: fine.at(i / 4096) for i in sorted(inside, reverse=True)}
    for i in read:
        t = i / 1000
        cell = int(t * 1000)
        nearest = values[round(t * 4096) / 4096]
        width = clock(min(1.0, (cell + 2) / 1000)) - clock(max(0, cell - 1) / 1000)
        assert (coarse.at(t) - nearest).square().mean().item() < width


@pytest.mark.parametrize("steps", [10, 20, 32, 50, 64, 96, 100, 128, 200, 1000])
def test_common_grids_need_about_two_normals_a_step(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    normal = NoiseStream.normal

    def counted(self: NoiseStream, index: Tensor, slots: Any, *about: Any) -> Tensor:
        drawn.append(len(slots))
        return normal(self, index, slots, *about)

    monkeypatch.setattr(NoiseStream, "normal", counted)
    path = brownian(1)
    for i in range(steps):
        path.at((steps - i) / steps)
    assert sum(drawn) <= 2.1 * steps


def test_two_readings_of_one_time_agree() -> None:
    path = brownian(4)
    first = path.at(0.3)
    assert torch.equal(path.at(0.3), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [10, 1000, 1700])
def test_a_path_does_not_know_its_batch(steps: int, dtype: torch.dtype) -> None:
    # over all of time, and one after another, where two fall in one cell
    read = sorted({*range(0, steps + 1, max(steps // 60, 5)), *range(steps // 2, min(steps // 2 + 30, steps))})

    def values(index: Tensor) -> Tensor:
        path = BrownianPath(COSINE, 3, index, (3, 5), dtype)
        return torch.stack([path.at((steps - i) / steps) for i in read], 1)

    whole = values(indices(32))
    assert whole.dtype == dtype
    assert torch.equal(torch.cat([values(indices(32)[i : i + 7]) for i in range(0, 32, 7)]), whole)
    assert torch.equal(values(indices(1, 31))[0], whole[31])


def test_seeds_and_pixels_have_paths_of_their_own() -> None:
    a, b = brownian(SAMPLES // 2, (2,), seed=0).at(0.5), brownian(SAMPLES // 2, (2,), seed=1).at(0.5)
    scale = clock(0.5) ** 0.5
    assert_correlation(a / scale, b / scale)
    assert_correlation(a[:, 0] / scale, a[:, 1] / scale)


def test_rising_times_are_refused() -> None:
    path = brownian(1)
    path.at(0.5)
    with pytest.raises(ValueError, match=r"^a Brownian path is read at falling times; 0.6 comes after 0.5$"):
        path.at(0.6)
    with pytest.raises(ValueError, match=r"2.0 comes after 1.0$"):
        brownian(1).at(2.0)


def test_reserved_ranges_do_not_meet() -> None:
    ranges = [USER_INDICES, *sorted(RESERVED.values(), key=lambda one: one.start)]
    assert all(low.stop <= high.start for low, high in itertools.pairwise(ranges))
    assert all(one == range(one.start, one.stop) and len(one) >= 10**8 for one in ranges)


def test_reserved_indices_follow_one_another() -> None:
    first, second = (reserved_indices("memorising", 3, skip=skip) for skip in (0, 3))
    assert torch.cat([first, second]).tolist() == list(RESERVED["memorising"][:6])
    with pytest.raises(ValueError, match=r"^memorising may draw at most 100000000 samples, got 100000001$"):
        reserved_indices("memorising", 1, skip=10**8)
