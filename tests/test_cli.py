"""The command line: help, every config, and one line for every mistake."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from mlem.cli import main as cli
from mlem.cli import options
from mlem.cli.choices import CONFIGS
from mlem.cli.compose import compose, plain, sweep, without_secrets
from mlem.cli.options import OPEN, check, plan_defaults, rows
from mlem.cli.paths import folders, run_folder, training_command
from mlem.cli.ranks import new_fabric, world_size_of
from mlem.cli.usage import usage
from mlem.cli.values import parse_indices
from mlem.data import DATASETS
from mlem.denoiser import MixtureDenoiser
from mlem.multilevel.spec import PlanSpec
from mlem.sampling import Sampler, solver_of
from mlem.schedule import NoiseSchedule
from tests.commands import REPOSITORY, TINY, configure, environment, execute, job, run_here
from tests.conftest import SECRET

CHOICES = sorted((path.parent.name, path.stem) for path in CONFIGS.glob("*/*.yaml"))
NEEDED = {("schedule", "diffusers"): ["schedule.file=x.json"]}
COMMANDS = ("train", "sample")


def groups(name: str) -> dict[str, str]:
    """The groups of a command and their defaults."""
    defaults = OmegaConf.load(CONFIGS / f"{name}.yaml").defaults
    return {key: value for entry in defaults if entry != "_self_" for key, value in entry.items()}


def sampling(experiment: str) -> bool:
    """Whether it is one of sample.py."""
    return "override /eval:" in (CONFIGS / "experiment" / f"{experiment}.yaml").read_text()


@functools.cache
def chosen(name: str, group: str, choice: str) -> dict[str, Any]:
    """The options of a command with this choice."""
    return plain(configure(name, f"{group}={choice}", *NEEDED.get((group, choice), [])))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_choice_without_torch(name: str, tmp_path: Path) -> None:
    code = (
        f"import sys, runpy, time; sys.argv = ['{name}.py', '--help']; "
        f"runpy.run_path({str(REPOSITORY / f'{name}.py')!r}, run_name='__main__'); "
        "assert not {'torch', 'lightning', 'wandb', 'hydra'} & set(sys.modules); assert time.process_time() < 2"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for group, choice in CHOICES:
        if group in groups(name):
            comments = [line[2:] for line in (CONFIGS / group / f"{choice}.yaml").read_text().splitlines()]
            described = next(line for line in comments if not line.startswith("@package"))
            assert described, f"configs/{group}/{choice}.yaml says nothing of itself"
            listed = any(line.split() == [choice, *described.split()] for line in done.stdout.splitlines())
            assert listed == (group != "experiment" or sampling(choice) == (name == "sample"))


def test_every_group_belongs_to_a_command() -> None:
    assert {group for group, _ in CHOICES} == groups("train").keys() | groups("sample").keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_of_the_schema(name: str) -> None:
    """Whatever is chosen, so that each is checked and in the help; samplers may set options of plans too."""
    known = {row.name for row in rows(name)} | {f"sampler.{option}" for option in plan_defaults()}
    for group, choice in CHOICES:
        if group in groups(name) and (group != "experiment" or sampling(choice) == (name == "sample")):
            asked = leaves(chosen(name, group, choice))
            assert not {option for option in asked if not option.startswith(OPEN[1:])} - known


def test_a_new_option_of_plans_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In PlanSpec: the command line and its help follow."""

    @dataclass(frozen=True)
    class Longer(PlanSpec):
        tempo: int = field(default=3, metadata={"help": "how fast", "value": ">= 1", "choices": ()})

    monkeypatch.setattr(options, "PlanSpec", Longer)
    assert job("sample").shared["tempo"] == 3
    assert job("sample", "tempo=5").shared["tempo"] == 5
    assert re.search(r"^tempo: 3 +# how fast: >= 1$", usage("sample"), re.MULTILINE)
    with pytest.raises(ValueError, match=r"did you mean tempo\?$"):
        compose("sample", ["temop=5"])


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of the options of a config."""
    for key, value in node.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_config_composes(group: str, choice: str) -> None:
    for name in COMMANDS:
        if group in groups(name) and (group != "experiment" or sampling(choice) == (name == "sample")):
            check(chosen(name, group, choice))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("choice", [choice for group, choice in CHOICES if group == "sampler" and choice != "auto"])
def test_every_sampler_config_samples(choice: str) -> None:
    config, schedule = chosen("sample", "sampler", choice), NoiseSchedule.cosine()
    data = MixtureDenoiser(schedule, torch.ones(1), torch.zeros(1, 3), torch.ones(1))
    solver = solver_of(config["sampler"]["solver"], **config["sampler"].get("options", {}))
    sampler = Sampler(data, solver=solver, steps=2, grid=config["grid"], schedule=schedule, shape=(3,))
    assert torch.isfinite(sampler.run([0, 1]).x).all()


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "hydra.job_logging.handlers.file={class: subprocess.Popen, args: [touch, pwned]}"],
        ["hydra.job_logging.formatters.simple={'()': os.system}"],
        ["-m", "+hydra.callbacks.x._target_=os.system"],
        ["-m", "logger@hydra.job_logging=jsonl"],
        ["-m", "hydra.searchpath=[file:///tmp]"],
        ["--experimental-rerun", "job.pickle"],
        ["--config-dir", "/tmp"],
        ["-cd=/tmp"],
    ],
)
def test_settings_of_hydra_are_refused(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match=r"there is no such flag|Hydra's own settings"):
        sweep(arguments)


@pytest.mark.parametrize(
    ("name", "overrides", "nearest"),
    [
        ("train", ["model=family", "model.levls=[xs]"], "model.levels"),
        ("sample", ["experiment=error_vs_time", "eval.trals=3"], "eval.trials"),
    ],
)
def test_the_nearest_option_is_one_of_the_chosen_groups(name: str, overrides: list[str], nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"there is no such option; did you mean {nearest}\?$"):
        compose(name, overrides)


# option, and what the line must hold
MISTAKES = {
    "train": [
        ("modle=unet_xs", "modle: there is no such option; did you mean model?"),
        ("model=unet_xz", "model=unet_xz: there is no such model; did you mean unet_xs?"),
        ("training.stpes=3", "training.stpes: there is no such option; did you mean training.steps?"),
        ("evaluation.reference_step=3", "did you mean evaluation.reference_steps?"),
        ("data=null", f"data=null: there is no such data; there are: {', '.join(DATASETS)}"),
        ("experiment=error_vs_time", "is one of sample.py: python sample.py experiment=error_vs_time"),
        ("experiment=dmo", "experiment=dmo: there is no such experiment; did you mean demo?"),
        ("eval=benchmark", "eval=benchmark: train.py has no eval=, it belongs to sample.py; leave it out"),
        ("+training.step=5", "+training.step=5: there is no such option; did you mean training.steps? (+ adds only to"),
        ("+foo.bar=3", "+foo.bar=3: there is no such option (+ adds only to schedule, data.options, sampler.options)"),
        ("++training={stpes: 3}", "there is no such option; did you mean training.steps?"),
        (
            "trainer.devices=foo",
            "trainer.devices must be a whole number >= 1, a list of device numbers, or auto",
        ),
        (
            "trainer.devices=null",
            "device numbers, or auto, got None",
        ),
        ("trainer.accelerator=null", "trainer.accelerator must be text, got None"),
        ("trainer.num_nodes=0", "trainer.num_nodes must be a whole number >= 1, got 0"),
        ("trainer.num_nodes=2", "trainer.num_nodes=2 needs torchrun or srun on every machine: see docs/cluster.md"),
        ("schedule.offset=abc", "schedule.offset must be a number, got 'abc'"),
        ("training.steps=0", "training.steps must be a whole number >= 1, got 0"),
        ("training.steps=-1", "training.steps must be a whole number >= 1, got -1"),
        ("training.steps=2.5", "training.steps must be a whole number >= 1, got 2.5"),
        ("training.steps=true", "training.steps must be a whole number >= 1, got True"),
        ("training.steps=null", "training.steps must be a whole number >= 1, got None"),
        ("training=3", "training holds options: write training.OPTION=VALUE, got 3"),
        ("training.learning_rate=nan", "training.learning_rate must be a number > 0, got nan"),
        ("training.learning_rate=inf", "training.learning_rate must be a number > 0, got inf"),
        ("training.learning_rate=fast", "training.learning_rate must be a number > 0, got 'fast'"),
        ("training.learning_rate=1,2", "commas are for sweeps, with -m"),
        ("training.average_decay=1", "training.average_decay must be in [0, 1), got 1"),
        ("training.accumulate=3", "training.batch_size must be a multiple of training.accumulate 3, got 128"),
        ("trainer.precision=fp8", "trainer.precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ("logger.mode=on", "logger.mode must be one of"),
        ("seed=-1", "seed must be a whole number >= 0, got -1"),
        ("~seed", "~seed: options can be removed only from schedule, data.options, sampler.options; leave it out"),
        ("root=null", "root must be text, got None"),
        ("callbacks=x", "callbacks must be a list"),
        ("schedule=diffusers", "schedule.file must be given: add schedule.file=..."),
        ("seed=${nothing}", "nothing"),
        ("model=[", "model=[: cannot be parsed"),
        ("-x", "-x: there is no such flag"),
    ],
    "sample": [
        ("sampler=dddim", "sampler=dddim: there is no such sampler; did you mean ddim?"),
        ("steps=0", "steps must be a whole number >= 1, got 0"),
        ("steps=2.5", "steps must be a whole number >= 1, got 2.5"),
        ("grid=3", "grid must be text, got 3"),
        ("trainer=gpus", "did you mean gpu?"),
        ("experiment=demo", "experiment=demo is one of train.py: python train.py experiment=demo"),
        ("eval.name=foldr", "eval.name must be one of samples, folder, ref, benchmark, scaling, got 'foldr'"),
        ("eval.name=benchmark", "eval.name=benchmark has options of its own, which eval=benchmark brings"),
    ],
}


@pytest.mark.parametrize(("name", "option", "says"), [(name, *one) for name in MISTAKES for one in MISTAKES[name]])
def test_a_mistake_is_one_line(
    name: str, option: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", option])
    with pytest.raises(SystemExit) as stop:
        cli.run(name, lambda job: job.seed)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert not out
    assert err.startswith(f"{name}.py: ")
    assert says in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["model=family", "model.levels=null"],
            "model.levels must be a list of one or more sizes, such as [xs,s], got N",
        ),
        (
            ["model=family", "model.levels=xs"],
            "model.levels must be a list of one or more sizes, such as [xs,s], got 'x",
        ),
        (
            ["model=family", "model.levels=[]"],
            "model.levels must be a list of one or more sizes, such as [xs,s], got []",
        ),
        (
            ["model=family", "model.level_steps=[5,4]"],
            "model.level_steps must have one number for each of ['xs', 's', 'm'], got [5, 4]",
        ),
        (
            ["model=family", "model.level_steps=[5,4,0]"],
            "model.level_steps must be a list of whole numbers >= 1, or null, got [5, 4, 0]",
        ),
        (
            ["schedule=linear", "schedule.num_timesteps=abc"],
            "schedule.num_timesteps must be a whole number >= 2, got 'a",
        ),
    ],
)
def test_a_mistake_in_a_chosen_group(overrides: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        check(plain(configure("train", *overrides)))


def test_options_may_be_added_where_they_are_read() -> None:
    config = configure("sample", "+sampler.options.order=2", "++data.options.x=1", "++steps=7")
    assert (config.sampler.options.order, config.data.options.x, config.steps) == (2, 1, 7)
    assert configure("train", "+schedule.offset_=1").schedule.offset_ == 1


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_several_machines_reach_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    for name, ranks in (
        ("train", lambda trainer: world_size_of(trainer, 8, 1)),
        ("sample", lambda trainer: new_fabric(trainer).world_size),
    ):
        options = ["trainer=cpu", "trainer.num_nodes=2", "trainer.devices=4", "trainer.strategy=ddp"]
        check(plain(configure(name, *options)))
        trainer = job(name, *options).trainer
        assert trainer.place() == {"accelerator": "cpu", "devices": 4, "strategy": "ddp", "num_nodes": 2}
        monkeypatch.delenv("RANK")
        assert ranks(trainer) == 8
        monkeypatch.setenv("RANK", "0")


def test_what_lightning_refuses_is_one_line() -> None:
    for name, make in (("train", lambda trainer: world_size_of(trainer, 8, 1)), ("sample", new_fabric)):
        with pytest.raises(
            ValueError, match=r"^trainer: .*devices.* \(accelerator=cpu, devices=\[0, 1\], strategy=auto"
        ):
            make(job(name, "trainer=cpu", "trainer.devices=[0,1]").trainer)


# found by what needs torch, before anything is written
LATE = [
    (
        "evaluation.samplers=[{solver:ddim,steps:[2]},{solver:ddpm,steps:[1.5]}]",
        "evaluation.samplers[1].steps must be a list of step counts >= 1",
    ),
    ("evaluation.samplers=[{solver:ddpm,steps:[]}]", "evaluation.samplers[0].steps must be a list of step counts >= 1"),
    ("evaluation.samplers=[{solver:ddpm,stepz:[2]}]", "evaluation.samplers[0] must be {solver: name, steps: [n, ..]"),
    ("evaluation.samplers=[{solver:dpmm,steps:[2]}]", "did you mean ddpm?"),
    ("evaluation.samplers=[{solver:ddpm,steps:[2],grid:log}]", "grid must be one of"),
    ("evaluation.samplers=[{solver:'diffusers:Nothing',steps:[2]}]", "diffusers has no scheduler 'Nothing'"),
    (
        "evaluation.samplers=[{solver:randomized_midpoint,steps:[2],options:{clock:sun}}]",
        "evaluation.samplers[0]: clock must be one of kappa, ou, got 'sun'",
    ),
    ("evaluation.samplers=[]", "evaluation.samplers is empty: list one or more, such as [{solver: ddim, steps: [20]}]"),
    ("evaluation.samplers=[{solver:ddpm,steps:[8],plan:{budget:0.5}}]", "only plans, which need several levels, but"),
    (
        "evaluation.samplers=[{solver:ddim,steps:[2],forecast:{every:0}}]",
        "every of forecast must be a whole number >= 1",
    ),
    (
        "evaluation.samplers=[{solver:ddim,steps:[2]},{solver:ddim,steps:[3,2]}]",
        "evaluation.samplers[0] and evaluation.samplers[1]: ddim at 2 steps is listed twice; list it once",
    ),
    (
        "evaluation.indices=0",
        "evaluation.indices must be at least 2 samples, such as 0-63, for a standard error, got 0",
    ),
    ("metric.blocks=4", "metric.blocks must be in [1, 2] for 5 images, got 4"),
    ("evaluation.indices=3-1", "evaluation.indices must be ranges such as 0-63"),
    ("data.held_out=1797", "data.held_out must be in [2, 1796], got 1797"),
    ("data.held_out=1", "data.held_out must be in [2, 1796], got 1"),
    ("model.size=xxs", "network size must be one of xs, s, m, l, xl, got 'xxs'"),
    ("schedule.kind=sine", "schedule kind must be one of"),
    ("schedule.offset=nan", "offset must be positive, got nan"),
    ("metric=fid_inception", "weights file at"),
    ("trainer=gpu", "trainer: "),
    ("callbacks=[{_target_: torch.load}]", "torch.load is not a Lightning Callback class"),
    ("data.source=digit", "did you mean 'digits'"),
]


@pytest.mark.parametrize(("option", "says"), LATE)
def test_a_late_mistake_leaves_nothing_behind(
    option: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if option == "trainer=gpu" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the text is looked at below)
        run_here("train", *TINY, option)
    assert says in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_prediction_that_contradicts_the_schedule_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^prediction eps says nothing about the data without signal, "):
        run_here("train", *TINY, "schedule=flow", "model.prediction=eps")
    assert not list(tmp_path.iterdir())


def test_a_missing_schedule_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json"):
        run_here("train", *TINY, "schedule=diffusers", "schedule.file=scheduler_config.json")
    assert not list(tmp_path.iterdir())


def test_a_level_is_evaluated_where_it_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """model.size= takes another folder, and so leaves the results of unet_xs alone."""
    from mlem.cli import evaluation as evaluating

    places: list[Path] = []

    def evaluation(job: object, shards: object, folder: Path) -> None:
        places.append(folder)
        raise InterruptedError

    monkeypatch.setattr(evaluating, "evaluation", evaluation)
    asked = job("train", "model=unet_xs", "model.size=s")
    with pytest.raises(InterruptedError):
        evaluating.evaluate_family(asked, SimpleNamespace(names=["s"]), None)  # type: ignore[arg-type]
    assert places == [run_folder(asked, "s") / "evaluation"] == [Path("runs/digits/unet_s/evaluation")]
    assert folders(asked) == [Path("runs/digits/unet_s")]


def test_ranks_must_divide_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=3"]
    with pytest.raises(ValueError, match=r"multiple of ranks x accumulate = 3 x 1, got 8"):
        run_here("train", *TINY, *ranks)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "numbers"), [("0-3", [0, 1, 2, 3]), ("0-1,5", [0, 1, 5]), (7, [7]), (" 3 - 3 , 1", [3, 1])]
)
def test_indices(text: str | int, numbers: list[int]) -> None:
    assert [*parse_indices(text, "seeds")] == numbers


@pytest.mark.parametrize("text", ["3-1", "a", "", "1,,2", "-1", "1-", "0-3,2", "1.5", None])
def test_indices_that_are_none(text: str | None) -> None:
    with pytest.raises(ValueError, match=r"^seeds .*" + str(text)):
        parse_indices(text, "seeds")


def test_indices_with_commas_come_through_the_command_line() -> None:
    assert configure("sample", *sweep(["seeds=0-3,7"])[0]).seeds == "0-3,7"
    assert configure("train", *sweep(["evaluation.indices=0,2"])[0]).evaluation.indices == "0,2"


def test_a_process_ends_with_status_2_and_one_line_or_a_traceback(tmp_path: Path) -> None:
    done = execute("train", "trainig.steps=3", cwd=tmp_path)
    line = "train.py: trainig.steps: there is no such option; did you mean training.steps?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
    done = execute("train", "training.steps=0", "debug=true", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("ValueError: training.steps must be a whole number >= 1, got 0\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "command"),
    [
        ([], "python train.py model=family data=digits"),
        (["data=dead_leaves", "data.options.size=16"], "data=dead_leaves data.options.size=16"),
        (["data=folder", "data.options.crop=false", "root=a/b"], "data=folder data.options.crop=false root=a/b"),
    ],
)
def test_the_remedy_trains_on_the_same_data(overrides: list[str], command: str) -> None:
    asked = job("sample", *overrides)
    said = training_command("family", asked.root, asked.data)
    assert said.startswith("python train.py model=family data=")
    assert said.endswith(command)
    again = configure("train", *said.split()[2:])
    assert (again.data.name, again.root) == (asked.data.name, asked.root)


def test_secrets_are_named_but_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLEM_SECRET", SECRET)
    config = OmegaConf.create(
        {
            "plain": "${oc.env:MLEM_SECRET}",
            "inside": "s3://${oc.env:MLEM_SECRET}@${name}",
            "indirect": ["${plain}", {"deep": "${inside}"}],
            "default": "${oc.env:MLEM_NONE,${plain}}",
            "decoded": "${oc.decode:${oc.env:MLEM_SECRET}}",
            "spelt": "${oc.${env}:MLEM_SECRET}",
            "env": "env",
            "name": "digits",
        }
    )
    told = without_secrets(config)
    assert SECRET not in str(told)
    assert told["inside"] == "s3://oc.env:MLEM_SECRET@digits"
    assert told["indirect"] == [told["plain"], {"deep": told["inside"]}]
    assert config.plain == SECRET  # the job itself gets it


def test_secrets_are_in_no_file_of_a_run(trained: Path) -> None:
    files = [path for path in trained.rglob("*") if path.is_file()]
    assert {"config.yaml", "settings.json"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert "oc.env:MLEM_SECRET" in (trained / "runs/tiny/unet_xs/config.yaml").read_text()


def test_a_callback_named_on_the_command_line_is_used(trained: Path) -> None:
    assert '"lr-AdamW"' in (trained / "runs/tiny/unet_xs/metrics.jsonl").read_text()


def test_sampling_without_a_family_says_how_to_make_one(tmp_path: Path) -> None:
    done = execute("sample", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "make one with: python train.py model=family data=digits" in done.stderr
    assert not list(tmp_path.iterdir())
