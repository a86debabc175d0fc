"""Source distribution and wheel: built, installed into a fresh environment, and used there without the repository."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import mlem
from tests.commands import PLAIN, REPOSITORY, environment

COPIED = ("mlem", "configs", "tests", "train.py", "sample.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for building leaves folders behind; no download."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
        else:
            shutil.copy(REPOSITORY / name, source / name)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as pip does for who has no wheel: so what is tested here holds for both."""
    out = tmp_path_factory.mktemp("wheel")
    options = ["--verbose", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(sdist)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "Package would be ignored" not in done.stdout
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands' folder in a fresh environment, which finds everything but mlem where this one has it."""
    fresh = tmp_path_factory.mktemp("fresh") / "environment"
    venv.create(fresh, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(fresh), "platbase": str(fresh)}))
    # folders named in a .pth are searched, but their own .pth files, as that of an editable mlem, are not read
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    command = [sys.executable, "-m", "pip", "--python", str(fresh / "bin/python"), "install"]
    subprocess.run([*command, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    return fresh / "bin"


def run(commands: Path, name: str, *options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command of the fresh environment, in a folder without the repository."""
    env = environment()
    del env["PYTHONPATH"]
    command = [str(commands / name), *options]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300)


def test_the_wheel_holds_all_code_and_configs_and_no_foreign_name(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kinds = {".py", ".yaml", ".css", ".js", ".typed"}
    code = [path for path in (REPOSITORY / "mlem").rglob("*") if path.suffix in kinds or path.name == "py.typed"]
    configs = (REPOSITORY / "configs").rglob("*.yaml")
    expected = {str(path.relative_to(REPOSITORY)) for path in code}
    expected |= {f"mlem/{path.relative_to(REPOSITORY)}" for path in configs}
    pretrained = [path for path in (REPOSITORY / "mlem/pretrained").glob("*/**/*") if path.is_file()]
    expected |= {str(path.relative_to(REPOSITORY)) for path in pretrained if "__pycache__" not in path.parts}
    assert names == expected


def test_the_source_distribution_holds_what_the_wheel_is_built_from(sdist: Path, wheel: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {Path(*Path(one.name).parts[1:]).as_posix() for one in archive.getmembers() if one.isfile()}
    code = {name.replace("mlem/configs/", "configs/") for name in zipfile.ZipFile(wheel).namelist()}
    top = {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "PKG-INFO", "setup.cfg"}
    about = {name for name in names if name.startswith("mlem_diffusion.egg-info/")}
    assert names - about == {name for name in code if ".dist-info/" not in name} | top


def test_the_head_says_what_is_needed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        head = Parser().parsestr(archive.read(name).decode())
    assert (head["Name"], head["License-Expression"]) == ("mlem-diffusion", "Apache-2.0")
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert head["Version"] == mlem.__version__ == cited["version"]
    assert "Typing :: Typed" in head.get_all("Classifier", [])
    assert str(head.get_payload()).startswith("# mlem\n")


def test_the_changelog_begins_with_what_is_unreleased_and_then_this_version() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    unreleased, *versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    found = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - 2\d{3}-\d\d-\d\d", version) for version in versions]
    assert unreleased == "[Unreleased]"
    assert found[0] is not None
    assert found[0][1] == mlem.__version__
    assert all(found)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^###+ (.+)$", text, re.MULTILINE)) <= kinds


def test_the_packages_are_the_folders_of_code() -> None:
    """They are listed, for the configs lie elsewhere: a new folder is named in pyproject.toml."""
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "mlem").rglob("__init__.py")]
    assert listed == sorted([".".join(folder.parts) for folder in folders] + ["mlem.configs"])


def test_the_commands_work_without_the_repository(installed: Path, tmp_path: Path) -> None:
    options = [*PLAIN, "training.steps=20", "training.epoch_steps=20", "data.held_out=16"]
    trained = run(installed, "mlem-train", *options, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert str(REPOSITORY) not in trained.stdout + trained.stderr
    sampled = run(installed, "mlem-sample", "model=unet_xs", "trainer=cpu", "steps=2", "seeds=0-1", cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    assert len(list((tmp_path / "runs/digits/samples/ddim_2").glob("0*.png"))) == 2
    listed = run(installed, "mlem", "runs", "--json", cwd=tmp_path)
    assert '"state": "finished"' in listed.stdout
    checked = run(installed, "mlem", "outputs", "verify", "runs/digits/samples/ddim_2", cwd=tmp_path)
    assert checked.stdout == "runs/digits/samples/ddim_2: 2 images, as in the manifest\n"
    there = run(installed, "python", "-c", "import mlem; print(mlem.__file__)", cwd=tmp_path)
    assert Path(there.stdout.strip()).is_relative_to(installed.parent)


def test_messages_name_the_command_that_was_typed(installed: Path, tmp_path: Path) -> None:
    usage = run(installed, "mlem-train", "--help", cwd=tmp_path).stdout
    assert "usage: mlem-train [option=value ...]" in usage
    assert "python" not in usage
    assert "  unet_xs  " in usage
    wrong = run(installed, "mlem-train", "trainig.steps=3", cwd=tmp_path)
    line = "mlem-train: trainig.steps: there is no such option; did you mean training.steps?\n"
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", line)
    wrong = run(installed, "mlem-sample", "experiment=demo", cwd=tmp_path)
    assert wrong.stderr == "mlem-sample: experiment=demo is one of mlem-train: mlem-train experiment=demo\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["data", "multilevel", "outputs", "report", "runs"])
def test_every_tool_has_its_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from mlem.cli import tools

    monkeypatch.setattr(sys, "argv", ["/usr/bin/mlem"])
    assert tools.main(["--help"]) == 0
    assert f"\n  {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        tools.main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: mlem {name} ")


def test_every_argument_of_a_tool_says_what_it_is() -> None:
    calls = [
        (path.name, node)
        for path in (REPOSITORY / "mlem").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
    ]
    assert len(calls) > 25
    assert [(name, ast.unparse(call)) for name, call in calls if "help" not in {one.arg for one in call.keywords}] == []


def test_a_wrong_tool_gets_one_line(capsys: pytest.CaptureFixture) -> None:
    from mlem.cli import tools

    assert tools.main(["output"]) == 2
    assert capsys.readouterr().err == "mlem: output: there is no such tool; did you mean outputs?\n"


def test_a_checkout_has_its_own_configs() -> None:
    from mlem.cli.choices import CONFIGS

    assert os.path.samefile(CONFIGS, REPOSITORY / "configs")
