"""A run of a plan: what the loop hands to the network, keeps, writes and refuses."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastgen
from fastgen import Loop, NoiseSchedule, Output, Plan, Row, ddim_step, sample, solvers, stack_rows
from fastgen.testing import assert_bitwise
from shared import network

SCHEDULE = NoiseSchedule.linear()
DDIM = solvers.ddim(SCHEDULE, 5)
NOISY = solvers.ddim(SCHEDULE, 5, 1.0, clip=2.0)
MULTISTEP = solvers.dpmpp_2m(SCHEDULE, 5, clip=2.0)
PLANS = {"ddim": DDIM, "noisy": NOISY, "ddpm": solvers.ddpm(SCHEDULE, 5), "2m": MULTISTEP}
SHAPE = (3, 2, 7)
# a row with everything that draws and everything that is kept
RICH = Plan(
    tuple(
        Row(
            (
                Output({"x": 0.5, "e": 0.25, "h0": 0.125} if i else {"x": 0.5}, (0.25, 0.5)),
                Output({"denoised": 1.0}, (0.0, 0.0, 0.75), target=0),
                Output({"x": 0.75}, (0.0, 0.5), target="input"),
                Output({"u": 1.0, "h0": -1.0} if i else {"e": 1.0}, (0.0, 0.0, 0.0, 1.0), target=1),
            ),
            denoised=(0.5, -0.5),
            model_time=float(3 - i),
            input_scale=0.75,
        )
        for i in range(4)
    ),
    discrete=False,
)


def start(shape=SHAPE, dtype=torch.float32, seed=1) -> torch.Tensor:
    return fastgen.randn(shape, seed=seed, dtype=dtype)


def run(plan, x, model=network, **options) -> torch.Tensor:
    loop = Loop(plan, x, **options)
    while not loop.done:
        loop.step(model(loop.model_input, loop.time))
    return loop.x


def by_steps(plan, x, seed=None, sample_ids=None, uncond=None, cond=None, guidance_scale=1.0):
    """The same run by ``fastgen.step`` alone, with nothing written over."""
    history = [None] * plan.history
    point = x * plan.rows[0].input_scale if plan.rows[0].input_scale != 1 else x
    for i, row in enumerate(plan.rows):
        t = plan.times()[i].expand(x.shape[0])
        results = fastgen.step(
            row, x, network(point, t, cond),
            uncond=None if uncond is None else network(point, t, uncond),
            history=history, guidance_scale=guidance_scale, seed=seed, sample_ids=sample_ids,
            step=i,
            dtypes=[x.dtype if o.target in ("x", "input") else torch.float32 for o in row.outputs],
        )  # fmt: skip
        results = results if isinstance(results, tuple) else (results,)
        x = point = results[0]
        for output, y in zip(row.outputs[1:], results[1:], strict=True):
            if output.target == "input":
                point = y
            else:
                history[output.target] = y
    return x


# ---- the loop and its state ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PLANS)
def test_a_loop_is_its_rows_one_after_the_other(name, dtype):
    plan, x = PLANS[name], start(dtype=dtype)
    seed = 5 if plan.stochastic else None
    result = run(plan, x, seed=seed)
    assert result.dtype == dtype
    assert_bitwise(result, by_steps(plan, x, seed))


def test_a_loop_counts_its_rows():
    loop = Loop(DDIM, start())
    times = []
    for i in range(5):
        assert (loop.index, loop.done) == (i, False)
        assert loop.row is DDIM.rows[i]
        assert loop.model_input.shape == SHAPE
        times.append(loop.time)
        before = loop.x
        after = loop.step(network(loop.model_input, loop.time))
        assert after is loop.x
        assert after is not before
    assert (loop.index, loop.done) == (5, True)
    assert [t.tolist() for t in times] == [[t] * 3 for t in (999, 799, 599, 399, 199)]
    for end in (lambda: loop.row, lambda: loop.time, lambda: loop.step(start())):
        with pytest.raises(IndexError):
            end()
    assert loop.index == 5


def test_time_is_a_timestep_or_a_noise_level():
    assert Loop(DDIM, start()).time.dtype == torch.int64
    loop = Loop(RICH, start(), seed=0, guided=True)
    assert loop.time.dtype == torch.float32
    assert loop.time.tolist() == [3.0] * 6


def test_a_loop_never_writes_the_callers_sample():
    for plan in (*PLANS.values(), RICH):
        for guided in (True,) if plan is RICH else (False, True):  # RICH reads u
            x = start()
            before = x.clone()
            version = x._version
            run(plan, x, seed=5, guided=guided)
            assert_bitwise(x, before)
            assert x._version == version


@pytest.mark.parametrize("guided", [False, True])
def test_two_buffers_hold_the_sample_turn_and_turn_about(guided):
    loop = Loop(solvers.dpmpp_2m(SCHEDULE, 8), start(), guided=guided)
    samples, histories = [], []
    while not loop.done:
        loop.step(network(loop.model_input, loop.time))
        samples.append(loop.x.data_ptr())
        histories.append([h.data_ptr() for h in loop.history if h is not None])
    assert samples[:-1] == samples[:2] * 3 + samples[:1]
    assert len(set(samples)) == 3  # the last is new: the caller's to keep
    assert all(h == histories[-1] for h in histories[1:])


def test_nothing_of_a_samples_size_is_allocated_from_step_to_step():
    shape = (2, 3, 64, 64)
    size = 2 * 3 * 64 * 64 * 4
    for plan in (solvers.dpmpp_2m(SCHEDULE, 8), solvers.ddpm(SCHEDULE, 8)):
        for guided in (False, True):
            loop = Loop(plan, start(shape), seed=5 if plan.stochastic else None, guided=guided)
            output = network(loop.model_input, loop.time)
            loop.step(output)
            loop.step(output)  # both slots of history are there now
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                held = torch.empty(shape)  # shows that the profiler would see one
                for _ in range(5):
                    loop.step(output)
            events = profile.profiler.kineto_results.events()
            taken = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() >= size]
            assert taken == [size], held.shape


@pytest.mark.parametrize("plan", [NOISY, RICH])
def test_noise_may_be_given_step_by_step(plan):
    x, guided = start(), plan is RICH
    options = {"guided": guided, "guidance_scale": 2.0 if guided else 1.0}
    drawn = Loop(plan, x, seed=3, **options)
    given, kept = Loop(plan, x, **options), Loop(plan, x, **options)
    while not drawn.done:
        i, output = drawn.index, network(drawn.model_input, drawn.time)
        z = [fastgen.randn(SHAPE, seed=3, step=i, stream=s) for s in (2, 8, 9, 10)]
        z = z[: drawn.row.noises]
        drawn.step(output)
        given.step(output, noise=z[0] if len(z) == 1 else z)
        kept._step(output, None, tuple(z))
        assert_bitwise(given.x, drawn.x)
        assert_bitwise(kept.x, drawn.x)
    lacking = Loop(plan, x, **options)
    with pytest.raises(ValueError, match="seed: got None"):
        lacking.step(output)
    with pytest.raises(ValueError, match="noise\\[0\\]: got shape"):
        lacking.step(output, noise=torch.zeros(1))
    assert lacking.index == 0


def unusual_runs():
    """(plan, x, options, what the network's output is made into) of many kinds of run."""
    x = start((2, 3, 4, 5))
    same = lambda y, seen: y  # noqa: E731
    late = torch.tensor([7, 2**40])
    for plan in (DDIM, NOISY, MULTISTEP, RICH):
        seed = {"seed": 5} if plan.stochastic else {}
        yield plan, x, {"guided": True, "guidance_scale": 2.0, **seed}, same
        yield plan, x, {"guided": True, "guidance_scale": [1.5, 3.0], **seed}, same
        yield plan, x[:0], {"guided": True, "guidance_scale": 2.0, **seed}, same
        if plan is RICH:  # which reads uncond
            continue
        yield plan, x, seed, same
        yield plan, x, {"seed": [3, 4], "sample_ids": late}, same
        yield plan, x, {"seed": 5, "sample_ids": [9, 1]}, same
        yield plan, x[:0], seed, same
        yield plan, x[:1, :1], seed, same
        yield plan, x.bfloat16(), seed, lambda y, seen: y.float()
        yield plan, x, seed, lambda y, seen: y.half()
        yield plan, x, seed, lambda y, seen: y.double()
        yield plan, x, seed, lambda y, seen: y.transpose(1, 2).contiguous().transpose(1, 2)
        yield plan, x, seed, lambda y, seen: y[:, :1].expand(y.shape)
        yield plan, x, seed, lambda y, seen: torch._neg_view(-y)
        yield plan, x, seed, lambda y, seen: seen
        yield plan, x, seed, lambda y, seen: seen.flip(-1)
        yield plan, x.to(memory_format=torch.channels_last), seed, same
        yield plan, x.transpose(0, 1)[..., ::2], seed, same


def test_the_straight_path_has_the_bits_of_the_general_one(monkeypatch):
    taken = []
    straight = Loop._step_straight
    for plan, x, options, made in unusual_runs():

        def model(point, t, made=made):
            return made(network(point, t), point)

        def counted(loop, *arguments):
            taken.append(straight(loop, *arguments))
            return taken[-1]

        monkeypatch.setattr(Loop, "_step_straight", counted)
        quick = run(plan, x, model, **options)
        monkeypatch.setattr(Loop, "_step_straight", lambda *_: False)
        assert_bitwise(quick, run(plan, x, model, **options))
        assert quick.stride() == run(plan, x, model, **options).stride()
    assert taken.count(True) > 200
    assert taken.count(False) > 20


@pytest.mark.parametrize("guided", [False, True])
def test_an_output_may_be_a_view_of_an_earlier_input(guided):
    """That memory is the next sample's: the step reads a copy."""
    x = start((2, 16, 16))
    runs = []
    for own in (lambda view: view, torch.clone):
        loop, earlier = Loop(DDIM, x, guided=guided, guidance_scale=1.5 if guided else 1.0), None
        while not loop.done:
            seen = loop.model_input
            loop.step(own((seen if earlier is None else earlier).transpose(-1, -2)))
            earlier = seen
        runs.append(loop.x)
    assert_bitwise(*runs)


def test_a_run_may_stop_and_go_on():
    whole = run(NOISY, start(), seed=9)
    loop = Loop(NOISY, start(), seed=9)
    for _ in range(2):
        loop.step(network(loop.model_input, loop.time))
    x = loop.x.clone()
    for i in range(2, 5):
        t = NOISY.times()[i].expand(3)
        x = fastgen.step(NOISY.rows[i], x, network(x, t), seed=9, step=i)
    assert_bitwise(x, whole)


def test_a_run_keeps_no_gradient_and_does_not_mind_one():
    x = start().requires_grad_()
    weight = torch.ones(()).requires_grad_()
    plain = run(MULTISTEP, start())
    loop = Loop(MULTISTEP, x)
    while not loop.done:
        assert not loop.model_input.requires_grad
        loop.step(weight * network(loop.model_input, loop.time))
    assert not loop.x.requires_grad
    assert_bitwise(loop.x, plain)


def test_samples_may_lie_in_any_layout():
    x = start((2, 3, 4, 5))
    expected = run(MULTISTEP, x)
    for view in (
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        torch.stack([x, x], dim=-1)[..., 0],
    ):
        assert_bitwise(run(MULTISTEP, view), expected)
    assert_bitwise(run(MULTISTEP, x[:1].expand(2, -1, -1, -1))[1], expected[0])
    assert run(DDIM, start((0, 3))).shape == (0, 3)


# ---- guidance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5, [0.5, 1.0, 3.0]])
@pytest.mark.parametrize("name", PLANS)
def test_guidance_in_one_network_call_is_that_of_two(name, scale):
    plan = PLANS[name]
    seed = 5 if plan.stochastic else None
    x, cond, uncond = start(), torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3)
    both = torch.cat([uncond, cond])
    together = run(plan, x, lambda x, t: network(x, t, both), seed=seed, guidance_scale=scale,
                   guided=True)  # fmt: skip
    expected = by_steps(plan, x, seed, None, uncond, cond, scale)
    assert_bitwise(together, expected)
    loop = Loop(plan, x, seed=seed, guidance_scale=scale)
    while not loop.done:
        point, t = loop.model_input, loop.time
        assert point.shape == SHAPE
        loop.step(network(point, t, cond), network(point, t, uncond))
    assert_bitwise(loop.x, expected)
    if isinstance(scale, list):
        scale = torch.tensor(scale)
    sampled = sample(network, plan, x=x, seed=seed, guidance_scale=scale, cond=cond, uncond=uncond)
    assert_bitwise(sampled, expected)


