"""diffusers' schedulers compiled, on a device that is never waited for, and shared by threads."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import threading

import pytest
import torch

from fastgen.testing import assert_bitwise

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from test_diffusers import advance, method, timed, times_of  # noqa: E402

from fastgen.integrations import diffusers as fast  # noqa: E402
from fastgen.integrations.diffusers.base import _made  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers', of NumPy's
COMPILED = (
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler", "LCMScheduler", "UniPCMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler", "SASolverScheduler",
    "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler",
    "SCMScheduler", "ScoreSdeVeScheduler",
    "UnCLIPScheduler", "RePaintScheduler", "DDPMWuerstchenScheduler", "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
)  # fmt: skip


def network(x, t):
    return torch.tanh(0.5 * x)


def loop(scheduler, x, times, part=slice(None)):
    for i in range(len(times))[part]:
        t = times[i]
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = advance(scheduler, network(seen, t), i, x, times, return_dict=False)[0]
    return x


def begun(name, steps=4, **options):
    made = getattr(fast, name).from_config(getattr(diffusers, name)().config, **options)
    timed(made, steps)
    if hasattr(made, "set_begin_index"):
        made.set_begin_index(0)
    return made


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("kind", ["tensors", "numbers"])
def test_a_whole_loop_compiles(name, kind):
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ends = []
    for compiled in (True, False):
        torch._dynamo.reset()
        made = begun(name)
        times = times_of(made) if kind == "tensors" else times_of(made).tolist()

        def run(x, made=made, times=times):
            return loop(made, x, times)

        torch.manual_seed(0)
        call = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
        ends.append(call(x))
    assert_bitwise(*ends)


@pytest.mark.parametrize("name", [
    "DDIMScheduler", "DDPMScheduler", "CogVideoXDDIMScheduler", "UnCLIPScheduler",
    "CogVideoXDPMScheduler", "ScoreSdeVeScheduler",
])  # fmt: skip
def test_one_compiled_step_serves_all_timesteps(name):
    torch._dynamo.reset()
    made, graphs = begun(name, 20), []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    def step(e, t, x, other):
        if name == "UnCLIPScheduler":
            return made.step(e, t, x, other, return_dict=False)[0]
        if name == "CogVideoXDPMScheduler":
            return made.step(e, 0.5 * e, t, other, x, return_dict=False)[0]
        return getattr(made, method(made))(e, t, x, return_dict=False)[0]

    compiled = torch.compile(step, fullgraph=True, backend=counting)
    x = y = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    by = -1 if name == "CogVideoXDPMScheduler" else 1
    for t, other in list(zip(made.timesteps, made.timesteps.roll(-by), strict=True))[1:-1]:
        torch.manual_seed(0)
        x = compiled(network(x, t), t, x, other)
        torch.manual_seed(0)
        y = step(network(y, t), t, y, other)
    assert_bitwise(x, y)
    assert len(graphs) <= 2  # the first call's also makes the rows
    assert compiled(x, torch.tensor(7).to(t.dtype), x, other).isnan().all()  # not on the grid
    if name in ("UnCLIPScheduler", "CogVideoXDPMScheduler"):
        assert compiled(x, t, x, t).isnan().all()  # not beside it
        assert compiled(x, made.timesteps[-1], x, torch.tensor(7)).isnan().all()


@pytest.mark.parametrize("name", sorted(fast._CLASSES))
def test_a_device_is_not_waited_for(name):
    """A tensor on the meta device has no values: to ask for one is an error."""
    made = getattr(fast, name)()
    timed(made, 6)
    if hasattr(made, "noise_sampler"):  # torchsde's, which needs a device that computes
        made._noise = "fastgen"
    plain = loop_shapes(made, torch.ones(1, 3, 8, 8), times_of(made))
    timed(made, 6)
    made._times = made.timesteps.tolist()
    made._begin()
    made.timesteps = made.timesteps.to("meta")
    assert loop_shapes(made, torch.empty(1, 3, 8, 8, device="meta"), times_of(made)) == plain


def loop_shapes(made, x, times):
    shapes = []
    for i in range(len(times)):
        if hasattr(made, "scale_model_input"):
            made.scale_model_input(x, times[i])
        x, *rest = advance(made, 0.5 * x, i, x, times, return_dict=False)
        shapes.append((x.shape, x.dtype, len(rest)))
    return shapes


BY_TIMESTEP = (
    "DDIMScheduler",
    "DDPMScheduler",
    "UnCLIPScheduler",
    "RePaintScheduler",
    "DDPMWuerstchenScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "ScoreSdeVeScheduler",
)


@pytest.mark.parametrize("name", BY_TIMESTEP)
@pytest.mark.parametrize("noise", ["torch", "fastgen"])
def test_a_timestep_from_elsewhere_on_the_device_is_looked_up_there(name, noise):
    made = begun(name, 6, noise=noise)
    made._times = made.timesteps.tolist()
    made._begin()
    made.timesteps = made.timesteps.to("meta")
    x, times = torch.empty(1, 3, 8, 8, device="meta"), made.timesteps.clone()
    for i in range(2):
        assert advance(made, x, i, x, times, return_dict=False)[0].shape == x.shape


# ---- loops held outside --------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPILED)
def test_runs_that_are_held_apart_do_not_meet(name):
    made = begun(name, 6, noise="fastgen")
    firsts = [torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    wanted = []
    for k, x in enumerate(firsts):
        alone = begun(name, 6, noise="fastgen")
        torch.manual_seed(k)
        wanted.append(loop(alone, x, times_of(alone)))
    loop(made, firsts[0], times_of(made), slice(2))  # a run under way
    runs = [made.new_loop() for _ in firsts]
    assert all(type(run) is type(made) and run.config == made.config for run in runs)
    assert runs[0]._rows is runs[1]._rows
    samples = list(firsts)
    for i in range(len(times_of(made))):
        for k, run in enumerate(runs):
            if i == 0:
                torch.manual_seed(k)
            samples[k] = loop(run, samples[k], times_of(made), slice(i, i + 1))
    for got, want in zip(samples, wanted, strict=True):
        assert_bitwise(got, want)


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "LCMScheduler"])
def test_a_new_loop_has_nothing_of_former_timesteps(name):
    made, x = begun(name, 10), torch.ones(1, 3, 4, 4)
    loop(made, x, made.timesteps)
    timed(made, 20)
    torch.manual_seed(0)
    want = loop(made, x, made.timesteps)
    torch.manual_seed(0)
    assert_bitwise(loop(made.new_loop(), x, made.timesteps), want)


@pytest.mark.parametrize("name", sorted(fast._CLASSES))
def test_the_same_timesteps_again_have_the_same_rows(name):
    made, x, ends = begun(name, 6, noise="fastgen"), torch.linspace(-1, 1, 48).view(1, 3, 4, 4), []
    rows = []
    for _ in range(3):
        timed(made, 6)
        if hasattr(made, "former"):
            del made.former
        torch.manual_seed(0)
        ends.append(loop(made, x, times_of(made)))
        rows.append(made._rows)
    assert_bitwise(ends[0], ends[1])
    assert_bitwise(ends[0], ends[2])
    assert rows[1] is rows[2]
    first = made.new_loop()  # loops of one scheduler share them, begun or not
    timed(made, 7)
    assert first._rows is rows[1]
    others = [made.new_loop() for _ in range(2)]
    for other in others:
        loop(other, x, times_of(other), slice(1))
    assert others[0]._rows is others[1]._rows is not rows[1]


@pytest.mark.parametrize("change", [
    lambda s: s.register_to_config(prediction_type="v_prediction"),
    lambda s: setattr(s, "sigmas", s.sigmas * 1.25),
    lambda s: s.sigmas.mul_(1.25),
    lambda s: setattr(s, "_compat", "diffusers"),
    lambda s: s.set_begin_index(2),
], ids=["config", "sigmas", "in place", "compat", "begun late"])  # fmt: skip
def test_rows_are_made_anew_where_anything_changed(change):
    x, ends = torch.linspace(-1, 1, 48).view(1, 3, 4, 4), []
    used, new = fast.EulerDiscreteScheduler(), fast.EulerDiscreteScheduler()
    for made in (used, new):
        if made is used:
            made.set_timesteps(6)
            loop(made, x, made.timesteps)
        made.set_timesteps(6)
        change(made)
        ends.append(loop(made, x, made.timesteps[made.begin_index or 0 :]))
    assert_bitwise(*ends)


@pytest.mark.parametrize("name", [
    "UniPCMultistepScheduler", "HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler",
    "LCMScheduler", "TCDScheduler",
])  # fmt: skip
def test_timesteps_that_were_cut_are_stepped_as_diffusers_does(name):
    x, ends = torch.linspace(-1, 1, 48).view(1, 3, 4, 4), []
    for made in (getattr(fast, name)(), getattr(diffusers, name)()):
        made.set_timesteps(6)
        made.timesteps = made.timesteps[:-2]
        torch.manual_seed(0)
        ends.append(loop(made, x, made.timesteps))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [
    lambda s: s.alphas_cumprod.mul_(0.5),
    lambda s: s.register_to_config(prediction_type="v_prediction"),
], ids=["levels in place", "config"])  # fmt: skip
def test_a_later_run_sees_what_changed(change):
    x, ends = torch.linspace(-1, 1, 48).view(1, 3, 4, 4), []
    for made in (fast.DDIMScheduler(), diffusers.DDIMScheduler()):
        made.set_timesteps(5)
        loop(made, x, made.timesteps)
        change(made)
        made.set_timesteps(5)
        ends.append(loop(made, x, made.timesteps))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "option"), [
    ("UniPCMultistepScheduler", "clip_sample"), ("HeunDiscreteScheduler", "thresholding"),
    ("DPMSolverMultistepScheduler", "clip_sample"), ("DDIMInverseScheduler", "thresholding"),
])  # fmt: skip
def test_an_option_of_other_classes_is_not_read(name, option):
    assert option not in inspect.signature(getattr(diffusers, name).__init__).parameters
    x, ends = torch.full((2, 8), 3.0), []
    config = dict(getattr(diffusers, name)().config, **{option: True})
    for module in (fast, diffusers):
        made = getattr(module, name).from_config(config)
        made.set_timesteps(5)
        ends.append(loop(made, x, made.timesteps))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_noise_has_the_dtype_that_diffusers_draws(name):
    x, ends = torch.ones(2, 8).double(), []
    for module in (fast, diffusers):
        made, generator = getattr(module, name)(), torch.Generator().manual_seed(0)
        made.set_timesteps(4)
        y = made.step(x.float(), made.timesteps[0], x, generator=generator).prev_sample
        ends.append((y, torch.rand(1, generator=generator)))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)  # of levels in float32


THREADS = """
import threading, time, torch
from fastgen.integrations import diffusers as fast
made, x, end = fast.UniPCMultistepScheduler(), torch.randn(1, 4, 256, 32), time.monotonic() + 3.0
made.set_timesteps(20)
def work():
    while time.monotonic() < end:
        if made._step_index is None or made._step_index >= 18:
            made._step_index = 5
        try:
            made.step(x, made.timesteps[7], x)
        except (TypeError, ValueError, IndexError, AttributeError):
            pass  # a state that is another thread's
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_threads_that_share_a_run_by_mistake_do_not_crash():
    assert subprocess.run([sys.executable, "-c", THREADS], capture_output=True).returncode == 0


