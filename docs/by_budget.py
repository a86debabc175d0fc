"""The figure docs/by_budget.html: which networks run at each step, by what a picture may cost.

`python docs/by_budget.py` writes it from the plans for the family that comes along. A slider chooses the budget;
without JavaScript the budgets stand one below another. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mlem import Family, Sampler
from mlem.comparison.calls import Calls

PAGE = Path(__file__).with_name("by_budget.html")
BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
FIRST = BUDGETS.index(0.2)
"""That is shown before the slider is moved."""
WIDTH, ROW, HEIGHT, LEFT = 14, 18, 90, 30
"""Pixels: of an evaluation, of a level, of the probabilities, of the names."""
LINES = (("dotted", "2 4"), ("dashed", "8 3"), ("solid", ""))
"""Of the levels, smallest first."""

HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Which networks run, by budget</title>
<style>
:root { color-scheme: light dark }
body { font: 15px/1.4 sans-serif; max-width: 40rem; margin: .5rem auto; padding: 0 .5rem }
label, input, svg { display: block; width: 100% }
figure { margin: 0 0 2rem }
text { font-size: 14px; fill: currentColor }
.calls { fill: #888 }
.frame, .line { fill: none; stroke: currentColor } .frame { stroke: #aaa }
</style>
<form hidden><label for="budget">What a picture may cost</label>
<input id="budget" type="range" min="0" max="LAST" value="FIRST"></form>
"""
TAIL = """<script>
const slider = document.getElementById("budget"), figures = [...document.querySelectorAll("figure")];
function show() {
  figures.forEach((figure, number) => { figure.hidden = number != slider.value; });
  slider.setAttribute("aria-valuetext", figures[slider.value].dataset.budget);
}
slider.form.hidden = false;
slider.addEventListener("input", show);
show();
</script>
</html>
"""


def page() -> str:
    """All of the file."""
    family = Family.load("pretrained:dead_leaves16")
    head = HEAD.replace("LAST", str(len(BUDGETS) - 1)).replace("FIRST", str(FIRST))
    return "".join([head, *(figure(family, budget) for budget in BUDGETS), TAIL])


def figure(family: Family, budget: float) -> str:
    """One budget: strip of calls, probabilities, words."""
    largest, plan = family.names[-1], family.plan(budget=budget, cost="flops")
    sampler = Sampler(family, solver="dpm_solver_pp", steps=32, plan=plan)
    assert sampler.plan is not None
    calls = Calls.of("plan", sampler.plan, family.names, sampler.solver, sampler.points)
    assert calls is not None
    share = f"{budget:.0%}".replace("%", " percent")
    words = (
        f"Calls at each of {len(calls.times)} evaluations, from noise to picture, for {share} of what {largest} costs "
        f"at every one: {calls.text.removeprefix('plan: ')}."
    )
    width, height = LEFT + WIDTH * len(calls.times), ROW * len(family.names) + HEIGHT + 34
    kinds = ", ".join(f"{kind} for {name}" for name, (kind, _) in zip(family.names, LINES, strict=True))
    seen = f"Boxes are calls; lines ({kinds}) p_k(t), one over the distance between two measurements of the correction."
    return (
        f'<figure data-budget="{share}"><svg viewBox="0 0 {width + 1} {height}" role="img" aria-label="{words}">\n'
        f"{''.join(parts(calls, family.names))}</svg>\n<figcaption>{words} {seen}</figcaption></figure>\n"
    )


def parts(calls: Calls, names: Sequence[str]) -> Iterator[str]:
    """What is drawn: the largest level on top, below all of them p_k against the same evaluations."""
    count, bottom = len(calls.times), ROW * len(names) + 8 + HEIGHT
    for place, name in enumerate(reversed(names)):
        yield f'<text x="0" y="{ROW * place + 14}">{name}</text>'
        yield f'<rect class="frame" x="{LEFT}" y="{ROW * place}" width="{WIDTH * count}" height="{ROW}"/>\n'
        if name not in calls.levels:
            continue
        number = calls.levels.index(name)
        boxes = (
            f"M{LEFT + WIDTH * at + 1} {ROW * place + 1}h{WIDTH - 2}v{ROW - 2}h{2 - WIDTH}z"
            for at, row in enumerate(calls.runs)
            if row[number]
        )
        yield f'<path class="calls" d="{"".join(boxes)}"/>\n'
        rates = [row[number] for row in calls.probabilities]
        steps = "".join(f"V{bottom - HEIGHT * p:.0f}h{WIDTH}" for p in rates)
        _, dashes = LINES[names.index(name)]
        yield f'<path class="line" stroke-width="2" stroke-dasharray="{dashes}" d="M{LEFT} {bottom}{steps}"/>\n'
    yield f'<path class="frame" d="M{LEFT} {bottom - HEIGHT}v{HEIGHT}h{WIDTH * count}"/>'
    for y, text in ((bottom - HEIGHT + 10, "1"), (bottom, "0")):
        yield f'<text x="10" y="{y}">{text}</text>'
    yield f'<text x="0" y="{bottom - HEIGHT // 2}">p<tspan dy="3" font-size="9">k</tspan></text>'
    for x, anchor, text in (
        (0, "start", f"noise, t = {calls.times[0]:.2f}"),
        (WIDTH * count, "end", f"picture, t = {calls.times[-1]:.2f}"),
    ):
        yield f'<text x="{LEFT + x}" y="{bottom + 18}" text-anchor="{anchor}">{text}</text>'


if __name__ == "__main__":
    PAGE.write_text(page())