def test_guidance_is_that_of_ddim_step():
    """Two separate network calls and the stateless step: the same bits."""
    x, cond, uncond = start(), torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3)
    expected = x
    for i, (t, a, b) in enumerate(SCHEDULE.pairs(5)):
        t = torch.full((3,), t)
        expected = ddim_step(
            expected, network(expected, t, cond), a, b, uncond=network(expected, t, uncond),
            guidance_scale=4.0, eta=1.0, clip=2.0, seed=5, step=i,
        )  # fmt: skip
    result = sample(network, NOISY, x=x, seed=5, guidance_scale=4.0, cond=cond, uncond=uncond)
    assert_bitwise(result, expected)


def test_a_guided_network_sees_every_sample_twice():
    for plan in (DDIM, NOISY, MULTISTEP, RICH):
        loop = Loop(plan, start(), seed=5, guided=True)
        while not loop.done:
            whole = loop.model_input
            assert whole.shape == (6, 2, 7)
            assert loop.time.shape == (6,)
            assert_bitwise(whole[3:], whole[:3])
            loop.step(network(whole, loop.time, torch.arange(6.0)))


# ---- scaled inputs, history, several normals -----------------------------------------------------


def euler(sigmas: list[float]) -> Plan:
    """Karras et al. (2022), algorithm 1: x' = x + (sigma' - sigma) (x - D) / sigma; with c_in."""
    scales = [1 / (sigma**2 + 1) ** 0.5 for sigma in sigmas]
    rows = []
    for i, sigma in enumerate(sigmas[:-1]):
        ratio = sigmas[i + 1] / sigma
        weights = {"x": ratio, "denoised": 1 - ratio}
        outputs = [Output(weights)]
        if sigmas[i + 1] > 0:
            scaled = {name: weight * scales[i + 1] for name, weight in weights.items()}
            outputs.append(Output(scaled, target="input"))
        # an epsilon network: D = x - sigma e
        rows.append(Row(tuple(outputs), denoised=(1.0, -sigma), model_time=float(np.log(sigma) / 4),
                        input_scale=scales[i]))  # fmt: skip
    return Plan(tuple(rows), initial_scale=sigmas[0], discrete=False, solver="euler")


