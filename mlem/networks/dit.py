"""The transformers: sizes s to l of DiT (Peebles and Xie, arXiv:2212.09748), small enough for images of 8 to 64 pixels.

A network is a plain diffusers `DiTTransformer2DModel`, so diffusers can read its folder. It always takes
`class_labels`; without classes, all images share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

__all__ = ["DIT_SIZES", "dit"]

DIT_SIZES: dict[str, tuple[int, int]] = {"s": (4, 2), "m": (8, 3), "l": (12, 5)}
"""Name of a size -> layers, heads of HEAD channels."""

HEAD = 32
PATCH = 2


def dit(size: str, shape: Sequence[int], dropout: float = 0.0, classes: int = 0) -> DiTTransformer2DModel:
    """Build a transformer with fresh weights, on patches of 2x2 pixels.

    Args:
        size: a key of DIT_SIZES.
        shape: (C, H, W) of a square image of an even number of pixels.
        dropout: probability of dropout in training, in [0, 1).
        classes: the network takes `class_labels`, (B,) int64 in [0, classes], where the last means "no class"; 0: a
            single class, 0.

    Raises:
        ValueError: the size is unknown, the image shape does not fit, or dropout is out of range.
    """
    if size not in DIT_SIZES:
        raise ValueError(f"network size must be one of {', '.join(DIT_SIZES)}, got {size!r}")
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] % PATCH:
        raise ValueError(f"image shape must be (channels, n, n), n even, for patches of 2x2, got {tuple(shape)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    layers, heads = DIT_SIZES[size]
    network = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        in_channels=shape[0],
        out_channels=shape[0],
        num_layers=layers,
        dropout=dropout,
        sample_size=shape[1],
        patch_size=PATCH,
        num_embeds_ada_norm=max(1, classes),
    )
    _begin_with_zeros(network)
    return network


def _begin_with_zeros(network: DiTTransformer2DModel) -> None:
    """adaLN-zero, as published: every block starts as the identity, and the network's output is 0."""
    last: list[Any] = [network.proj_out_1, network.proj_out_2]
    for block in network.transformer_blocks:
        norm: Any = block.norm1
        last.append(norm.linear)
        norm.emb.class_embedder.dropout_prob = 0.0  # the training loop drops labels, not the global random state
        nn.init.normal_(norm.emb.class_embedder.embedding_table.weight, std=0.02)
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
