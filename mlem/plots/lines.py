"""Lines against steps, time or noise level."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from mlem.plots.style import COLOURS, STYLES, figure_with_axes, legend_key, plain, positive, save

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["curves", "error_by_noise_level", "probabilities"]

_LOG_SNR = r"log signal-to-noise ratio, $\log(\alpha^2/\sigma^2)$"


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | os.PathLike[str],
    xlabel: str,
    ylabel: str,
    caption: str,
    logarithmic: bool = False,
) -> None:
    """Lines against steps or time: name -> (x, y), each (N,), points in drawing order.

    logarithmic: the y axis; values that are not positive leave gaps. Labels include units. Raises ValueError for no
    lines and different lengths.
    """
    if not lines:
        raise ValueError("curves has nothing to draw: no lines")
    figure, axes = figure_with_axes(xlabel, ylabel, caption)
    if logarithmic:
        axes.set_yscale("log", nonpositive="mask")
    # colour and line style both change, so that lines can be told apart in grey
    looks = [(COLOURS[i], STYLES[(i + shift) % 7]) for shift in range(7) for i in range(7)]
    for (name, (x, y)), (colour, (marker, line)) in zip(lines.items(), cycle(looks), strict=False):
        if len(x) != len(y):
            raise ValueError(f"line {name!r} needs as many x as y, got {len(x)} and {len(y)}")
        shown = marker if len(x) < 30 else None
        axes.plot(x, y, color=colour, linestyle=line, marker=shown, markersize=3, label=plain(name))
    figure.legend(loc="outside right upper", frameon=False)
    save(figure, path)


def error_by_noise_level(
    curves: Mapping[Any, tuple[ArrayLike, ArrayLike]], path: str | os.PathLike[str], caption: str
) -> None:
    """Denoising error against the log signal-to-noise ratio, one line per level, error axis logarithmic.

    curves: level -> (log_snr, error), each (K,): log(alpha^2/sigma^2), natural, and the mean squared error of the noise
    estimate. caption: data set, number of images, training steps. Raises ValueError for no curves, different
    lengths, or errors that are not positive.
    """
    import numpy as np

    if not curves:
        raise ValueError("error_by_noise_level has nothing to draw: no curves")
    figure, axes = figure_with_axes(_LOG_SNR, "mean squared error of the noise estimate", caption)
    axes.set(yscale="log")
    looks = zip(cycle(COLOURS), cycle(STYLES), strict=False)
    for (level, curve), (colour, (marker, line)) in zip(curves.items(), looks, strict=False):
        log_snr, error = (np.asarray(values, dtype=float) for values in curve)
        if log_snr.shape != error.shape or log_snr.ndim != 1 or not all(positive(value) for value in error):
            shapes = f"log_snr {log_snr.shape}, error {error.shape}"
            raise ValueError(f"curve {level!r} needs two equally long lists and errors above 0, got {shapes}")
        order = log_snr.argsort()
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4}
        axes.plot(log_snr[order], error[order], **look, label=str(level))
    figure.legend(title="level", loc="outside right upper", frameon=False)
    save(figure, path)


def probabilities(
    log_snr: ArrayLike,
    curves: Mapping[Any, tuple[ArrayLike, ArrayLike]],
    path: str | os.PathLike[str],
    caption: str,
) -> None:
    """Probabilities p_k of running each level against the log signal-to-noise ratio, before (dashed) and after.

    log_snr: (R,), natural. curves: level -> (before, after), each (R,), in [0, 1]. caption: data set, solver, steps.
    Raises ValueError for no curves, different lengths, or values outside [0, 1].
    """
    import numpy as np

    if not curves:
        raise ValueError("probabilities has nothing to draw: no curves")
    at = np.asarray(log_snr, dtype=float)
    order = at.argsort()
    figure, axes = figure_with_axes(_LOG_SNR, "probability $p_k$", caption)
    axes.set(ylim=(-0.02, 1.02))
    looks = zip(cycle(COLOURS), cycle(STYLES), strict=False)
    for (level, curve), (colour, (marker, _)) in zip(curves.items(), looks, strict=False):
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "markevery": 0.1}
        for p, line in zip((np.asarray(values, dtype=float) for values in curve), ("--", "-"), strict=True):
            if p.shape != at.shape or not bool(((p >= 0) & (p <= 1)).all()):
                raise ValueError(f"curve {level!r} needs values in [0, 1] of shape {at.shape}, got shape {p.shape}")
            axes.plot(at[order], p[order], linestyle=line, label=str(level) if line == "-" else None, **look)
    levels, names = axes.get_legend_handles_labels()
    figure.legend(levels, names, title="level", loc="outside right upper", frameon=False)
    handles = [legend_key("before", "0.3", "", "--"), legend_key("after", "0.3", "", "-")]
    figure.legend(handles=handles, loc="outside right lower", frameon=False)
    save(figure, path)
