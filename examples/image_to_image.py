"""Image-to-image (SDEdit, arXiv:2108.01073): add noise to an image up to time t, and sample from there.

python examples/image_to_image.py runs/demo/family picture.png [t]
"""

import sys
from pathlib import Path

from torch import Tensor

from mlem import Family, TimeGrid, sample
from mlem.images import image_grid
from mlem.outputs import read_png
from mlem.sampling import noised


def variations(family: Family, picture: Tensor, t: float = 0.5, count: int = 16) -> Tensor:
    """Variations of an image (C, H, W) in [-1, 1]: (count, C, H, W). Larger t gives larger changes."""
    grid = TimeGrid.make("log_snr", family.schedule, 32).below(t)
    start = noised(picture[None], family.schedule, t)
    return sample(family, solver="dpm_solver_pp", grid=grid, indices=range(count), start=start).x


if __name__ == "__main__":
    folder, path, *time = sys.argv[1:]
    found = variations(Family.load(folder), read_png(Path(path)), float(time[0]) if time else 0.5)
    image_grid(found).save("variations.png")