def test_threads_share_the_numbers():
    made = begun("DPMSolverMultistepScheduler", 12)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    want, got = loop(made, x, made.timesteps), {}

    def work(k):
        for _ in range(20):
            run = made.new_loop()
            got[k] = loop(run, x, run.timesteps)
            assert_bitwise(got[k], want)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4


def test_a_new_loop_needs_timesteps_and_can_be_copied():
    with pytest.raises(ValueError, match="set_timesteps"):
        fast.DDIMScheduler().new_loop()
    made = begun("UniPCMultistepScheduler", 5)
    x = torch.ones(1, 3, 4, 4)
    want = loop(made.new_loop(), x, made.timesteps)
    run = made.new_loop()
    half = loop(run, x, made.timesteps, slice(2))
    for other in (copy.deepcopy(run), pickle.loads(pickle.dumps(run)), run):
        assert_bitwise(loop(other, half, made.timesteps, slice(2, None)), want)
    assert_bitwise(loop(run.new_loop(), x, made.timesteps), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", ["fastgen", "torch", "generator"])
@pytest.mark.parametrize("name", sorted(fast._CLASSES))
def test_a_step_under_way_is_the_step(name, noise, dtype, monkeypatch):
    """With the same draws: the generators are left as they would be."""
    ends = []
    for _ in range(2):
        made = getattr(fast, name).from_config(
            getattr(diffusers, name)().config, noise=noise.replace("generator", "torch")
        )
        x, results = torch.linspace(-1, 1, 192).view(1, 3, 8, 8).to(dtype), []
        torch.manual_seed(0)
        more, takes = {}, inspect.signature(getattr(made, method(made))).parameters
        if noise == "generator" and "generator" in takes:
            more = {"generator": torch.Generator().manual_seed(5)}
        for i, t in enumerate(timed(made, 6)):
            if hasattr(made, "scale_model_input"):
                made.scale_model_input(x, t)
            e = torch.tanh(0.5 * x + float(t) / 1000).to(dtype)
            x, *rest = advance(made, e, i, x.to(dtype), **more, return_dict=False)
            results += [x, *(y for y in rest if y is not None)]
        results += [torch.rand(1), torch.rand(1, **more)]
        ends.append(results)
        monkeypatch.setattr(type(made), "_under_way", lambda *_: None)
    assert_bitwise(*ends)


X = torch.linspace(-1, 1, 384).view(2, 3, 8, 8)
SEVERAL = [torch.Generator(), torch.Generator()]


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize(("sample", "output", "generators"), [
    (X, X.mul(0.5), SEVERAL),
    (X, X.mul(0.5).transpose(2, 3).contiguous().transpose(2, 3), []),
    (X, X.mul(0.5).to(memory_format=torch.channels_last), SEVERAL[:1]),
    (X.bfloat16(), X.mul(0.5), []), (X.double(), X.mul(0.5).double(), []),
], ids=["a list", "transposed", "channels last", "two dtypes", "double"])  # fmt: skip
def test_draws_out_of_the_ordinary(name, sample, output, generators, monkeypatch):
    ends = []
    for _ in range(2):
        made, x = begun(name, 5), sample
        torch.manual_seed(0)
        for generator in generators:
            generator.manual_seed(7)
        given = generators if len(generators) > 1 else generators[0] if generators else None
        for t in made.timesteps[:3]:
            made.scale_model_input(x, t)
            x = made.step(output, t, x.to(sample.dtype), generator=given).prev_sample
        ends.append((x, torch.rand(1)))
        monkeypatch.setattr(type(made), "_under_way", lambda *_: None)
    assert_bitwise(*ends)


def test_a_generator_that_is_none_is_refused_before_anything_is_drawn():
    made = begun("DDPMScheduler", 5)
    made.step(X, made.timesteps[0], X)
    before = torch.get_rng_state()
    for wrong in ("a word", torch.Generator):
        with pytest.raises((TypeError, AttributeError)):
            made.step(X, made.timesteps[1], X, generator=wrong)
    assert_bitwise(torch.get_rng_state(), before)


@pytest.mark.parametrize("values", [1, 2])
def test_a_result_is_as_diffusers_makes_it(values):
    cls = diffusers.schedulers.scheduling_ddim.DDIMSchedulerOutput
    tensors = [torch.randn(2) for _ in range(values)]
    made, wanted = _made(cls, *tensors), cls(*tensors)
    assert type(made) is cls
    assert list(made.items()) == list(wanted.items())
    assert vars(made) == vars(wanted)
    assert made.to_tuple() == wanted.to_tuple()
    revived = pickle.loads(pickle.dumps(made))
    assert list(revived) == list(wanted)
    made.prev_sample = tensors[0] + 1
    assert_bitwise(made["prev_sample"], tensors[0] + 1)
