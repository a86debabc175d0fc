"""Features kept by image index on the rank that saw the image, and gathered in order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["FeatureBank", "distributed"]


class FeatureBank:
    """Features of images, float64, by index. The order of updates and the number of ranks do not matter."""

    def __init__(self, num_features: int) -> None:
        self._empty = torch.empty(0, num_features, dtype=torch.float64)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._features, self._indices = [self._empty], [torch.empty(0, dtype=torch.int64, device=self._empty.device)]

    def copy(self) -> FeatureBank:
        """One with the same features, which it shares in memory; what is added to either later is its own."""
        one = FeatureBank(self._empty.shape[1]).to(self._empty.device)
        one._features, one._indices = [*self._features], [*self._indices]
        return one

    def to(self, device: str | torch.device) -> FeatureBank:
        """Move the features to a device."""
        self._empty = self._empty.to(device)
        self._features = [features.to(device) for features in self._features]
        self._indices = [indices.to(device) for indices in self._indices]
        return self

    def add(self, indices: Sequence[int], features: Tensor) -> None:
        """indices: (n,), features: (n, d)."""
        self._features.append(features.to(self._empty))
        self._indices.append(torch.as_tensor(indices, dtype=torch.int64, device=self._empty.device))

    def gather(self) -> Tensor:
        """The features of all ranks in the order of their indices, (N, d); every rank must call it.

        Raises ValueError for a repeated index.
        """
        features, indices = torch.cat(self._features), torch.cat(self._indices)
        if distributed():
            from torchmetrics.utilities.distributed import gather_all_tensors

            features, indices = torch.cat(gather_all_tensors(features)), torch.cat(gather_all_tensors(indices))
        indices, order = indices.sort()
        if len(twice := indices[1:][indices.diff() == 0]):
            raise ValueError(f"image {int(twice[0])} was added twice; add each index once, on one rank")
        return features[order]


def distributed() -> bool:
    """Whether there are other ranks."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
