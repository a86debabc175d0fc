"""Scheduler configs of diffusers, plain data: what they say of a network, and what says the same of a level.

`NoiseSchedule.from_diffusers` reads their noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mlem.predictions import EDM, SIT, Flow, Prediction, make_prediction
from mlem.schedule import EDMSchedule, FlowSchedule, NoiseSchedule

__all__ = ["prediction_of", "to_diffusers"]


def prediction_of(config: Mapping[str, Any]) -> Prediction:
    """What a network predicts that comes with this scheduler config.

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
                f"prediction_type of {kind} is {name!r}, but EDM networks answer F, which it calls epsilon"
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
    """A scheduler config with which diffusers samples such a network rightly.

    Raises:
        ValueError: none of its schedulers asks networks like this, or on these noise levels.
    """
    if isinstance(prediction, Flow) and not isinstance(prediction, SIT) and isinstance(schedule, FlowSchedule):
        n = int(prediction.timesteps)
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": n, "shift": schedule.shift}
    if isinstance(prediction, EDM) and isinstance(schedule, EDMSchedule):
        sigmas = {"sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max, "sigma_data": prediction.sigma_data}
        return {"_class_name": "EDMEulerScheduler", **sigmas, "prediction_type": "epsilon"}
    names = {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}
    asked = prediction.options.get("timesteps", schedule.num_timesteps)
    if prediction.name not in names or asked != schedule.num_timesteps:
        path = schedule.to_config()["kind"]
        raise ValueError(f"no scheduler of diffusers samples prediction {prediction} on a schedule of kind {path}")
    # DDIM of diffusers clips the data, but not the noise that goes with it
    kind = "DDIMScheduler" if prediction.clip is None else "DDPMScheduler"
    config = {"_class_name": kind, **_betas(schedule), "prediction_type": names[prediction.name]}
    config |= {"timestep_spacing": "trailing", "clip_sample": prediction.clip is not None}
    return config if prediction.clip is None else config | {"clip_sample_range": prediction.clip}


def _betas(schedule: NoiseSchedule) -> dict[str, Any]:
    """The fields that say so, as short as they can be."""
    config, n = schedule.to_config(), schedule.num_timesteps
    if config["kind"] == "diffusers":
        return config["config"] | {"num_train_timesteps": n}
    if config["kind"] == "linear":
        ends = {"beta_start": config["beta_start"], "beta_end": config["beta_end"]}
        return {"beta_schedule": "linear", **ends, "num_train_timesteps": n}
    signal = schedule.alpha(torch.arange(n + 1, dtype=torch.float64) / n).square()
    return {"num_train_timesteps": n, "trained_betas": (1 - signal[1:] / signal[:-1]).tolist()}
