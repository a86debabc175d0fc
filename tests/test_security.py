"""What SECURITY.md promises of the source: no pickles, nothing built by any name, no network. Read, not run."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from public_names import REPOSITORY

FILES = [*sorted((REPOSITORY / "mlem").rglob("*.py")), REPOSITORY / "train.py", REPOSITORY / "sample.py"]
TREES = {path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text()) for path in FILES}

UNSAFE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code"}
UNPICKLERS = {
    "mlem/data/datasets/cifar10.py": {"Unpickler", "UnpicklingError"},  # of ours: it refuses every name
    "mlem/metrics/inception.py": {"UnpicklingError"},
    "mlem/training/checkpoint_files.py": {"UnpicklingError"},
}
NETWORK = {"urllib", "http", "socket", "ftplib", "requests", "httpx", "aiohttp", "huggingface_hub", "wandb"}
ONLINE = {"mlem/data/archives.py": {"urllib", "http"}, "mlem/training/loggers.py": {"wandb"}}
BY_NAME = {
    "mlem/__init__.py",  # these six: names of our own
    "mlem/cli/tools.py",
    "mlem/data/__init__.py",
    "mlem/metrics/__init__.py",
    "mlem/solvers/__init__.py",
    "mlem/data/datasets/__init__.py",
    "mlem/networks/registry.py",  # these two: the allow-list of networks
    "mlem/networks/foreign.py",
    "mlem/cli/callbacks.py",  # the allow-list of packages
}
"""Files that import a module by a name which is no constant."""
BY_HAND = {"mlem/decoder.py", "mlem/metrics/dinov2.py"}
"""Files that take `from_pretrained` without calling it there, as its types are unknown; they were read: local."""
DEMANDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load", "yaml.load"}


def imported(tree: ast.Module) -> set[str]:
    """The packages that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found


def calls(tree: ast.Module) -> Iterator[tuple[str, dict[str | None, object]]]:
    """Every call as it is written, and its keywords that are constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            constants = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
            yield ast.unparse(node.func), constants


def faults(name: str, tree: ast.Module) -> list[str]:
    """What a file does that SECURITY.md says is not done."""
    packages = imported(tree)
    used = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"
    }
    found = [f"imports {one}" for one in packages & UNSAFE if not (one == "pickle" and name in UNPICKLERS)]
    found += [f"uses pickle.{one}" for one in used - UNPICKLERS.get(name, set())]
    found += [f"imports {one}" for one in packages & NETWORK - ONLINE.get(name, set())]
    taken = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "from_pretrained"]
    called = [function for function, _ in calls(tree) if function.endswith(".from_pretrained")]
    found += ["takes from_pretrained"] * (len(taken) > len(called) and name not in BY_HAND)
    for function, constants in calls(tree):
        word, value = DEMANDED.get(function, (None, None))
        found += [f"{function} without {word}={value}"] * (word is not None and constants.get(word) is not value)
        found += [f"calls {function}"] * (function in FORBIDDEN)
        found += [f"{function} in a shell"] * bool(constants.get("shell"))
        if function.endswith(".from_pretrained"):
            found += [f"{function} may download"] * (constants.get("local_files_only") is not True)
        if function.endswith("import_module"):
            found += ["imports by name"] * (name not in BY_NAME)
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "def f():\n    import requests",
        "import urllib.request",
        "Model.from_pretrained(folder)",
        "read = Model.from_pretrained",
        "importlib.import_module(name)",
    ],
)
def test_what_is_forbidden_is_seen(line: str) -> None:
    assert len(faults("mlem/level.py", ast.parse(line))) == 1


def test_no_file_does_what_is_forbidden() -> None:
    assert len(TREES) > 150
    assert {name: found for name, tree in TREES.items() if (found := faults(name, tree))} == {}


def test_no_exception_is_out_of_date() -> None:
    """A file that no longer needs its exception has none."""
    assert all(imported(TREES[name]) >= {"pickle"} for name in UNPICKLERS)
    assert all(imported(TREES[name]) >= packages for name, packages in ONLINE.items())
    by_name = {
        name for name, tree in TREES.items() for function, _ in calls(tree) if function.endswith("import_module")
    }
    assert by_name == BY_NAME
    assert all('"local_files_only": True' in (REPOSITORY / name).read_text() for name in BY_HAND)
