"""Scheduler configs of diffusers as plain data: reading a network's prediction from them, and writing them for levels.

`NoiseSchedule.from_diffusers` reads their noise levels. Also here: the pipeline index that goes with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mlem.predictions import EDM, SIT, Flow, Prediction, make_prediction
from mlem.schedule import EDMSchedule, FlowSchedule, NoiseSchedule

__all__ = ["pipeline_index", "prediction_of", "to_diffusers"]

_UNETS = {"UNet2DModel": "diffusers", "PatchUNet2DModel": "mlem.networks.patch_unet"}
"""Image networks that diffusers pipelines call alike: class -> its library in model_index.json."""


def prediction_of(config: Mapping[str, Any]) -> Prediction:
    """The prediction of a network with this scheduler config.

    Raises:
        ValueError: the prediction contradicts the scheduler.
    """
    kind, name = str(config.get("_class_name", "")), config.get("prediction_type")
    n = config.get("num_train_timesteps", 1000)
    if "FlowMatch" in kind:
        return Flow(timesteps=n)
    if kind.startswith("EDM"):
        if name not in (None, "epsilon"):
            raise ValueError(
                f"prediction_type of {kind} is {name!r}, but EDM networks return F, which it calls epsilon"
            )
        return EDM(sigma_data=config.get("sigma_data", 0.5))
    flow = bool(config.get("use_flow_sigmas"))
    if flow != (name == "flow_prediction"):
        raise ValueError(
            f"prediction_type of {kind} is {name!r}, which contradicts use_flow_sigmas={flow}: flow_prediction goes "
            "with the sigmas of flows, and nothing else does"
        )
    return Flow(timesteps=n) if flow else make_prediction(name or "epsilon")


def to_diffusers(schedule: NoiseSchedule, prediction: Prediction) -> dict[str, Any]:
    """A scheduler config with which diffusers samples such a network correctly.

    Raises:
        ValueError: none of its schedulers fits this prediction or these noise levels.
    """
    if isinstance(prediction, Flow) and not isinstance(prediction, SIT) and isinstance(schedule, FlowSchedule):
        n = int(prediction.timesteps)
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": n, "shift": schedule.shift}
    if isinstance(prediction, EDM) and not schedule.ends_in_noise:
        low, high = _sigmas(schedule)
        sigmas = {"sigma_min": low, "sigma_max": high, "sigma_data": prediction.sigma_data}
        return {"_class_name": "EDMEulerScheduler", **sigmas, "prediction_type": "epsilon"}
    names = {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}
    asked = prediction.options.get("timesteps", schedule.num_timesteps)
    if prediction.name not in names or asked != schedule.num_timesteps:
        path = schedule.to_config()["kind"]
        raise ValueError(f"no scheduler of diffusers samples prediction {prediction} on a schedule of kind {path}")
    # DDIM of diffusers clips the data estimate but not the matching noise
    kind = "DDIMScheduler" if prediction.clip is None else "DDPMScheduler"
    config = {"_class_name": kind, **_betas(schedule), "prediction_type": names[prediction.name]}
    config |= {"timestep_spacing": "trailing", "clip_sample": prediction.clip is not None}
    return config if prediction.clip is None else config | {"clip_sample_range": prediction.clip}


def pipeline_index(
    network: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None,
    shape: Sequence[int],
    conditions: Mapping[str, int | tuple[int | None, ...]],
) -> dict[str, Any] | None:
    """The model_index.json of a folder that diffusers can open as a pipeline and sample correctly.

    DDIMPipeline turns any scheduler into DDIM, so folders with flows or EDM must not be pipelines.

    Args:
        network, scheduler: their configs; scheduler: None if there is none.
        shape: of one sample.
        conditions: what the network takes besides x and t.

    Returns: None if diffusers has no such pipeline.
    """
    kind = None if scheduler is None else scheduler["_class_name"]
    library = _UNETS.get(network["_class_name"])
    if library is None or kind not in ("DDIMScheduler", "DDPMScheduler"):
        return None
    size, channels = network["sample_size"], network["in_channels"]
    square = isinstance(size, int)
    made = (channels, size, size) if square else (channels, *(size or ()))
    if tuple(shape) != made or channels not in (1, 3) or network["out_channels"] != channels:
        return None
    pipeline = kind.replace("Scheduler", "Pipeline")
    if network["num_class_embeds"] is not None or network.get("class_embed_type") is not None or conditions:
        # the only pipeline with classes for a UNet2DModel; it makes square images
        if conditions != {"class_labels": (network["num_class_embeds"] or 0) - 1} or not square:
            return None
        pipeline = "ConsistencyModelPipeline"
    parts = {"unet": [library, network["_class_name"]], "scheduler": ["diffusers", kind]}
    return {"_class_name": pipeline, "_diffusers_version": network["_diffusers_version"], **parts}


def _sigmas(schedule: NoiseSchedule) -> tuple[float, float]:
    """Noise-to-signal ratios of the first and the last of N timesteps."""
    if isinstance(schedule, EDMSchedule):
        return schedule.sigma_min, schedule.sigma_max
    return schedule.kappa(1.0 / schedule.num_timesteps).item(), schedule.kappa(1.0).item()


def _betas(schedule: NoiseSchedule) -> dict[str, Any]:
    """The fields for these betas, as short as possible."""
    config, n = schedule.to_config(), schedule.num_timesteps
    if config["kind"] == "diffusers":
        return config["config"] | {"num_train_timesteps": n}
    if config["kind"] == "linear":
        ends = {"beta_start": config["beta_start"], "beta_end": config["beta_end"]}
        return {"beta_schedule": "linear", **ends, "num_train_timesteps": n}
    signal = schedule.alpha(torch.arange(1, n + 1, dtype=torch.float64) / n).square()
    return {"num_train_timesteps": n, "trained_betas": _rounded(signal.tolist())}


def _rounded(signal: Sequence[float]) -> list[float]:
    """Betas in float32 whose cumulative products of `1 - beta` stay at these values: rounding does not add up."""
    betas, product = list[float](), 1.0
    for due in signal:
        beta = np.float32(max(1 - due / product, 2.0**-24))  # the least that changes 1 - beta
        product *= float(np.float32(1) - beta)
        betas.append(float(beta))
    return betas