SIGMAS = [14.6, 6.0, 2.0, 0.5, 0.0]


@pytest.mark.parametrize("guided", [False, True])
def test_a_plan_on_sigmas_scales_what_the_network_sees(guided):
    plan = euler(SIGMAS)
    x = plan.initial_scale * start()
    loop = Loop(plan, x, guided=guided)
    # each of at most three terms has a rounded coefficient, a product and two sums: 8 units of them
    units = 8 * 2.0**-24
    exact, bound = x.double(), units * x.abs().max()
    for sigma, following in itertools.pairwise(SIGMAS):
        seen, before = loop.model_input, loop.x.double()
        c_in = 1 / (sigma**2 + 1) ** 0.5
        assert (seen[:3].double() - c_in * exact).abs().max() <= c_in * bound
        assert loop.time.tolist() == [np.float32(np.log(sigma) / 4)] * len(seen)
        output = network(seen, loop.time)
        loop.step(output)
        e = output[:3].double()
        denoised = before - sigma * e
        exact = before + (following - sigma) * (before - denoised) / sigma
        share = 1 - following / sigma
        bound = units * (before.abs() + share * (before.abs() + sigma * e.abs())).max()
        assert (loop.x.double() - exact).abs().max() <= bound
    assert loop.done


def test_the_first_sample_has_the_plans_initial_scale():
    plan = euler(SIGMAS)
    seen = []

    def model(x, t, cond):
        seen.append(x.clone())
        return network(x, t)

    result = sample(model, plan, SHAPE, seed=3)
    z = fastgen.randn(SHAPE, seed=3)
    scale = np.float32(plan.rows[0].input_scale)
    assert_bitwise(seen[0], (z * np.float32(14.6)) * torch.tensor(scale))
    assert_bitwise(result, run(plan, z * np.float32(14.6)))
    low = sample(network, plan, SHAPE, seed=3, dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    assert_bitwise(low, run(plan, (z * np.float32(14.6)).bfloat16()))


@pytest.mark.parametrize("guided", [False, True])
def test_four_outputs_and_four_normals_each_go_where_they_belong(guided):
    x = start()
    cond, uncond = torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3)
    expected = by_steps(RICH, x, 5, None, uncond, cond, 2.0)
    both = torch.cat([uncond, cond])
    if guided:
        result = run(RICH, x, lambda x, t: network(x, t, both), seed=5, guidance_scale=2.0,
                     guided=True)  # fmt: skip
    else:
        loop = Loop(RICH, x, seed=5, guidance_scale=2.0)
        while not loop.done:
            point, t = loop.model_input, loop.time
            loop.step(network(point, t, cond), network(point, t, uncond))
        result = loop.x
    assert_bitwise(result, expected)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("scales", [(1.0, 1.0, 0.5, 1.0), (0.5, 1.0, 1.0, 0.25), (1.0,) * 4])
