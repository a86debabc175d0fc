"""Every command of the pages, in the order of each page: as written, and as small as it goes."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mlem import Family
from mlem.cli.compose import compose
from mlem.data.datasets import cifar10
from mlem.data.datasets.folder import Folder
from mlem.multilevel import pilot as pilot_module
from mlem.multilevel.calibrate import calibrate
from mlem.multilevel.fitted import Fitted
from tests import archives
from tests.commands import REPOSITORY, environment, finish
from tests.decoders import save_decoder
from tests.few_pilots import FEW
from tests.forkserver import Forked

BLOCK = re.compile(r"^ *```sh\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
COMMANDS = {
    str(path.relative_to(REPOSITORY)): [
        line
        for block in BLOCK.findall(path.read_text())
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    for path in [*sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "README.md"]
}
COMMANDS = {page: lines for page, lines in COMMANDS.items() if lines}

ELSEWHERE = {
    r"make (demo|test)": "continuous integration sets up environments; the demo runs in test_demo.py",
    r"pip install": "continuous integration installs",
    r"torchrun": "ranks are started like that in test_ddp.py",
    r"first=|if \[": "lines of a batch job",
    r".*fid_inception": "needs the weights; random ones in test_inception.py",
    r".*fd_dinov2": "needs the weights; random ones in test_dinov2.py",
}
"""What begins commands that are not run here, and why."""

SMALL = {
    "train.py": (
        "trainer.accelerator=cpu trainer.devices=1 trainer.num_nodes=1 trainer.precision=fp32 trainer.compile=false "
        "logger=jsonl metric=none data.held_out=4 training.steps=1 training.batch_size=2 training.epoch_steps=1 "
        "training.checkpoint_every=1 training.warmup_steps=1 training.workers=0 evaluation.every_n_epochs=0 "
        "evaluation.indices=0-1 evaluation.reference_steps=2 evaluation.samplers=[{solver:ddim,steps:[2]}] "
        "calibration.images=0"
    ),
    "model=coefficients": (
        "trainer.accelerator=cpu logger=jsonl model.steps=4 model.budget=0.6 model.updates=1 model.batch_size=2 "
        "model.images=2 model.draws=2 model.held_out=2"
    ),
    "sample.py": "data.held_out=4 seeds=0-3 batch_size=2 trainer.accelerator=cpu",
    "eval.": (
        "data.held_out=4 seeds=0-1 batch_size=2 trainer.accelerator=cpu eval.steps=[2,3] eval.reference_steps=6 "
        "eval.draws=10 eval.shown=0 eval.plan_steps=4 eval.trials=1 eval.deltas=[0]"
    ),
    "rivals": (
        "eval.samplers=[{rival:fewer,solver:unipc,steps:[2,3],levels:[largest]},"
        "{rival:hindsight,solver:unipc,steps:[4],plan:{budget:0.9,cost:flops}}]"
    ),
    "scaling": "data.held_out=4 eval.replicates=100 trainer.accelerator=cpu",
    "memorise": "--draws 2 --images 1 --reference-steps 4",
    "dead_leaves": "--count 20 --size 16",
    "data=dead_leaves": "data.options.size=16 data.options.count=20",
    "data=folder": "data.options.size=16",
    "data=celeba": "data.options.size=16 data.name=celeba64",
    "celeba": "--size 16 --any-checksum",
    "cifar10": "--any-checksum",
}
"""What makes commands small: it takes the place of options of the same names, or is added."""
SMALLER = (
    (r" mse=\S+", " mse=1"),
    (r"check=\d+", "check=2"),
    (r" budget=\S+", " budget=0.95"),
    (r" steps=\S+", " steps=4"),
    (r"--size \d+", "--size 16"),
    (r"model=unet_[ml](?= |$)", "model=unet_xs"),
    (r"level_steps=\[[\d,]+\]", "level_steps=[1,2]"),
)
"""What takes the place of values that networks without training do not reach, or not soon."""
CALIBRATED = ("demo", "digits", "digits_labels", "photos")
"""Families whose plans are used: calibrated with fewer steps and solvers than any command would."""


def made_small(line: str) -> list[str]:
    """The arguments after `python`, with smaller values."""
    given = shlex.split(re.sub(r"\$\(\(.*?\)\)", "9", line), comments=True)
    given = given[given.index("python") + 1 :]
    kinds = [name for name in given if name in SMALL]
    if "model=coefficients" in given:
        kinds = ["model=coefficients"]
    elif "experiment=scaling_law" in given:
        kinds[0] = "scaling"
    elif {"experiment=error_vs_time", "experiment=fastest", "eval=rivals"} & {*given}:
        kinds[0] = "eval."
        kinds += [] if "experiment=error_vs_time" in given else ["rivals"]
    elif {"dry_run=true", "eval=folder", "eval=ref"} & {*given}:
        kinds = []
    more = shlex.split(" ".join(SMALL[kind] for kind in kinds))
    names = {one.partition("=")[0] for one in more if "=" in one}
    kept = [one for one in given if one.partition("=")[0] not in names]
    if "train.py" in given and "model=family" in given and not any(one.startswith("model.levels=") for one in given):
        more.append("model.levels=[xs]")
    small = shlex.join(kept).replace("[xs,s,m]", "[xs,s]")
    for pattern, smaller in SMALLER:
        small = re.sub(pattern, smaller, small)
    return shlex.split(small) + more


def run(line: str, home: Path) -> None:
    script, *arguments = [path for one in made_small(line) for path in expanded(one, home)]
    script = script if script == "-m" else str(REPOSITORY / script)
    done = finish(Forked([script, *arguments], home, environment(HOME=str(home))))
    assert done.returncode == 0, f"{line}\n{shlex.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    for folder in (home / "runs" / name / "family" for name in CALIBRATED):
        if script.endswith("train.py") and len([*folder.glob("level_*")]) > 1:
            calibrate_small(Family.load(folder), folder)


def expanded(argument: str, home: Path) -> list[str]:
    """As a shell in job 3 of an array would."""
    argument = re.sub(r"^~", str(home), argument.replace("$SLURM_ARRAY_TASK_ID", "3"))
    found = sorted(str(path.relative_to(home)) for path in home.glob(argument)) if argument.endswith("*") else []
    return found or [argument]


def calibrate_small(family: Family, folder: Path) -> None:
    """Calibrate a family in a second, the demo's with pilots; unless it is."""
    known, few = family.fitted.calibration, [("unipc", "uniform"), ("dpm_solver_pp", "log_snr")]
    if known is not None and known.about["weights"] == family.weights_hash:
        return
    found = calibrate(family, images=2, times=3)
    if folder.parent.name in ("demo", "digits"):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (FEW | {"STEPS": {"ode": (2, 4, 8)}, "discretisations": lambda: few}).items():
                patch.setattr(pilot_module, name, value)
            found = pilot_module.pilot(family, found, images=2, reference_steps=16)
    family.fitted = Fitted(found)
    family.save_fitted(folder)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: pictures, archives, a decoder, and what is trained first."""
    home = tmp_path_factory.mktemp("home")
    (home / "photos").mkdir()
    Folder.example(home / "photos")
    (home / "PATH").mkdir()
    for number in range(8):
        Image.new("L", (8, 8), 30 * number).save(home / "PATH" / f"{number}.png")
    archives.celeba(home / "celeba", archives.faces(20))
    (home / "data").mkdir()
    archives.cifar10(home / "data" / cifar10.ARCHIVE)
    save_decoder(home / "stable-diffusion" / "vae", 3)
    for line in (
        "python -m mlem.data folder --source ~/photos --size 16 --out data/folder",
        "python -m mlem.data cifar10 --download --out data/cifar10",
        "python train.py experiment=digits_labels",
        "python train.py experiment=demo",
    ):
        run(line, home)
    shutil.copytree(home / "runs" / "demo", home / "runs" / "digits")
    return home


def test_what_is_run_elsewhere_is_in_the_pages() -> None:
    lines = [line for page in COMMANDS.values() for line in page]
    assert len(lines) > 60
    for begin, why in ELSEWHERE.items():
        assert any(re.match(begin, line) for line in lines), begin
        for test in re.findall(r"test_\w+\.py", why):
            assert (REPOSITORY / "tests" / test).exists()
    for line in lines:
        if (found := re.match(r"python (train|sample)\.py (.*metric=f\w+_[id].*)", line)) is not None:
            compose(found[1], shlex.split(found[2], comments=True))


@pytest.mark.parametrize("page", COMMANDS)
def test_the_commands_of_a_page(page: str, shared: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(shared, home)
    if page == "docs/reproduce.md":  # after the training that its text names
        Family.load("pretrained:dead_leaves16").save(home / "runs" / "dead_leaves16" / "family")
    # data are prepared first, as pages say where they train on them
    for line in sorted(COMMANDS[page], key=lambda line: "mlem.data " not in line):
        if not any(re.match(begin, line) for begin in ELSEWHERE):
            run(line, home)
