"""docs/your_own_family.md: every block of code runs, on small networks where it names larger ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn

from tests.test_foreign import dit, seeded, unet, written

REPOSITORY = Path(__file__).parent.parent


def blocks(page: str) -> list[str]:
    """The blocks of Python on a page."""
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)


BLOCKS = blocks("docs/your_own_family.md")


class Small(nn.Module):
    """A network of the time and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.weight * x * torch.cos(time).view(-1, *[1] * (x.dim() - 1))


@pytest.mark.filterwarnings("ignore:.*Full backward hook.*")
def test_every_block_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name, channels in (("small", 8), ("large", 16)):
        written(Path("models") / name, seeded(lambda channels=channels: unet(channels)), DDIMScheduler())
    told = seeded(lambda: dit(out_channels=4, num_layers=1))
    names: dict[str, Any] = {"raw_network": Small(), "velocity": Small(), "labelled": told}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in BLOCKS:
            exec(compile(block, "docs/your_own_family.md", "exec"), names)
    assert len(BLOCKS) == 7
    assert names["images"].shape == (8, 4, 8, 8)
    assert names["latents"].shape == (4, 16, 32, 32)
    printed = capsys.readouterr().out
    assert "torch.Size([8, 2]) {'small': " in printed
    lines = [line for line in BLOCKS[0].splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 12  # "ten lines", and two of them are a def each


def test_a_folder_of_diffusers_is_sampled_as_the_page_on_python_says(tmp_path: Path) -> None:
    folder = written(tmp_path / "dit", seeded(dit), DDIMScheduler())
    block = blocks("docs/python.md")[2].replace("folder of a diffusers model or pipeline", str(folder))
    names: dict[str, Any] = {}
    exec(compile(block, "docs/python.md", "exec"), names)
    assert names["images"].shape == (8, 4, 8, 8)