def test_rows_with_and_without_a_network_input_of_their_own_mix(scales, guided):
    def row(i):
        outputs = [Output({"x": 0.5, "e": 0.25})]
        if i + 1 < len(scales) and scales[i + 1] != 1.0:
            outputs.append(Output({"x": 0.5 * scales[i + 1], "e": 0.25 * scales[i + 1]},
                                  target="input"))  # fmt: skip
        return Row(tuple(outputs), input_scale=scales[i])

    plan = Plan(tuple(row(i) for i in range(4)))
    # powers of two: scaling a result and scaling its terms round alike
    x, expected = start(), start()
    for scale in scales:
        expected = fastgen.combine(
            [expected, network(expected * scale, torch.zeros(3))], [0.5, 0.25]
        )
    assert_bitwise(run(plan, x, guided=guided), expected)


@pytest.mark.parametrize("guided", [False, True])
def test_an_input_that_a_row_makes_is_what_the_network_sees_whatever_the_scale(guided):
    row = Row((Output({"x": 1.0}), Output({"x": -2.0}, target="input")))
    loop = Loop(Plan((row, row, row)), start(), guided=guided)
    seen = []
    while not loop.done:
        seen.append(loop.model_input.clone())
        loop.step(loop.model_input)
    assert_bitwise(loop.x, start())
    copies = 2 if guided else 1
    assert_bitwise(seen[0], torch.cat([start()] * copies))
    assert_bitwise(seen[1], torch.cat([-2 * start()] * copies))
    assert_bitwise(seen[2], seen[1])


