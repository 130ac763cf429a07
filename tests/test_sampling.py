"""``fastgen.sample``: a Loop from the first noise to the samples, and what it refuses."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

import fastgen
from fastgen import Loop, NoiseSchedule, sample, solvers
from fastgen.testing import assert_bitwise
from shared import network

SCHEDULE = NoiseSchedule.linear()
DDIM = solvers.ddim(SCHEDULE, 5)
NOISY = solvers.ddim(SCHEDULE, 5, 1.0, clip=2.0)
PLANS = [DDIM, NOISY, solvers.ddpm(SCHEDULE, 5), solvers.dpmpp_2m(SCHEDULE, 5, clip=2.0)]
SHAPE = (3, 2, 7)
OTHER = torch.zeros(3)


def start() -> torch.Tensor:
    return fastgen.randn(SHAPE, seed=1)


def run(plan, x, seed=None) -> torch.Tensor:
    loop = Loop(plan, x, seed=seed)
    while not loop.done:
        loop.step(network(loop.model_input, loop.time))
    return loop.x


def test_sample_is_a_loop_from_the_first_noise():
    for plan in PLANS:
        expected = run(plan, fastgen.randn(SHAPE, seed=3), seed=3 if plan.stochastic else None)
        assert_bitwise(sample(network, plan, SHAPE, seed=3), expected)
        again = sample(network, plan, x=fastgen.randn(SHAPE, seed=3), seed=3)
        assert_bitwise(again, expected)


def test_sample_follows_dtype_and_device():
    result = sample(network, NOISY, SHAPE, seed=3, dtype=torch.bfloat16, device="cpu")
    expected = run(NOISY, fastgen.randn(SHAPE, seed=3, dtype=torch.bfloat16), seed=3)
    assert_bitwise(result, expected)
    assert sample(network, DDIM, SHAPE, seed=3, dtype=torch.float64).dtype == torch.float64


def test_a_result_with_a_sample_attribute_is_accepted():
    def model(x, t, cond):
        return types.SimpleNamespace(sample=network(x, t))

    expected = sample(network, DDIM, SHAPE, seed=3)
    assert_bitwise(sample(model, DDIM, SHAPE, seed=3), expected)


def test_the_callback_sees_the_loop_after_every_step():
    seen = []

    def watch(loop):
        assert isinstance(loop, Loop)
        seen.append((loop.index, loop.done, loop.x.clone()))

    result = sample(network, DDIM, SHAPE, seed=3, callback=watch)
    assert [(i, done) for i, done, _ in seen] == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 1)]
    assert_bitwise(seen[-1][2], result)


def test_the_progress_bar_counts_the_steps(capsys):
    pytest.importorskip("tqdm")
    sample(network, DDIM, SHAPE, seed=3, progress=True)
    assert "5/5" in capsys.readouterr().err
    sample(network, DDIM, SHAPE, seed=3)
    assert capsys.readouterr().err == ""


def test_conditions_may_be_any_tree_of_tensors():
    cond = {"class": torch.tensor([0.1, 0.2, 0.3]), "pair": (torch.ones(3, 1), [torch.ones(3)])}
    uncond = {"class": torch.zeros(3), "pair": (torch.zeros(3, 1), [torch.zeros(3)])}

    def model(x, t, tree):
        extra = tree["pair"][0].view(-1) * 0.5 + tree["pair"][1][0] * 0.25
        return network(x, t, tree["class"] + extra)

    flat = cond["class"] + (torch.ones(3) * 0.5 + 0.25)
    expected = sample(network, DDIM, SHAPE, seed=3, guidance_scale=2.0, cond=flat,
                      uncond=torch.zeros(3))  # fmt: skip
    result = sample(model, DDIM, SHAPE, seed=3, guidance_scale=2.0, cond=cond, uncond=uncond)
    assert_bitwise(result, expected)
    # without guidance the tree goes to the network as it is
    sample(lambda x, t, tree: network(x, t) if tree is cond else None, DDIM, SHAPE, seed=3,
           cond=cond)  # fmt: skip


def test_no_gradient_is_recorded_in_the_network():
    weight = torch.ones(()).requires_grad_()
    assert not sample(lambda x, t, c: weight * network(x, t), DDIM, SHAPE, seed=3).requires_grad


def test_a_callback_may_change_the_sample_in_place():
    seen = []

    def model(x, t, cond):
        seen.append(x.clone())
        return network(x, t)

    sample(model, DDIM, (2, 3), seed=0, guidance_scale=2.0,
                   cond=torch.zeros(2), uncond=torch.zeros(1),
                   callback=lambda loop: loop.x.mul_(0.0))  # fmt: skip
    assert all(not x.any() for x in seen[1:])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sample(network, DDIM, SHAPE, x=start(), seed=0), ValueError, "x.*got shape and x"),
        (lambda: sample(network, DDIM, seed=0), ValueError, "shape, x.*got none"),
        (lambda: sample(network, DDIM, SHAPE), ValueError, "seed"),
        (lambda: sample(network, NOISY, x=start()), ValueError, "seed"),
        (lambda: sample(network, DDIM, SHAPE, seed=0, guidance_scale=2.0, cond=OTHER),
         ValueError, "uncond: got None"),
        (lambda: sample(network, DDIM, SHAPE, seed=0, cond=OTHER, uncond=OTHER),
         ValueError, "guidance_scale: got None"),
        (lambda: sample(network, DDIM, start()), TypeError, "shape: got a Tensor.*x="),
        (lambda: sample(network, DDIM, SHAPE, seed=0, guidance_scale=2.0, uncond=OTHER),
         ValueError, "cond"),
        (lambda: sample(network, DDIM, x=start(), dtype=torch.float32), ValueError, "dtype"),
        (lambda: sample(network, DDIM, x=start(), device="cpu"), ValueError, "device"),
        (lambda: sample(network, DDIM, SHAPE, seed=0, dtype=torch.int64), TypeError, "int64"),
        (lambda: sample(network, DDIM, (), seed=0), ValueError, "shape"),
        (lambda: sample(lambda x, t, c: x[:1], DDIM, SHAPE, seed=0), ValueError, "output"),
        (lambda: sample(lambda x, t, c: None, DDIM, SHAPE, seed=0), TypeError, "output"),
        (lambda: sample(network, DDIM, x=start(), seed="abc"), TypeError, "seed"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("cond", "uncond", "error"),
    [
        (torch.zeros(2), torch.zeros(3), ValueError),
        (torch.zeros(2), 10, TypeError),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}, ValueError),
        ({"a": torch.zeros(2)}, torch.zeros(2), ValueError),
        (3, 10, ValueError),
        (3, 3.0, ValueError),
        (["a cat"], ["a dog"], ValueError),
        (np.ones(2), np.zeros(2), ValueError),
        (torch.zeros(2, 3), torch.zeros(2, 4), ValueError),
        (torch.tensor(1.0), torch.tensor(2.0), ValueError),
    ],
)
def test_conditions_that_do_not_match_are_refused(cond, uncond, error):
    with pytest.raises(error, match="uncond: got"):
        sample(lambda x, t, c: x, DDIM, (2, 3), seed=0, guidance_scale=2.0,
                       cond=cond, uncond=uncond)  # fmt: skip


def test_conditions_without_a_batch_are_those_of_both():
    seen = []

    def model(x, t, cond):
        seen.append(cond[1:])
        return network(x, t, cond[0])

    shared = [None, "words", 2, torch.tensor(0.5)]
    sample(model, DDIM, SHAPE, seed=3, guidance_scale=2.0, cond=[OTHER + 1, *shared],
           uncond=[OTHER, *shared])  # fmt: skip
    assert seen == [shared] * 5


@pytest.mark.parametrize("rows", [(4, 4), (2, 4), (4, 2)])
def test_a_condition_has_the_batchs_rows_or_one(rows):
    cond, uncond = (torch.zeros(n, 2) for n in rows)
    with pytest.raises(ValueError, match=r"cond: got shape \(4, 2\), expected 2 rows"):
        sample(network, DDIM, (2, 3), seed=0, guidance_scale=2.0, cond=cond, uncond=uncond)


def test_one_row_of_a_condition_is_every_samples():
    def model(x, t, cond):
        assert cond.shape == (6,)
        return network(x, t, cond)

    one, many = torch.tensor([0.5]), torch.full((3,), 0.5)
    results = [
        sample(model, DDIM, SHAPE, seed=3, guidance_scale=2.0, cond=cond, uncond=uncond)
        for cond, uncond in ((one, 0 * one), (many, 0 * many), (one, 0 * many))
    ]
    assert_bitwise(results[1:], results[:1] * 2)


def test_keys_may_stand_in_any_order():
    def model(x, t, cond):
        return network(x, t, cond["a"]) + network(x, t, cond["b"])

    cond, uncond = {"a": OTHER + 1, "b": OTHER + 2}, {"b": OTHER, "a": OTHER - 1}
    results = [
        sample(model, DDIM, SHAPE, seed=3, guidance_scale=2.0, cond=cond, uncond=u)
        for u in (uncond, {"a": uncond["a"], "b": uncond["b"]})
    ]
    assert_bitwise(*results)
    with pytest.raises(ValueError, match=r"uncond: got a dict .*'c'"):
        sample(model, DDIM, SHAPE, seed=3, guidance_scale=2.0, cond=cond,
               uncond={"a": OTHER, "c": OTHER})  # fmt: skip


def test_equal_arrays_are_shared():
    shared = {"size": np.array([2, 7]), "class": OTHER}
    other = {"size": np.array([2, 7]), "class": OTHER + 1}
    model = lambda x, t, cond: network(x, t, cond["class"])  # noqa: E731
    sample(model, DDIM, SHAPE, seed=3, guidance_scale=2.0, cond=other, uncond=shared)


def test_guidance_of_one_calls_the_network_with_cond_alone():
    rows = []

    def model(x, t, cond):
        rows.append(len(x))
        return network(x, t, cond)

    plain = sample(model, DDIM, SHAPE, seed=3, cond=OTHER + 1)
    for options in ({"guidance_scale": 1.0}, {"guidance_scale": 1, "uncond": OTHER}):
        assert_bitwise(sample(model, DDIM, SHAPE, seed=3, cond=OTHER + 1, **options), plain)
    assert set(rows) == {3}


def test_channels_last_is_kept():
    seen = []

    def model(x, t, cond):
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return network(x, t, cond)

    x = fastgen.randn((3, 4, 5, 6), seed=1).to(memory_format=torch.channels_last)
    guided = {"guidance_scale": 2.0, "cond": OTHER + 1, "uncond": OTHER}
    for options in ({}, guided):
        result = sample(model, DDIM, x=x, **options)
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert_bitwise(result, sample(network, DDIM, x=x.contiguous(), **options))
    assert all(seen)


# ---- runs that begin elsewhere, and images of which a part is kept -------------------------------

EDM = fastgen.edm_levels(fastgen.sigmas.karras(6))
STRAIGHT = fastgen.flow_levels(fastgen.sigmas.flow(6, 3.0))
MEMORYLESS = [
    DDIM, NOISY, solvers.ddpm(SCHEDULE, 6), solvers.euler_ancestral(STRAIGHT),
    solvers.lcm(STRAIGHT), solvers.dpmpp_2m(SCHEDULE, 1),
]  # fmt: skip


@pytest.mark.parametrize("plan", MEMORYLESS, ids=repr)
@pytest.mark.parametrize("guided", [False, True])
def test_a_run_that_begins_at_a_row_has_the_same_bits(plan, guided):
    seen = []
    options = {"seed": 3}
    if guided:
        options |= {"guidance_scale": 2.5, "cond": torch.ones(3), "uncond": torch.zeros(3)}
    whole = sample(network, plan, SHAPE, callback=lambda loop: seen.append(loop.x.clone()),
                   **options)  # fmt: skip
    for k in range(1, len(plan)):
        assert_bitwise(sample(network, plan, x=seen[k - 1], start=k, **options), whole)


@pytest.mark.parametrize("plan", [*MEMORYLESS, solvers.dpmpp_2m(EDM), solvers.heun(EDM)], ids=repr)
def test_a_run_goes_on_from_a_state(plan):
    states = []
    whole = sample(network, plan, SHAPE, seed=3, callback=lambda loop: states.append(
        loop.state_dict()))  # fmt: skip
    for state in states:
        assert_bitwise(sample(network, plan, state=state, seed=3), whole)
    with pytest.raises(ValueError, match="plan"):
        sample(network, solvers.ddpm(SCHEDULE, 9), state=states[0], seed=3)


def test_what_former_rows_keep_cannot_be_done_without():
    levels = SCHEDULE.levels(6)
    plan = solvers.dpmpp_2m(levels)
    with pytest.raises(ValueError, match=r"start: got 2.*levels\[start:\]"):
        sample(network, plan, x=start(), start=2)
    rest = solvers.dpmpp_2m(levels[2:])
    assert [row.model_time for row in rest.rows] == [row.model_time for row in plan.rows[2:]]
    assert rest.rows[0].reads <= {"x", "e", "denoised"}
    assert sample(network, rest, image=start(), seed=1).isfinite().all()


def test_levels_are_sliced():
    levels = fastgen.edm_levels(fastgen.sigmas.karras(5, 0.1, 10.0))
    part = levels[1:3]
    assert (part.points, part.end) == (levels.points[1:3], levels.points[3])
    assert part.initial_scale == levels.points[1].sigma
    assert levels[:].initial_scale == levels.initial_scale
    assert levels[-2:].end is levels.end
    for wrong in (0, slice(None, None, 2)):
        with pytest.raises(TypeError, match="slice"):
            levels[wrong]
    with pytest.raises(ValueError, match=r"\[3:2\], which leaves no step"):
        levels[3:2]


@pytest.mark.parametrize("plan", [solvers.ddpm(SCHEDULE, 6), solvers.euler(EDM), solvers.lcm(
    STRAIGHT)], ids=repr)  # fmt: skip
def test_an_image_is_given_the_noise_of_its_level(plan):
    image, seen = fastgen.randn((2, 100, 100), seed=8), []
    for k in (0, 3):
        alpha, sigma = plan.level(k)

        def model(x, t, cond):
            seen.append(x / plan.rows[k].input_scale)  # noqa: B023
            return network(x, t)

        sample(model, plan, image=image, start=k, seed=5)
        z = (seen[0] - alpha * image) / sigma
        assert abs(float(z.mean())) < 0.03
        assert abs(float(z.std()) - 1.0) < 0.03
        want = fastgen.randn(image.shape, seed=5, stream=4, step=k)
        torch.testing.assert_close(z, want, rtol=1e-3, atol=1e-3)
        seen.clear()
    a = SCHEDULE.alpha_bars[int(solvers.ddpm(SCHEDULE, 6).rows[3].model_time)]
    ours = sample(lambda x, t, c: seen.append(x.clone()) or x, solvers.ddpm(SCHEDULE, 6),
                  image=image, start=3, seed=5)  # fmt: skip
    assert ours.isfinite().all()
    assert_bitwise(seen[0], fastgen.add_noise(image, float(a), seed=5, step=3))


KEEPING = [DDIM, NOISY, solvers.dpmpp_2m(SCHEDULE, 5), solvers.heun(STRAIGHT),
           solvers.euler(STRAIGHT)]  # fmt: skip


@pytest.mark.parametrize("plan", KEEPING, ids=repr)
def test_what_is_known_is_kept(plan):
    known = fastgen.randn(SHAPE, seed=9)
    mask = torch.zeros(1, 2, 7, dtype=torch.bool)
    mask[..., :3] = True
    y = sample(network, plan, SHAPE, seed=3, known=known, mask=mask)
    assert_bitwise(y[..., 3:], known[..., 3:])
    assert not torch.equal(y[..., :3], known[..., :3])
    assert_bitwise(sample(network, plan, SHAPE, seed=3, known=known, mask=mask.float()), y)
    free = sample(network, plan, SHAPE, seed=3)
    everything = torch.ones(1, 1, 1, dtype=torch.bool)
    assert_bitwise(sample(network, plan, SHAPE, seed=3, known=known, mask=everything), free)
    alone = sample(network, plan, (1, *SHAPE[1:]), seed=3, sample_ids=[2], known=known[2:],
                   mask=mask)  # fmt: skip
    assert_bitwise(alone, y[2:])
    half = sample(network, plan, SHAPE, seed=3, known=known, mask=0.5 * mask.float())
    assert not torch.equal(half[..., :3], y[..., :3])


def test_what_is_kept_has_the_noise_of_each_step():
    plan = solvers.ddpm(SCHEDULE, 6)
    known, seen = torch.full((1, 20000), 0.7), {}
    sample(network, plan, known.shape, seed=3, known=known, mask=torch.zeros(1, dtype=torch.bool),
           callback=lambda loop: seen.update({loop.index: loop.x.clone()}))  # fmt: skip
    for k, x in seen.items():
        alpha, sigma = plan.level(k)
        assert abs(float(x.mean()) - 0.7 * alpha) <= 5 * sigma / 20000**0.5 + 1e-6
        assert abs(float(x.std()) - sigma) <= 0.03 * sigma + 1e-6
    z = [(seen[k] - 0.7 * plan.level(k)[0]) / plan.level(k)[1] for k in (1, 2)]
    assert abs(float((z[0] * z[1]).mean())) < 0.04  # fresh in each


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": start(), "image": start()}, ValueError, "got x and image"),
        ({"shape": SHAPE, "start": 1}, ValueError, "start: got 1.*shape"),
        ({"x": start(), "start": 5}, ValueError, "start"),
        ({"x": start(), "start": -1}, ValueError, "start"),
        ({"x": start(), "start": 1.5}, TypeError, "start"),
        ({"image": start(), "seed": None}, ValueError, "seed"),
        ({"image": [1.0]}, TypeError, "image"),
        ({"image": start(), "dtype": torch.float16}, ValueError, "dtype"),
        ({"shape": SHAPE, "known": start()}, ValueError, "known, mask"),
        ({"shape": SHAPE, "mask": start()}, ValueError, "known, mask"),
        ({"shape": SHAPE, "known": start()[:1], "mask": start()}, ValueError, "known"),
        ({"shape": SHAPE, "known": start(), "mask": torch.ones(4, 7)}, ValueError, "mask"),
        ({"shape": SHAPE, "known": start(), "mask": 1.0}, TypeError, "mask"),
        ({"x": start(), "known": start(), "mask": start(), "seed": None}, ValueError, "seed"),
        ({"state": 3}, TypeError, "state"),
        ({"state": {}}, TypeError, "state"),
    ],
)
def test_what_does_not_go_together_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        sample(network, DDIM, **{"seed": 0, **options})


def test_a_plan_without_levels_takes_no_image():
    plan = fastgen.Plan((fastgen.Row((fastgen.Output({"x": 1.0}),)),))
    with pytest.raises(ValueError, match="level"):
        sample(network, plan, image=start(), seed=0)
