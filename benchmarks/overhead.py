"""The overhead of the framework over the network, as ratios measured side by side in one process.

    python benchmarks/overhead.py

1. Sampling time outside the network: dead leaves 32x32, level m, batch 32, 50 steps.
2. DDIM-50 against diffusers' own DDIMPipeline with the same UNet: as diffusers loads it, and with its weights in
   channels_last, like ours.
3. Training steps per second against a bare PyTorch loop that does the same work.

Each pair alternates, so that slow spells of the machine affect both sides; it prints the median of the per-round
figures and their range. Run it on an idle machine.
"""

from __future__ import annotations

import mlem as mlem  # before torch, so that its threads do not spin

# isort: split
import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import spread

from mlem.data import BatchSource, Shards, ensure, train_loader
from mlem.files import write_json
from mlem.level import Level
from mlem.networks import unet
from mlem.predictions import NoiseLevel, make_prediction
from mlem.provenance import processor
from mlem.sampling import Sampler
from mlem.sampling.sampler import PRECISIONS
from mlem.schedule import NUM_TIMESTEPS, NoiseSchedule
from mlem.training.averaging import make_average
from mlem.training.denoising import DenoisingModule

SHAPE, BATCH, STEPS = (3, 32, 32), 32, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often each pair is measured (default 7)")
    parser.add_argument("--train-steps", type=int, default=15, help="optimizer steps in a round (default 15)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("overhead.json"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    level = Level("m", unet("m", SHAPE).eval(), NoiseSchedule.linear(), SHAPE)
    level.network.to(device)
    results: dict[str, Any] = {"machine": _machine(device), "rounds": options.rounds}
    for solver in ("ddim", "ddpm", "dpm_solver_pp", "heun"):
        results[f"percent outside the network, {solver}"] = spread(_outside(level, solver, options.rounds))
    times = _against_pipeline(level, device, options.rounds)
    ours = times.pop("ours")
    results["DDIM-50: our seconds for a batch of 32"] = spread(ours)
    for name, theirs in times.items():
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        results[f"DDIM-50: our time / DDIMPipeline's, {name}"] = spread(ratios)
    with tempfile.TemporaryDirectory() as folder:
        shards = ensure("dead_leaves", folder, size=32, count=2000, progress=False)
        ratio, ours = Training(device=device).rates(shards, options.rounds, options.train_steps)
    results["training: our steps/s / bare loop's steps/s"] = spread(ratio)
    results["training: our steps/s, batch 32"] = spread(ours)
    for name, value in results.items():
        print(f"{name:50s} {value}")
    write_json(options.out, results)


def _machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _outside(level: Level, solver: str, rounds: int) -> list[float]:
    sampler = Sampler(level, solver=solver, steps=STEPS)
    sampler.run(range(BATCH))
    ledgers = [sampler.run(range(BATCH)).ledger for _ in range(rounds)]
    return [100 * (1 - ledger.network_seconds / ledger.wall_seconds) for ledger in ledgers]


def _against_pipeline(level: Level, device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds per batch, each round: ours, and the pipeline's with the UNet in both memory formats."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    sampler = Sampler(level, solver="ddim", steps=STEPS, grid="trailing")
    as_loaded: Any = UNet2DModel.from_config(level.network.config)  # type: ignore[arg-type]
    as_loaded.load_state_dict(level.network.state_dict())
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: sampler.run(range(BATCH)).x.cpu(),
        "as diffusers loads it": _pipeline(as_loaded, device),
        "in channels_last": _pipeline(level.network, device),
    }
    for work in runs.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        names = list(runs)[number % 3 :] + list(runs)[: number % 3]
        for name in names:
            times[name].append(_seconds(runs[name]))
    return times


def _pipeline(network: Any, device: str) -> Callable[[], Any]:
    from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    betas = {"num_train_timesteps": NUM_TIMESTEPS, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    scheduler = DDIMScheduler(**betas, prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    pipeline = DDIMPipeline(unet=network.eval(), scheduler=scheduler).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(batch_size=BATCH, num_inference_steps=STEPS, output_type="np")


@dataclass(frozen=True)
class Training:
    """The training: size of the UNet, batch, device, precision, whether compiled, reader processes."""

    size: str = "m"
    batch: int = BATCH
    device: str = "cpu"
    precision: str = "fp32"
    compiled: bool = False
    workers: int = 0

    def rates(self, shards: Shards, rounds: int, steps: int) -> tuple[list[float], list[float]]:
        """Steps per second relative to the bare loop, and absolute, for each round; the two sides alternate."""
        pairs = []
        for number in range(rounds):
            sides = (self._lightning_rate, self._bare_rate)
            order = sides if number % 2 else sides[::-1]
            rates = {side: side(shards, steps) for side in order}
            pairs.append((rates[self._lightning_rate], rates[self._bare_rate]))
        return [a / b for a, b in pairs], [a for a, _ in pairs]

    def _module(self, shape: tuple[int, int, int]) -> DenoisingModule:
        level = Level(self.size, unet(self.size, shape), NoiseSchedule.cosine(), shape)
        if self.compiled:
            level.network.compile()
        options: dict[str, Any] = {"learning_rate": 1e-3, "warmup_steps": 10, "weight_decay": 0.01}
        return DenoisingModule(level, seed=0, batch_size=self.batch, steps=1000, **options)

    def _batches(self, shards: Shards) -> Any:
        train, _ = shards.split(len(shards) // 10)
        return train_loader(BatchSource(shards, train, batch_size=self.batch, seed=0), self.workers)

    def _lightning_rate(self, shards: Shards, steps: int) -> float:
        import lightning.pytorch as pl
        from lightning.pytorch.callbacks import LambdaCallback

        from mlem.cli.train import LIGHTNING_PRECISION

        times: list[float] = []

        def note(*args: Any) -> None:
            self._wait()
            times.append(time.perf_counter())

        trainer = pl.Trainer(
            accelerator=self.device,
            devices=1,
            precision=LIGHTNING_PRECISION[self.precision],  # type: ignore[arg-type]
            max_steps=steps + 5,
            max_epochs=-1,
            callbacks=[make_average(0.999), LambdaCallback(on_train_batch_end=note)],
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            limit_val_batches=0,
        )
        trainer.fit(self._module(shards.shape), self._batches(shards))
        return steps / (times[-1] - times[-1 - steps])

    def _bare_rate(self, shards: Shards, steps: int) -> float:
        """The same network, batches, loss, clipping, optimizer and average, in a plain loop."""
        module = self._module(shards.shape).to(self.device).train()
        network, schedule = module.network, module.schedule
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        average = [parameter.detach().clone() for parameter in network.parameters()]
        dtype, times = PRECISIONS[self.precision], []
        for number, batch in enumerate(self._batches(shards)):
            x_0 = batch["image"].to(self.device)
            t = torch.rand(len(x_0), device=self.device)
            z = torch.randn_like(x_0)
            at = NoiseLevel.of(schedule, t)
            alpha, sigma = at.like(x_0)
            x_t = (alpha * x_0 + sigma * z).contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device, dtype or torch.bfloat16, dtype is not None):
                output = network(x_t, t * NUM_TIMESTEPS - 1).sample
                loss = torch.nn.functional.mse_loss(output, make_prediction("v").target(x_0, z, at))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for mean, parameter in zip(average, network.parameters(), strict=True):
                    mean.lerp_(parameter, 1e-3)
            self._wait()
            times.append(time.perf_counter())
            if number == steps + 4:
                break
        return steps / (times[-1] - times[-1 - steps])

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