def test_normals_of_a_row_are_those_of_their_streams():
    scales = (0.5, 0.25, 2.0, -1.0)
    plan = Plan((Row((Output({"x": 1.0}),)), Row((Output({"x": 1.0}, scales),))))
    result = run(plan, torch.zeros(SHAPE), seed=5)
    z = [fastgen.randn(SHAPE, seed=5, step=1, stream=s) for s in (2, 8, 9, 10)]
    expected = torch.zeros(SHAPE)
    for scale, normal in zip(scales, z, strict=True):
        expected = expected + scale * normal
    assert_bitwise(result, expected)


def test_history_of_bfloat16_samples_is_kept_in_float32():
    loop = Loop(MULTISTEP, start(dtype=torch.bfloat16))
    x, estimates = loop.x, []
    while not loop.done:
        x, output = loop.x, network(loop.model_input, loop.time)
        assert output.dtype == torch.bfloat16
        row = loop.row
        loop.step(output)
        assert loop.x.dtype == torch.bfloat16
        estimates.append(row.floats[0] * x.float() + row.floats[1] * output.float())
        if not loop.done:
            kept = loop.history[(loop.index - 1) % 2]
            assert kept.dtype == torch.float32
            assert_bitwise(kept, estimates[-1].clamp(-2, 2))
    # more than bfloat16 holds: rounding it would have been a loss
    assert not torch.equal(estimates[0], estimates[0].bfloat16().float())


def test_float64_samples_keep_float64():
    loop = Loop(MULTISTEP, start().double())
    while not loop.done:
        loop.step(network(loop.model_input, loop.time))
    assert loop.x.dtype == torch.float64
    assert all(h.dtype == torch.float64 for h in loop.history)
    mixed = Loop(DDIM, start())
    mixed.step(network(mixed.model_input, mixed.time).double())  # a float64 network
    assert mixed.x.dtype == torch.float32
    with pytest.raises(ValueError, match=r"backend.*cpu"):
        Loop(DDIM, start().double(), backend="cpu")


