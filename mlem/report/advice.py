"""The head of a family's report: what to run and why, from `recommendation.json`, or from `*/fastest.json`."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from mlem.comparison.fastest import NAME, RECOMMENDED, Advice, Fastest
from mlem.comparison.recommended import Recommended, renew
from mlem.files import damaged, read_object
from mlem.invocation import command, in_words_of_the_user
from mlem.report.html import Cell, Markup, join, table, tag

__all__ = ["Told", "advice", "fastest_of", "told"]


@dataclass(frozen=True)
class Told:
    """What to run, in words.

    Attributes:
        sentence: the recommendation, or that there is none.
        why: one line.
        command: to run; "" for none.
        expected: error and seconds, and on which machine; "" for none.
    """

    sentence: str
    why: str
    command: str = ""
    expected: str = ""

    @property
    def summary(self) -> dict[str, str]:
        """For the summary of a W&B run."""
        values = {"recommendation": self.sentence, "recommendation_why": self.why}
        values |= {"recommendation_command": self.command, "recommendation_expected": self.expected}
        return {name: value for name, value in values.items() if value}


def fastest_of(folder: Path) -> tuple[Path, Fastest] | None:
    """The comparison of all rivals in a run folder, if there is one. Raises ValueError for a damaged file."""
    paths = sorted(folder.glob(f"*/{NAME}"))
    return (paths[0], Fastest.load(paths[0])) if paths else None


def advice(folder: Path) -> Markup:
    """What to run; empty for a folder without a family. Raises ValueError for a damaged file."""
    found = _found(folder)
    if found is None:
        return Markup()
    words, advised = found
    parts = [tag("p", words.sentence, class_="first")]
    if words.command:
        parts.append(tag("pre", words.command, tabindex="0"))
    parts += [tag("p", text) for text in (words.why, words.expected) if text]
    if advised is not None and advised.alternatives:
        parts.append(_instead(advised))
    return tag("section", *parts, class_="advice", aria_label="What to run")


def told(folder: Path) -> Told | None:
    """What to run, in words; None for a folder without a family."""
    found = _found(folder)
    return found and found[0]


def _found(folder: Path) -> tuple[Told, Advice | None] | None:
    rivals = fastest_of(folder)
    if rivals is not None and (advised := rivals[1].recommendation) is not None:
        return _of_rivals(*rivals, advised), advised
    family = folder / "family"
    if not (family / "family.json").exists():
        return None
    with damaged(family / "family.json"):
        several = len(read_object(family / "family.json")["levels"]) > 1
    if not several:
        return None
    found, where = renew(folder), _typed(family)
    if found is None:
        how = in_words_of_the_user(f"python -m mlem.multilevel calibrate {where}")
        return Told("Nothing is recommended: this family is not calibrated. Measure it first:", "", how), None
    if found.advice is None:
        return Told("Nothing is recommended for this family.", _as_sentence(found.why_not)), None
    return _of_family(found, found.advice, where), found.advice


def _of_family(found: Recommended, advised: Advice, where: str) -> Told:
    machine = f"on {found.machine}" if found.machine else "where it was calibrated"
    return _words(advised, f"family={where}", f"in batches of 64 {machine}")


def _of_rivals(path: Path, found: Fastest, advised: Advice) -> Told:
    """Advice for the family on which the rivals ran, which may differ from that of the run folder."""
    with damaged(path):
        about, machine = found.about, found.about["machine"]
        place = f"in batches of {about['batch_size']} on {machine.get('gpu', machine['processor'])}"
        source, kind = str(about["source"]), " sampler.options.kind=sde" if about["kind"] == "sde" else ""
    words = _words(advised, f"family={shlex.quote(source)}{kind}", place)
    sentence = f"On {source}, run{words.sentence.removeprefix('Run')}"
    return replace(words, sentence=sentence, expected=f"{words.expected} {_as_measured(found, advised.target)}".strip())


def _as_measured(found: Fastest, target: float) -> str:
    """The recommended settings and the best rival at this error, in words."""
    own = found.best(target, [RECOMMENDED])
    other = found.best(target, [group for group in found.groups if group != RECOMMENDED])
    words = [] if own is None else [f"Measured: {_ms(own.seconds)} for {own.mse:.2g}."]
    if other is not None:
        words.append(
            f"The fastest of all others that reach it: {other.group}, {_ms(other.seconds)} for {other.mse:.2g}."
        )
    return " ".join(words)


def _words(advised: Advice, options: str, place: str) -> Told:
    low, high = advised.interval
    return Told(
        f"Run {advised.text}: {_ms(advised.seconds)} per image for a mean squared error of at most {advised.target:g}.",
        f"Why: {_as_sentence(advised.why)}",
        f"{command('sample')} {options} sampler=auto mse={advised.target:g}",
        f"Expected: an error of {advised.mse:.2g} (95 percent: {low:.2g} to {high:.2g}) to the many-step run of the "
        f"largest level from the same noise; time {place}.",
    )


def _as_sentence(text: str) -> str:
    return in_words_of_the_user(text) + "." * (not text.endswith("."))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _typed(path: Path) -> str:
    """A path as one would type it here."""
    near = os.path.relpath(path)
    return shlex.quote(str(path.resolve()) if near.startswith("..") else near)


def _instead(advised: Advice) -> Markup:
    """The alternatives, collapsed."""
    rows = [
        [
            Cell(one.text, one.text),
            Cell(f"{1e3 * one.seconds:.3g}", one.seconds),
            Cell(f"{one.mse:.2g}", one.mse),
            Cell(f"{one.interval[0]:.2g} to {one.interval[1]:.2g}", one.interval[0]),
        ]
        for one in (advised, *advised.alternatives)
    ]
    columns = ["what to run", "time [ms/image]", "MSE", "95 % interval"]
    listed = table("The recommended settings and the best of other kinds, as predicted", columns, rows)
    return join([tag("details", tag("summary", "Alternatives"), listed)])
