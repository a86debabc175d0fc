"""DeepCache: against partial forward passes written out by hand, when it begins afresh, what it costs, and mistakes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from torch.utils.flop_counter import FlopCounterMode

from mlem import Family, Level, NoiseSchedule, Plan, Reuse, Sampler, sample
from mlem.comparison.coupled import Comparison
from mlem.comparison.entry import Entry
from mlem.comparison.lineup import Lineup
from mlem.comparison.setup import Setup
from mlem.comparison.summary import ratios
from mlem.networks import DeepCache, by_position, dit
from mlem.networks.deep_cache import NOISE
from mlem.reusing import whole_calls
from mlem.sampling import Step
from tests.problems import gaussian, level

SHAPE = (2, 8, 8)
SMALL: dict[str, Any] = {"sample_size": 8, "in_channels": 2, "out_channels": 2, "norm_num_groups": 2}
SMALL |= {"block_out_channels": (4, 6), "layers_per_block": 2, "attention_head_dim": 2}
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "plain": (UNet2DModel, {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}),
    "attention": (
        UNet2DModel,
        {
            "down_block_types": ["AttnDownBlock2D"] * 2,
            "up_block_types": ["AttnUpBlock2D"] * 2,
            "num_class_embeds": 4,
        },
    ),
    "text": (
        UNet2DConditionModel,
        {
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "cross_attention_dim": 5,
        },
    ),
}
CONDITIONS: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "attention": {"class_labels": 3},
    "text": {"encoder_hidden_states": (None, 5)},
}


def network(kind: str) -> Any:
    cls, options = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(**SMALL, **options).eval()


def told(kind: str, rows: int) -> dict[str, Tensor]:
    known = {"class_labels": torch.arange(rows) % 4, "encoder_hidden_states": torch.randn(rows, 3, 5)}
    return {name: known[name] for name in CONDITIONS[kind]}


def joins(unet: Any, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> tuple[Any, list[Tensor], Any]:
    """The time embedding, the skip paths from the shallowest on, and a function that goes the way up from a path.

    up(path, feature): what the network says, where `feature` comes up from below at this path, and what came up at each
    path until then.
    """
    emb = unet.time_embedding(unet.time_proj(time))
    if "class_labels" in conditions:
        emb = emb + unet.class_embedding(conditions["class_labels"])
    text = conditions.get("encoder_hidden_states")

    def attended(block: Any, number: int, h: Tensor) -> Tensor:
        if not hasattr(block, "attentions"):
            return h
        if text is None:
            return block.attentions[number](h)
        return block.attentions[number](h, encoder_hidden_states=text, return_dict=False)[0]

    h = unet.conv_in(x)
    skips = [h]
    for block in unet.down_blocks:
        for number, resnet in enumerate(block.resnets):
            h = attended(block, number, resnet(h, emb))
            skips.append(h)
        for downsampler in block.downsamplers or []:
            h = downsampler(h)
            skips.append(h)
    middle = unet.mid_block(h, emb) if text is None else unet.mid_block(h, emb, encoder_hidden_states=text)

    def up(path: int, feature: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        parts = [(block, number) for block in unet.up_blocks for number in range(len(block.resnets))]
        came: dict[int, Tensor] = {}
        h = feature
        for own, (block, number) in zip(reversed(range(len(skips))), parts, strict=True):
            if own > path:
                continue
            came[own] = h
            h = attended(block, number, block.resnets[number](torch.cat([h, skips[own]], 1), emb))
            if number == len(block.resnets) - 1:
                for upsampler in block.upsamplers or []:
                    h = upsampler(h)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(h))), came

    return middle, skips, up


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_skipped_step_is_a_partial_forward_pass(kind: str) -> None:
    torch.manual_seed(1)
    unet, conditions = network(kind), told(kind, 3)
    x, other = torch.randn(2, 3, *SHAPE)
    time, later = torch.tensor([900.0, 500.0, 20.0]), torch.tensor([800.0, 400.0, 10.0])
    middle, skips, up = joins(unet, x, time, conditions)
    whole, came = up(len(skips) - 1, middle)
    assert torch.equal(whole, by_position(unet)(x, time, **conditions).sample)
    _, _, up_later = joins(unet, other, later, conditions)
    for branch in range(len(skips) - 1):
        cache = DeepCache(unet, Reuse(2, branch), SHAPE, CONDITIONS[kind])
        assert torch.equal(cache(x, time, **conditions).sample, whole)
        ran: list[int] = []
        hook = unet.mid_block.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        found = cache(other, later, **conditions).sample
        hook.remove()
        truth, _ = up_later(branch, came[branch])
        assert torch.equal(found, truth)
        assert not ran
        assert not torch.allclose(truth, by_position(unet)(other, later, **conditions).sample, rtol=1e-3)
        assert torch.equal(cache(x, time, **conditions).sample, whole)  # the third call is whole again
    with pytest.raises(
        ValueError, match=rf"^branch of reuse must be in \[0, {branch}\] for this UNet, got {branch + 1}$"
    ):
        DeepCache(unet, Reuse(2, branch + 1), SHAPE, CONDITIONS[kind])


@torch.no_grad()
def test_a_unet_on_patches_reuses_features_of_the_unet_within() -> None:
    patched: Any = level("xs", (1, 16, 16)).network.eval()
    cache, within = (
        DeepCache(one, Reuse(2, 1), shape) for one, shape in ((patched, (1, 16, 16)), (patched.unet, (4, 8, 8)))
    )
    for time in (900.0, 700.0, 500.0):
        x, t = torch.randn(2, 1, 16, 16), torch.full((2,), time)
        assert torch.equal(cache(x, t).sample, pixel_shuffle(within(pixel_unshuffle(x, 2), t).sample, 2))
    assert cache.shallow_share == within.shallow_share < 0.8


def test_every_evaluation_whole_is_the_level_itself_bit_for_bit() -> None:
    model = level("s", SHAPE)
    before = dict(model.network.state_dict())
    options: dict[str, Any] = {"indices": range(3), "solver": "dpm_solver_pp", "steps": 6}
    plain, whole, half = (sample(model, reuse=reuse, **options) for reuse in (None, Reuse(1), Reuse(2)))
    assert torch.equal(plain.x, whole.x)
    assert plain.ledger.levels["s"].flops == whole.ledger.levels["s"].flops
    assert not torch.allclose(plain.x, half.x, atol=1e-3)
    assert before.keys() == model.network.state_dict().keys()
    assert torch.equal(sample(Family([model]), reuse=Reuse(2), **options).x, half.x)


@pytest.mark.parametrize("solver", ["ddpm", "heun"])
def test_each_batch_begins_afresh(solver: str) -> None:
    options: dict[str, Any] = {"solver": solver, "steps": 5, "reuse": Reuse(3, 1)}
    model = level("xs", SHAPE)
    alone = torch.cat([sample(model, indices=[index], **options).x for index in range(5)])
    together = sample(model, indices=range(5), batch_size=3, **options)
    torch.testing.assert_close(together.x, alone, rtol=1e-6, atol=2e-5)


def test_a_run_after_one_that_was_broken_off_begins_afresh() -> None:
    broken = [True]

    def watch(step: Step) -> None:
        if broken and step.number == 2:
            raise KeyboardInterrupt

    sampler = Sampler(level("xs", SHAPE), solver="ddim", steps=4, reuse=Reuse(3), watch=watch)
    with pytest.raises(KeyboardInterrupt):
        sampler.run([7, 8])
    broken.clear()
    found, again = sampler.run([0, 1]), sampler.run([0, 1])
    assert torch.equal(found.x, again.x)
    assert found.ledger.levels["xs"].calls == again.ledger.levels["xs"].calls == 8
    assert found.ledger.levels["xs"].flops == again.ledger.levels["xs"].flops


def test_called_alone_it_begins_afresh_with_another_number_of_rows() -> None:
    cache = DeepCache(network("plain"), Reuse(5), SHAPE)
    x, time = torch.randn(3, *SHAPE), torch.full((3,), 5.0)
    with torch.no_grad():
        first = cache(x, time).sample
        assert torch.equal(cache(x[:2], time[:2]).sample, by_position(cache.network)(x[:2], time[:2]).sample)
        assert not torch.equal(cache(x[1:], time[1:]).sample, first[1:])  # on what x[:2] left


def test_the_ledger_counts_what_ran() -> None:
    model = level("s", SHAPE)
    sampler = Sampler(model, solver="ddim", steps=7, reuse=Reuse(3, 1))
    with FlopCounterMode(display=False) as counter:
        ledger = sampler.run(range(2)).ledger
    cost = ledger.levels["s"]
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=1e-12)
    assert cost.calls == 14
    assert cost.flops < 0.8 * 14 * model.flops
    assert cost.seconds > 0


def labelled(kind: str = "attention") -> Level:
    return Level("a", network(kind), NoiseSchedule.cosine(), SHAPE, conditions={**CONDITIONS[kind]})


def test_under_guidance_both_sides_reuse_their_own_features() -> None:
    """At scale 1 guidance is nothing: the told side alone."""
    family = Family([labelled()])
    options: dict[str, Any] = {"indices": range(3), "steps": 4, "solver": "ddim"}
    plain = sample(family, reuse=Reuse(2), **options)
    guided = sample(family.guided(1.0), reuse=Reuse(2), **options)
    torch.testing.assert_close(guided.x, plain.x, rtol=1e-5, atol=1e-5)
    assert guided.ledger.levels["a"].flops == pytest.approx(2 * plain.ledger.levels["a"].flops, rel=1e-12)
    whole = sample(family.guided(2.0), reuse=Reuse(1), **options)
    assert torch.equal(whole.x, sample(family.guided(2.0), **options).x)


def test_under_a_plan_the_largest_level_reuses_its_features() -> None:
    """Twice, so that nothing of one trajectory is in the next."""
    family, table = Family([level("xs", SHAPE), level("s", SHAPE)]), torch.zeros(7, 2)
    table[[1, 2, 4, 6], 1] = 1
    options: dict[str, Any] = {
        "solver": "unipc",
        "steps": 7,
        "grid": "uniform",
        "plan": Plan.given(table, levels=family.names),
    }
    plain, whole, half = (Sampler(family, reuse=reuse, **options) for reuse in (None, Reuse(1), Reuse(2, 1)))
    first = half.run(range(3))
    assert torch.equal(whole.run(range(3)).x, plain.run(range(3)).x)
    assert torch.equal(half.run(range(3)).x, first.x)
    assert not torch.equal(first.x, plain.run(range(3)).x)
    cost, share = first.ledger.levels["s"], DeepCache(family.level().network, Reuse(2, 1), SHAPE).shallow_share
    assert cost.calls == 4 * 3
    assert cost.flops == pytest.approx((2 + 2 * share) * 3 * family.level().flops)


def test_features_kept_near_pure_noise_serve_only_there() -> None:
    """Alone, and under a plan that calls the level rarely: one whole call more, at the first one below."""
    family, reuse, table = Family([level("xs", SHAPE), level("s", SHAPE)]), Reuse(5, 1), torch.zeros(12, 2)
    table[[0, 3, 5, 6, 7, 9], 1] = 1
    share = DeepCache(family.level().network, reuse, SHAPE).shallow_share
    for plan, whole, calls in ((None, 4, 12), (Plan.given(table, levels=family.names), 2, 6)):
        sampler = Sampler(family, solver="unipc", steps=12, grid="uniform", plan=plan, reuse=reuse)
        assert [point.kappa > NOISE for point in sampler.points[:4]] == [True, False, False, False]
        cost = sampler.run(range(2)).ledger.levels["s"]
        assert cost.flops == pytest.approx((whole + (calls - whole) * share) * 2 * family.level().flops)
        assert whole_calls(reuse, sampler.points[:12], plan) == whole
    found = [reuse.whole_at(kappas) for kappas in ([], [1.0] * 6, [99.0] * 3, [99.0] * 7, [99.0, *[1.0] * 6])]
    assert found == [0, 2, 1, 2, 3]
    assert reuse.whole_at([math.nan] * 11) == reuse.whole(11) == 3


def test_in_a_comparison_it_is_a_sampler_of_the_largest_level() -> None:
    family = Family([level("xs", SHAPE), level("s", SHAPE)])
    one = {"solver": "dpm_solver_pp", "steps": [5]}
    plans = [one, one | {"reuse": {"every": 2}}, one | {"reuse": {"every": 3, "branch": 1}}]
    entries = [Entry.from_options(plan, f"evaluation.samplers[{number}]") for number, plan in enumerate(plans)]
    lineup = Lineup(Setup(family, [[0, 1], [2]], reference_steps=12), entries)
    for block in ([0, 1], [2]):
        lineup.add(block)
    _, plain, two, three = lineup.rows()
    labels = ["dpm_solver_pp", "dpm_solver_pp_reuse-2_branch-2", "dpm_solver_pp_reuse-3_branch-1"]
    assert [row.sampler for row in (plain, two, three)] == labels
    assert two.solver == "dpm_solver_pp(reuse=2, branch=2)"
    assert {row.level for row in (plain, two, three)} == {"s"}
    assert plain.evaluations == two.evaluations == 5
    runs = [tally.run for tally in lineup.tallies]
    for row, run in zip((plain, two, three), runs[1:], strict=True):
        assert row.flops == pytest.approx(run.cost * family.level().flops, rel=1e-12)
    assert three.flops < two.flops < plain.flops
    assert len({plain.mse, two.mse, three.mse}) == 3


def test_a_benchmark_compares_it_with_levels_alone_and_tells_reuses_apart(tmp_path: Path) -> None:
    def entry(**options: Any) -> Entry:
        return Entry.from_options({"solver": "ddim", "steps": [2, 4, 8]} | options, "here", named=True)

    comparison = Comparison(Family([level("xs", SHAPE)]), range(3), tmp_path, reference_steps=16)
    plain, two = (comparison.runs(one) for one in (entry(name="DDIM"), entry(name="kept", reuse={"every": 2})))
    comparison.measure([*plain, *two])
    found = ratios(comparison, [*plain, *two], draws=2)
    assert [one.sampler for one in found] == ["kept"] * 2  # between two of the three errors of the level alone
    (row,) = [row for row in comparison.rows if row.sampler == "kept" and row.steps == 8]
    share = DeepCache(comparison.family.level().network, Reuse(2), SHAPE).shallow_share
    assert row.flops == pytest.approx((4 + 4 * share) * comparison.family.level().flops)
    assert not comparison.missing(two)
    assert len(comparison.missing(comparison.runs(entry(name="kept", reuse={"every": 3})))) == 3


def test_a_plan_of_a_comparison_reuses_the_features_of_the_largest_level() -> None:
    family = Family([level("xs", SHAPE), level("s", SHAPE)])
    one: dict[str, Any] = {"solver": "unipc", "steps": [6], "rival": "T-Stitch", "running": [["xs", 0.5], ["s", 0.5]]}
    plain, kept, small = (
        Entry.from_options(one | more, "here", named=True)
        for more in ({}, {"reuse": {"every": 2, "branch": 1}}, {"running": [["xs", 1.0]], "reuse": {"every": 2}})
    )
    assert kept.label == "T-Stitch, 0.5 xs + 0.5 s, every 2, branch 1"
    lineup = Lineup(Setup(family, [[0, 1]], reference_steps=12), [plain, kept, small])
    lineup.add([0, 1])
    *_, whole, half, none = lineup.rows()
    runs = [tally.run for tally in lineup.tallies][-3:]
    share = DeepCache(family.level().network, Reuse(2, 1), SHAPE).shallow_share
    assert runs[0].cost - runs[1].cost == pytest.approx(1 - share)
    for row, run in zip((whole, half, none), runs, strict=True):
        assert row.flops == pytest.approx(run.cost * family.level().flops, rel=1e-12)
    assert half.mse != whole.mse
    assert half.calls == whole.calls


def test_a_comparison_counts_whole_calls_near_pure_noise() -> None:
    family = Family([level("xs", SHAPE), level("s", SHAPE)])
    one: dict[str, Any] = {"solver": "unipc", "steps": [12], "grid": "uniform", "rival": "T-Stitch"}
    one["running"] = [["s", 0.5], ["xs", 0.5]]
    lineup = Lineup(
        Setup(family, [[0, 1]], reference_steps=16),
        [Entry.from_options(one | {"reuse": {"every": 3, "branch": 1}}, "here", named=True)],
    )
    lineup.add([0, 1])
    share = DeepCache(family.level().network, Reuse(3, 1), SHAPE).shallow_share
    tally, row = lineup.tallies[-1], lineup.rows()[-1]
    assert tally.run.cost == pytest.approx(3 + 3 * share + 6 * family.level("xs").flops / family.level().flops)
    assert row.flops == pytest.approx(tally.run.cost * family.level().flops, rel=1e-12)


def test_a_comparison_refuses_reuse_where_every_sample_has_its_own_coins() -> None:
    plan = {"probabilities": [1.0, 0.5], "estimator": "jump", "per_sample": True}
    one = {"solver": "ddim", "steps": [6], "plan": plan, "reuse": {"every": 2, "branch": 1}}
    setup = Setup(Family([level("xs", SHAPE), level("s", SHAPE)]), [[0, 1]], reference_steps=12)
    with pytest.raises(ValueError, match=r"^reuse= keeps features of a batch, but per_sample coins run part of it; "):
        Lineup(setup, [Entry.from_options(one, "here")]).add([0, 1])


def mistakes() -> dict[str, tuple[Any, dict[str, Any]]]:
    """What is said -> the model, and options beside the reuse."""
    small, cosine = level("xs", SHAPE), NoiseSchedule.cosine()
    skipping = {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"], "up_block_types": ["UpBlock2D"] * 2}
    transformer = Level("d", dit("s", SHAPE), cosine, SHAPE, conditions={"class_labels": 1})
    unknown = Level("k", UNet2DModel(**SMALL | {"norm_num_groups": 1}, **skipping), cosine, SHAPE, flops=1)
    return {
        "features are reused in a UNet2DModel or a UNet2DConditionModel or a PatchUNet2DModel, but this is a "
        "DiTTransformer2DModel; leave out reuse": (transformer, {}),
        "features are reused in a UNet of DownBlock2D, AttnDownBlock2D, CrossAttnDownBlock2D, but this one has a "
        "SkipDownBlock2D; leave out reuse": (unknown, {}),
        "reuse= needs the network of a Level, but the model is a bare denoiser; leave out reuse": (
            gaussian(cosine),
            {"shape": (3,)},
        ),
        "reuse= keeps features of a batch, but per_sample coins run part of it; leave one out": (
            Family([small, level("s", SHAPE)]),
            {"plan": Plan.draw(torch.ones(4, 2), per_sample=True)},
        ),
        "parallel_midpoint solves for many times at once: leave out reuse": (small, {"solver": "parallel_midpoint"}),
        "level a is guided by a weaker one, or in an interval: leave out reuse, or weak= and interval=": (
            Family([labelled()]).guided(2.0, interval=(0.2, 5.0)),
            {},
        ),
    }


def test_what_cannot_reuse_features_is_told_so() -> None:
    for message, (model, options) in mistakes().items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            Sampler(model, steps=4, reuse=Reuse(2), **options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every": 0}, "every of reuse must be a whole number >= 1, got 0"),
        ({"every": 2, "branch": -1}, "branch of reuse must be a whole number >= 0, got -1"),
        (3, "reuse must be {every: n}, optionally with branch: n, got 3"),
        ({"branch": 1}, "reuse must be {every: n}, optionally with branch: n, got {'branch': 1}"),
    ],
)
def test_a_list_of_samplers_says_what_is_wrong_with_a_reuse(wrong: Any, message: str) -> None:
    entry = {"solver": "ddim", "steps": [2], "reuse": wrong}
    with pytest.raises(ValueError, match=rf"^here: {re.escape(message)}$"):
        Entry.from_options(entry, "here")