# ---- a sample is its own -------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [NOISY, PLANS["ddpm"], RICH, euler(SIGMAS)])
@pytest.mark.parametrize("slot", [0, 2, 4])
def test_a_sample_does_not_depend_on_its_batch(plan, slot):
    shape = (5, 3, 7)  # an odd size: slots fall differently into vectors and blocks of four
    seeds, ids = [11, 12, 13, 2**64 - 1, 11], [0, 5, 2**40, 7, 1]
    cond, uncond = torch.arange(5.0) / 8, torch.zeros(5)
    scales = [1.0, 2.0, 3.0, 4.0, 7.5]
    options = {"seed": seeds, "sample_ids": ids, "guidance_scale": scales}
    batch = sample(network, plan, shape, **options, cond=cond, uncond=uncond)
    alone = sample(
        network, plan, (1, 3, 7), seed=seeds[slot], sample_ids=[ids[slot]],
        guidance_scale=scales[slot], cond=cond[slot : slot + 1], uncond=uncond[:1],
    )  # fmt: skip
    assert_bitwise(alone[0], batch[slot])
    order = [3, slot, 1]
    others = sample(
        network, plan, (3, 3, 7), seed=[seeds[i] for i in order],
        sample_ids=torch.tensor([ids[i] for i in order]),
        guidance_scale=[scales[i] for i in order], cond=cond[order], uncond=uncond[order],
    )  # fmt: skip
    assert_bitwise(others, batch[order])


