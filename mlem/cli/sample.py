"""The work of `sample.py`: sample from a trained family or level, to PNGs, on any number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from mlem.cli.auto import chosen
from mlem.cli.conditions import conditions_for, guided, told
from mlem.cli.decoders import decoder_for
from mlem.cli.experiments import error_against_time, scaling
from mlem.cli.metrics import measure_folder, measure_of, measure_reference, prepared, report
from mlem.cli.paths import family_folder, out_folder, run_folder, training_command
from mlem.cli.plans import plan_of
from mlem.cli.progress import SamplingProgress
from mlem.cli.ranks import all_gather, fail_together, launch, new_fabric
from mlem.cli.schema import Network, Sample
from mlem.cli.values import parse_indices
from mlem.decoder import Decoder
from mlem.family import Family
from mlem.files import clear_leftovers, first_process, folder_lock, sha256
from mlem.ledger import Ledger
from mlem.level import Level
from mlem.metrics import Measure
from mlem.multilevel.candidate import Recommendation
from mlem.multilevel.predict import Predictor
from mlem.outputs import claim, finish, pack, sample_path, survey, write_samples
from mlem.sampling import Sampler, solver_of
from mlem.solvers import Solver
from mlem.solvers.lipschitz import estimate_lipschitz

__all__ = ["find_model", "sample"]


def sample(job: Sample) -> None:
    """Run what `eval` says: make missing samples and score them, score others, or run an experiment."""
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    verbs = {"samples": _sample, "folder": measure_folder, "ref": measure_reference}
    verbs |= {"benchmark": error_against_time, "scaling": scaling}
    verbs[job.eval.name](job)


def _sample(job: Sample) -> None:
    if job.folder is not None:
        raise ValueError(f"folder={job.folder} is only used by eval=folder: add eval=folder, or leave it out")
    indices = parse_indices(job.seeds, "seeds")
    folder, model = find_model(job)
    model = guided(model, job.guidance)
    decoder = decoder_for(job, model)
    measure = measure_of(job.metric, job.data, prepared(job.data)) if job.metric.features is not None else None
    if measure is not None:
        measure.check(len(indices))
        _check_shape(model, measure, job.data.name, decoder)
    fabric = new_fabric(job.trainer)
    job, choice = chosen(job, model, fabric)
    sampler, model = _sampler(job, model, fabric.device, choice)
    out = out_folder(job)
    # all other checks come before other ranks exist, which would wait for this one
    if first_process():
        claim(out, _settings(job, model, folder, sampler) | _decoded(decoder))
    with folder_lock(out) if first_process() else nullcontext():
        hashes = _make(job, sampler, model, decoder, fabric, indices, out)
        if measure is not None:
            # from the files, to include samples of earlier runs and agree with eval=folder
            report(measure, [sample_path(out, index) for index in indices], fabric, job.batch_size, out)
        if fabric.is_global_zero and job.format != "png":
            print(f"packed: {pack(out, indices, hashes, job.format)}")


def _sampler(
    job: Sample, model: Family | Level, device: torch.device, choice: Recommendation | None
) -> tuple[Sampler, Family | Level]:
    """The sampler, and its model: the family if its levels share the work, else one of them."""
    plan = plan_of(job, model) if choice is None else choice.plan
    if isinstance(model, Family) and plan is None:
        model = model.level(job.level)
    if job.trainer.compile:
        for level in model.levels if isinstance(model, Family) else [model]:
            level.network.compile()
    sampler = Sampler(
        model,
        solver=_solver(job, model, device),
        steps=job.steps,
        grid=job.grid,
        seed=job.seed,
        level=job.level if isinstance(model, Family) else None,
        plan=plan,
        reuse=None if choice is None else choice.reuse,
        device=device,
        precision=job.trainer.precision,
        spread=job.sampler.over == "ranks",
        conditions=conditions_for(job, model),
    )
    return sampler, model


def _make(
    job: Sample,
    sampler: Sampler,
    model: Family | Level,
    decoder: Decoder | None,
    fabric: Any,
    indices: Sequence[int],
    out: Path,
) -> dict[int, str]:
    """Make missing samples; on rank 0, return index -> SHA-256 of all images in `out`."""
    over_ranks = job.sampler.over == "ranks"
    found = None
    if first_process():
        clear_leftovers(out)
        found = survey(out)
    launch(fabric)
    if found is not None and (there := len(found.sound.keys() & set(indices))):
        print(f"{there} of {len(indices)} images already exist in {out}", flush=True)
    if found is not None and found.broken:
        print(f"{out}: {found.named()}; those in seeds= are made again", flush=True)
    missing = fabric.broadcast(None if found is None else sorted(set(indices) - found.sound.keys()))
    # with spread, all ranks work on every batch; otherwise each has its own
    rank, world_size = (0, 1) if over_ranks else (fabric.global_rank, fabric.world_size)
    with SamplingProgress(len(indices), len(indices) - len(missing), world_size, fabric.is_global_zero) as advance:
        ledger, failure, made = write_samples(
            sampler,
            indices,
            out,
            batch_size=job.batch_size,
            missing=missing,
            rank=rank,
            world_size=world_size,
            advance=advance,
            keeps=not over_ranks or fabric.is_global_zero,
            **({} if decoder is None else {"pictures": decoder.decode}),
        )
    if over_ranks and not fabric.is_global_zero:
        ledger.images, ledger.wall_seconds = 0, 0.0  # the same images on all ranks: only the calls are this rank's
    gathered, hashes = Ledger(), {} if found is None else found.noted | found.sound
    for one, images in all_gather((ledger.to_dict(), made)):
        gathered.add(Ledger.from_dict(one))
        hashes |= images
    if fabric.is_global_zero:
        _report(finish(out, indices, gathered, hashes), gathered, model, sampler, out)
    fabric.barrier()
    fail_together(failure)
    return hashes


def _solver(job: Sample, model: Family | Level, device: torch.device) -> Solver:
    """The solver described by `sampler`. lipschitz=estimate is measured here, on the largest level."""
    options = dict(job.sampler.options)
    if options.get("lipschitz") == "estimate":
        level = model.level() if isinstance(model, Family) else model
        options["lipschitz"] = table = estimate_lipschitz(
            level.denoiser_for, level.denoiser.schedule, level.shape, seed=job.seed, device=device
        )
        if first_process():
            values = ", ".join(f"{constant:.3g} at t = {t:.3g}" for t, constant in table)
            print(f"Lipschitz constant of the score, estimated on level {level.name}: {values}")
    try:
        return solver_of(job.sampler.solver, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"sampler.options: {error}" if options else str(error)) from error


def _decoded(decoder: Decoder | None) -> dict[str, str]:
    return {} if decoder is None else {"decoder": decoder.fingerprint}


def _check_shape(model: Family | Level, measure: Measure, data: str, decoder: Decoder | None) -> None:
    shape = model.levels[0].shape if isinstance(model, Family) else model.shape
    shape = shape if decoder is None else decoder.picture_shape(shape)
    if tuple(shape) != measure.fid.image_shape:
        raise ValueError(
            f"data={data} has images {measure.fid.image_shape}, but the model makes {tuple(shape)}: name its own data "
            "set, or metric=none"
        )


def find_model(job: Sample) -> tuple[Path, Family | Level]:
    """The folder and the family or level named by `family=`, `model=` or `data=`. Raises FileNotFoundError."""
    model = job.model
    if model is None:
        folder = family_folder(job.family, job.root, job.data)
        return folder, Family.load(folder)
    for name, value in (("family", job.family), ("level", job.level)):
        if value is not None:
            raise ValueError(f"model={model.name} is a single level: leave out {name}={value}")
    if not isinstance(model, Network):
        raise ValueError(f"model={model.name} is not a level: leave it out, and name a family by family= or data=")
    folder = run_folder(job, model.size) / "level"
    if not folder.is_dir():
        remedy = training_command(f"{model.architecture}_{model.size}", job.root, job.data)
        raise FileNotFoundError(f"{folder} does not exist; make it with: {remedy}")
    return folder, Level.load(folder)


def _settings(job: Sample, model: Family | Level, folder: Path, sampler: Sampler) -> dict[str, Any]:
    """Everything that determines the bytes of an image."""
    if isinstance(model, Family):
        assert sampler.plan is not None
        own = {"plan": sampler.plan.fingerprint()[:16], "weights": model.weights_hash}
    else:
        weights = next(path for path in (folder / f"level_{model.name}", folder) if (path / "mlem.json").exists())
        own = {"level": model.name, "weights": sha256(weights / "diffusion_pytorch_model.safetensors")}
    if sampler.reuse is not None:
        own["reuse"] = str(sampler.reuse)
    own |= told(job)
    return own | {
        "solver": job.sampler.solver,
        "options": job.sampler.options,
        "steps": job.steps,
        "grid": sampler.grid.name,
        "seed": job.seed,
        "batch_size": job.batch_size,
        "precision": job.trainer.precision,
    }


def _report(total: dict[str, Any], now: Ledger, model: Family | Level, sampler: Sampler, out: Path) -> None:
    if not now.images:
        print(f"nothing to do: all samples are in {out}")
        return
    milliseconds = 1e3 * now.wall_seconds / now.images
    levels = "+".join(now.levels)
    print(
        f"{now.images} images computed, level {levels}, {now.evaluations:g} network calls each, "
        f"{milliseconds:.2f} ms/image ({100 * now.network_seconds / now.wall_seconds:.1f} percent in the network)"
    )
    if isinstance(model, Family):
        _report_plan(now, model, sampler)
    print(f"images: {out}, side by side: {out / 'grid.png'}")
    print(f"cost of the {total['images']} images computed so far: {out / 'ledger.json'}")


def _report_plan(now: Ledger, family: Family, sampler: Sampler) -> None:
    """Print calls of each level, and the error of the largest level alone at equal cost."""
    plan, top = sampler.plan, family.level()
    assert plan is not None
    for name, cost in now.levels.items():
        print(
            f"  level {name}: {cost.calls / now.images:g} calls per image "
            f"(expected {cost.expected_calls / now.images:.4g}), {1e3 * cost.seconds / now.images:.2f} ms/image in it"
        )
    flops = sum(cost.flops for cost in now.levels.values()) / now.images / top.flops
    print(f"  total {flops:.4g} evaluations of level {top.name} by FLOPs; it alone would make {plan.evaluations}")
    if (seconds := plan.about.get("predicted_seconds")) is not None:
        taken = now.wall_seconds / now.images
        print(f"  {1e3 * seconds:.2f} ms/image predicted, in batches as calibrated; {1e3 * taken:.2f} measured")
    predicted = plan.about.get("predicted_mse")
    # a handmade plan has no prediction; the family of a memorised one may have lost its calibration
    known = family.fitted.calibration is not None and family.fitted.calibrated(family)
    if predicted is not None and known:
        predictor = Predictor(family.fitted.calibration_for(family), family.schedule, sampler.solver, sampler.grid)
        alone = predictor.discretisation_at(max(1, round(flops)))
        print(
            f"  predicted mean squared error {predicted:.2g}; {sampler.solver.name} with level {top.name} alone in "
            f"{max(1, round(flops))} steps, at the same cost: {alone:.2g}"
        )
