"""What every solver must do beyond its own steps: a config offers it, and plans with `mse=` take it or refuse it.

A file in `mlem/solvers` is found and tested here without an entry of its own, as in `test_solvers.py`.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from mlem.family import Family
from mlem.grids import GRIDS
from mlem.multilevel.fitted import Fitted
from mlem.multilevel.pilot import discretisations
from mlem.multilevel.planner import make_plan
from mlem.multilevel.spec import PlanSpec
from mlem.solvers import SOLVERS, make_solver
from tests import waves
from tests.commands import REPOSITORY

MSE = 1e-4
CONFIGS = REPOSITORY / "configs/sampler"


@functools.cache
def family() -> Family:
    """Calibrated; the errors of the solvers are made up, for as many as a calibration would measure."""
    made = waves.family()
    errors = {f"{name}/{grid}": {16: 4e-7, 64: 1e-7} for name, grid in discretisations()}
    return Family(made.levels, Fitted(replace(made.fitted.calibration_for(made), discretisation=errors)))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_config_offers_it(name: str) -> None:
    offered = {OmegaConf.load(path).get("solver") for path in CONFIGS.glob("*.yaml")}
    assert name in offered, f"no file in {CONFIGS} has solver: {name}"


@pytest.mark.usefixtures("float64_module")
@pytest.mark.parametrize("estimator", ["hindsight", "jump"])
@pytest.mark.parametrize("name", SOLVERS)
def test_mse_is_met_or_refused_in_one_line(name: str, estimator: str) -> None:
    solver, spec = make_solver(name), PlanSpec(mse=MSE, estimator=estimator, cost="flops", levels=("1", "3"))
    for grid in GRIDS:
        times = solver.grid(waves.COSINE, 8, grid)
        if grid in solver.measured_grids:
            found = make_plan(spec, family(), solver, times).about["predicted_mse"]
            assert isinstance(found, float)
            assert 4e-7 <= found <= MSE
            continue
        with pytest.raises(ValueError, match=name) as caught:
            make_plan(spec, family(), solver, times)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SOLVERS)
def test_measured_grids_are_grids(name: str) -> None:
    assert set(SOLVERS[name].measured_grids) <= set(GRIDS)