def test_default_ids_are_the_places_in_the_batch():
    batch = sample(network, NOISY, SHAPE, seed=4)
    again = sample(network, NOISY, (1, *SHAPE[1:]), seed=4, sample_ids=[2])
    assert_bitwise(again[0], batch[2])
    seeds = torch.tensor([4, 4, 4])
    assert_bitwise(sample(network, NOISY, SHAPE, seed=seeds, sample_ids=range(3)), batch)
    assert not torch.equal(batch[0], batch[1])
    assert not torch.equal(sample(network, NOISY, SHAPE, seed=5), batch)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Loop(NOISY, start()).step(start()), ValueError, "seed.*ddim"),
        (lambda: sample(network, NOISY, x=start()), ValueError, "seed.*ddim"),
        (lambda: Loop(DDIM, [0.0]), TypeError, "x"),
        (lambda: Loop(DDIM, torch.zeros(2, dtype=torch.int64)), TypeError, "x"),
        (lambda: Loop(DDIM, torch.zeros(())), ValueError, "x"),
        (lambda: Loop(NOISY, start(), seed=-1), ValueError, "seed"),
        (lambda: Loop(NOISY, start(), seed=[1, 2]), ValueError, "seed"),
        (lambda: Loop(NOISY, start(), seed=1.0), TypeError, "seed"),
        (lambda: Loop(NOISY, start(), seed=torch.Generator()), TypeError, "initial_seed"),
        (lambda: Loop(NOISY, start(), seed=1, sample_ids=[1, 2]), ValueError, "sample_ids"),
        (lambda: Loop(DDIM, start(), guidance_scale=[1.0, 2.0]), ValueError, "guidance_scale"),
        (lambda: Loop(DDIM, start(), guidance_scale="2"), TypeError, "guidance_scale"),
        (lambda: Loop(DDIM, start(), backend="tpu"), ValueError, "backend.*tpu"),
        (lambda: Loop(DDIM, start()).step(start((3, 14))), ValueError, "output"),
        (lambda: Loop(DDIM, start()).step(start((6, 2, 7))), ValueError, "output"),
        (lambda: Loop(DDIM, start()).step(None), TypeError, "output"),
        (lambda: Loop(DDIM, start()).step(start().long()), TypeError, "output"),
        (lambda: Loop(DDIM, start()).step(start().to("meta")), ValueError, "output"),
        (lambda: Loop(DDIM, start()).step(start(), start((3, 1))), ValueError, "uncond"),
        (lambda: Loop(DDIM, start(), guided=True).step(start()), ValueError, "output.*model_input"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_refused_output_changes_nothing():
    loop = Loop(MULTISTEP, start())
    loop.step(network(loop.model_input, loop.time))
    before, row = loop.x.clone(), loop.row
    with pytest.raises(ValueError, match="output"):
        loop.step(start((3, 14)))
    assert loop.row is row
    assert_bitwise(loop.x, before)
    while not loop.done:
        loop.step(network(loop.model_input, loop.time))
    assert_bitwise(loop.x, run(MULTISTEP, start()))


# ---- rows on the device --------------------------------------------------------------------------


def unrolled(x, table, index, seeds, guidance, count=5, outputs=1):
    """A whole run whose numbers are all in tensors, as for ``torch.compile`` and CUDA graphs."""
    history = [x.new_zeros(x.shape, dtype=torch.float32)] * 2 if outputs == 2 else []
    for i in range(count):
        t = index[i].expand(x.shape[0])
        results = fastgen.step(
            table, x, network(x, t), uncond=network(x, t, guidance), guidance_scale=guidance,
            history=history, row_index=index[i : i + 1], seed=seeds, outputs=outputs,
        )  # fmt: skip
        if outputs == 2:
            x = results[0]
            history = [results[1], history[1]] if i % 2 == 0 else [history[0], results[1]]
        else:
            x = results
    return x


@pytest.mark.parametrize("name", PLANS)
def test_a_table_and_an_index_give_the_bits_of_the_rows(name):
    plan, x = PLANS[name], start()
    table, seeds = plan.table(), torch.tensor([5, 6, 7])
    guidance = torch.tensor([1.0, 2.0, 3.0])
    history = [torch.full(SHAPE, torch.nan)] * 2 if name == "2m" else []
    a = b = x
    index = torch.zeros(1, dtype=torch.int64)
    for i, row in enumerate(plan.rows):
        index.fill_(i)  # in place, as between the replays of a CUDA graph
        t = plan.times()[i].expand(3)
        common = {"history": history, "guidance_scale": guidance, "seed": seeds}
        by_value = fastgen.step(row, a, network(a, t), uncond=-network(a, t), step=i, **common)
        by_index = fastgen.step(table, b, network(b, t), uncond=-network(b, t), row_index=index,
                                outputs=len(row.outputs), **common)  # fmt: skip
        assert_bitwise(by_index, by_value)
        if isinstance(by_value, tuple):
            history = [by_value[1], history[1]] if i % 2 == 0 else [history[0], by_value[1]]
            a, b = by_value[0], by_index[0]
        else:
            a, b = by_value, by_index


def test_a_row_per_sample_is_each_row_alone():
    """Samples at different timesteps in one launch."""
    rows = [DDIM.rows[0], NOISY.rows[2], PLANS["ddpm"].rows[4]]
    x, output, uncond = start(seed=1), start(seed=2), start(seed=3)
    seeds, scales = [21, 22, 23], [1.0, 0.0, 4.0]
    together = fastgen.step(stack_rows(rows), x, output, uncond=uncond, guidance_scale=scales,
                            seed=seeds, step=6)  # fmt: skip
    for i, row in enumerate(rows):
        one = slice(i, i + 1)
        alone = fastgen.step(row, x[one], output[one], uncond=uncond[one],
                             guidance_scale=scales[i], seed=seeds[i], sample_ids=[i],
                             step=6)  # fmt: skip
        assert_bitwise(together[one], alone)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_gives_the_same_bits_and_is_compiled_once(backend):
    """fullgraph, whatever the coefficients, seeds and guidance: nothing of them is in the graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(unrolled, backend=counter, fullgraph=True)
    index = torch.arange(5)
    for plan, seed, scale in [
        (PLANS["ddpm"], 5, 1.0),
        (NOISY, 6, 3.0),
        (solvers.ddim(NoiseSchedule.cosine(), 5, 0.3, clip=(-1.0, 3.0)), 2**62, 7.5),
    ]:
        arguments = (start(seed=seed), plan.table(), index, torch.tensor([seed, 1, 2]),
                     torch.tensor([scale, 1.0, 0.0]))  # fmt: skip
        assert_bitwise(compiled(*arguments), unrolled(*arguments))
    assert counter.frame_count == 1


def test_a_compiled_multistep_run_keeps_its_history():
    torch._dynamo.reset()
    compiled = torch.compile(unrolled, backend="aot_eager", fullgraph=True)
    arguments = (start(), MULTISTEP.table(), torch.arange(5), torch.tensor([0, 1, 2]),
                 torch.tensor([2.0, 1.0, 0.0]), 4, 2)  # fmt: skip
    assert_bitwise(compiled(*arguments), unrolled(*arguments))


# ---- a run that is changed, interrupted, gone on with --------------------------------------------


def _shrink(x, t, cond=None):
    return 0.3 * x + 0.01 * t.view(-1, *[1] * (x.ndim - 1))


RESUMED = {
    "ddim": lambda: fastgen.solvers.ddim(fastgen.NoiseSchedule.cosine(100), 6),
    "ddpm": lambda: fastgen.solvers.ddpm(fastgen.NoiseSchedule.cosine(100), 6),
    "dpmpp_2m": lambda: fastgen.solvers.dpmpp_2m(fastgen.NoiseSchedule.cosine(100), 6),
    "scaled input": lambda: Plan(
        tuple(
            Row(
                (
                    Output({"x": 0.7, "e": 0.1 * i}),
                    Output({"x": 0.7 / 3.0, "e": 0.1 * i / 3.0}, target="input"),
                ),
                model_time=float(i),
                input_scale=1.0 / 3.0,
            )
            for i in range(6)
        )
    ),
}


def _run(plan, guided):
    return fastgen.Loop(plan, fastgen.randn((2, 3), seed=0), seed=0, guidance_scale=2.0 if guided
                        else 1.0, guided=guided)  # fmt: skip


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("stop", [0, 1, 4, 6])
def test_a_run_goes_on_from_its_state_with_the_same_bits(name, guided, stop, tmp_path):
    plan = RESUMED[name]()
    whole, first, second = (_run(plan, guided) for _ in range(3))
    while not whole.done:
        whole.step(_shrink(whole.model_input, whole.time))
    for _ in range(stop):
        first.step(_shrink(first.model_input, first.time))
    torch.save(first.state_dict(), tmp_path / "run.pt")
    second.load_state_dict(torch.load(tmp_path / "run.pt", weights_only=True))
    while not second.done:
        second.step(_shrink(second.model_input, second.time))
    assert_bitwise(second.x, whole.x)


@pytest.mark.parametrize("guided", [False, True])
def test_the_network_sees_a_sample_that_was_changed(guided):
    loop = _run(RESUMED["ddim"](), guided)
    for index in range(3):
        loop.x = torch.full((2, 3), float(index))
        assert torch.equal(loop.model_input, torch.full_like(loop.model_input, float(index)))
        loop.step(_shrink(loop.model_input, loop.time))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("x"), "state: lacks x"),
        (lambda s: s.update(plan="0" * 16), "is another plan's"),
        (lambda s: s.update(index=7), "index"),
        (lambda s: s.update(history=[]), "history"),
        (lambda s: s.update(x=torch.zeros(3, 3)), "x"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    loop = _run(RESUMED["dpmpp_2m"](), False)
    state = loop.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        loop.load_state_dict(state)
    assert loop.index == 0


def test_a_run_that_is_done_says_so():
    loop = fastgen.Loop(
        fastgen.solvers.ddim(fastgen.NoiseSchedule.cosine(100), 1), torch.ones(1, 2)
    )
    loop.step(torch.ones(1, 2))
    for access in (lambda: loop.row, lambda: loop.time, lambda: loop.step(torch.ones(1, 2))):
        with pytest.raises(IndexError, match="the run is done"):
            access()


# ---- what must not happen ------------------------------------------------------------------------


def test_samples_of_many_dims():
    x = torch.ones([1] * 64 + [3])
    assert_bitwise(Loop(DDIM, x).step(x.clone()).flatten(),
                   Loop(DDIM, x.view(1, 3)).step(torch.ones(1, 3)).flatten())  # fmt: skip


def test_guidance_may_be_a_negative_view():
    output, uncond = start(), start(seed=2)
    g = torch.tensor([1 + 2j]).conj().imag
    ours = Loop(DDIM, start(), guidance_scale=g).step(output, uncond)
    assert_bitwise(ours, Loop(DDIM, start(), guidance_scale=-2.0).step(output, uncond))


def test_a_loop_can_be_copied_and_pickled():
    loop = Loop(MULTISTEP, start())
    loop.step(start(seed=2))
    for copied in (copy.deepcopy(loop), pickle.loads(pickle.dumps(loop))):
        assert_bitwise(copied.step(start(seed=3)), copy.deepcopy(loop).step(start(seed=3)))


def test_a_refused_step_keeps_no_history():
    loop = Loop(MULTISTEP, start())
    with pytest.raises(ValueError, match="output"):
        loop.step(start((3, 14)))
    assert loop.history == (None, None)
    with pytest.raises(AttributeError):
        loop.history = (None, start())


def test_a_state_without_the_history_that_is_read_is_refused():
    loop = Loop(MULTISTEP, start())
    loop.step(start(seed=2))
    state = loop.state_dict()
    with pytest.raises(ValueError, match="lacks slot 0"):
        loop.load_state_dict({**state, "history": [None, None]})


def test_a_loop_of_inference_mode_is_stepped_there():
    with torch.inference_mode():
        loop = Loop(DDIM, start())
        loop.step(start(seed=2))
    with pytest.raises(ValueError, match="inference_mode"):
        loop.step(start(seed=2))
    assert loop.index == 1


def test_sample_ids_are_checked_without_a_seed():
    with pytest.raises(ValueError, match="sample_ids"):
        Loop(DDIM, start(), sample_ids=[1])
