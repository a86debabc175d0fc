"""Classes named in the config: callbacks, and nothing else."""

from __future__ import annotations

import pytest

from mlem.cli.callbacks import build_callbacks
from mlem.cli.compose import plain
from mlem.cli.options import check
from tests.commands import configure

CALLBACK = "{_target_: lightning.pytorch.callbacks.Timer, duration: '00:01:00:00'}"


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("callbacks=[{_target_: os.system}]", "callbacks[0]._target_=os.system is not from mlem"),
        (f"callbacks=[{CALLBACK[:-1]}, x: {{_target_: os.system}}}}]", "callbacks[0].x._target_=os.system"),
        (f"callbacks=[{CALLBACK},[{CALLBACK}]]", "only entries of callbacks are built"),
        ("+_target_=os.system", "_target_=os.system"),
        ("+model.a.b._target_=os.system", "model.a.b._target_=os.system"),
        ("+data.options._target_=mlem.files.sha256", "data.options._target_=mlem.files.sha256"),
        ("callbacks=[{_target_: '${oc.decode:os.system}'}]", "os.system is not from"),
    ],
)
def test_a_target_is_refused(option: str, says: str) -> None:
    with pytest.raises(ValueError, match="_target_") as error:
        check(plain(configure("train", option)))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("{_target_: torch.load, f: x}", "torch.load is not a Lightning Callback class"),
        ("{_target_: torch.os.system}", "cannot import torch.os.system"),
        ("{_target_: lightning.pytorch.callbacks.LearningRateMonitors}", "correct the name"),
        ("{_target_: lightning.pytorch.callbacks.Timer, durations: 1}", "durations"),
        ("{_target_: lightning.pytorch.callbacks.LearningRateMonitor, logging_interval: x}", "logging_interval"),
        ("{_target_: lightning}", "correct the name"),
        ("LearningRateMonitor", "must be {_target_: module.Class"),
    ],
)
def test_what_is_no_callback_is_refused(entry: str, says: str) -> None:
    with pytest.raises(ValueError, match="callbacks") as error:
        build_callbacks(plain(configure("train", f"callbacks=[{entry}]"))["callbacks"])
    assert says in str(error.value)


def test_a_callback_may_come_from_a_module_that_is_allowed() -> None:
    entry = "callbacks=[{_target_: tests.test_cli.os.system}]"
    with pytest.raises(ValueError, match=r"if you trust it, add allow=\[tests\]"):
        check(plain(configure("train", entry)))
    check(plain(configure("train", entry, "allow=[tests]")))
    built = build_callbacks(plain(configure("train", f"callbacks=[{CALLBACK}]"))["callbacks"])
    assert [type(one).__name__ for one in built] == ["Timer"]
