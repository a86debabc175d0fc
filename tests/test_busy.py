"""Threads that wait must not spin: the variables that say so are set before torch's OpenMP runtime is loaded."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import REPOSITORY

_LOADING = """
import ctypes, sys
import mlem
assert "torch" not in sys.modules
ctypes.CDLL(sys.argv[1])
"""


def _runtime() -> Path:
    """GNU's OpenMP runtime, as torch brings it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    home = Path(spec.origin).parent
    found = [*home.glob("lib/libgomp*.so*"), *home.parent.glob("torch.libs/libgomp*.so*")]
    if not found:
        pytest.skip("this torch has another OpenMP runtime")
    return found[0]


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
    ids=["nothing", "the user's", "the user's policy"],
)
def test_importing_mlem_first_keeps_threads_from_spinning(given: dict[str, str], spins: str) -> None:
    """What the runtime itself says that it has read. A number or a policy that the user chose stays."""
    ours = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
    plain = {name: value for name, value in os.environ.items() if name not in ours}
    environment = plain | {"PYTHONPATH": str(REPOSITORY), "OMP_DISPLAY_ENV": "verbose"} | given
    command = [sys.executable, "-c", _LOADING, str(_runtime())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr) == [spins]


def test_these_tests_and_every_benchmark_import_mlem_before_torch() -> None:
    assert {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    for path in REPOSITORY.glob("benchmarks/*.py"):
        text = path.read_text()
        modules = re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)
        if '__name__ == "__main__"' in text and "torch" in modules:
            assert modules.index("mlem") < modules.index("torch"), path
