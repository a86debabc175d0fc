"""FID: the root of the reference's covariance is found once, and never that of another reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlem.metrics import FID

pytestmark = pytest.mark.filterwarnings("ignore::mlem.metrics.fid.FewImagesWarning")


def images(seed: int, scale: float = 1.0, count: int = 300) -> Tensor:
    return scale * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def distance(*reals: Tensor) -> float:
    """Of 100 images to these, from nothing."""
    fid = FID()
    for real in reals:
        fid.update_real(real)
    fid.update(images(9, count=100))
    return fid.compute().value


@pytest.fixture
def roots(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each root that is found."""
    found, eigh = list[int](), torch.linalg.eigh

    def counted(cov: Tensor) -> tuple[Tensor, Tensor]:
        found.append(len(cov))
        return eigh(cov)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    return found


def test_scores_and_copies_share_it(roots: list[int]) -> None:
    fid = FID()
    fid.update_real(images(1))
    values: list[float] = []
    for one in (fid, fid.fresh(), fid.fresh()):
        one.update(images(9, count=100))
        values.append(one.compute().value)
    assert values == values[:1] * 3
    assert len(roots) == 1 + 3


def test_new_reference_images_end_it(roots: list[int]) -> None:
    fid = FID()
    fid.update_real(images(1))
    fid.update(images(9, count=100))
    fid.compute()
    fid.update_real(images(2, 0.3))
    assert fid.compute().value == pytest.approx(distance(images(1), images(2, 0.3)), rel=1e-9)
    fid.reset(real=True)
    fid.update_real(images(2, 0.3))
    fid.update(images(9, count=100))
    assert fid.compute().value == pytest.approx(distance(images(2, 0.3)), rel=1e-9)


def test_a_copy_with_another_reference_of_as_many_images_has_its_own() -> None:
    one = FID()
    one.update_real(images(1))
    other = one.fresh()
    other.reset(real=True)
    other.update_real(images(2, 0.3))
    for fid in (one, other):
        fid.update(images(9, count=100))
    assert one.compute().value == pytest.approx(distance(images(1)), rel=1e-9)
    assert other.compute().value == pytest.approx(distance(images(2, 0.3)), rel=1e-9)


def test_a_copy_that_forgets_its_reference_leaves_the_features_of_others() -> None:
    one = FID(keep=True)
    one.update_real(images(1), range(300))
    one.fresh().reset(real=True)
    assert len(one.real_bank.gather()) == 300


def test_images_added_to_a_copy_are_its_own() -> None:
    one = FID(keep=True)
    one.update_real(images(1), range(300))
    other = one.fresh()
    other.update_real(images(2, count=50), range(300, 350))
    assert [len(fid.real_bank.gather()) for fid in (one, other)] == [300, 350]


def test_it_is_found_again_on_another_device(roots: list[int]) -> None:
    """Here the same one, but what was kept might lie elsewhere."""
    fid = FID()
    fid.update_real(images(1))
    fid.update(images(9, count=100))
    before = fid.compute().value
    assert fid.to("cpu").compute().value == before
    assert len(roots) == 2 + 2
