"""The promise: the same bits from every backend, for any shape, strides and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

import fastgen
from fastgen import backends
from fastgen.testing import assert_bitwise, sample_tensor
from fastgen.verify_cases import OPS
from shared import HAS_TRITON, ISAS

EXACT = [name for name, op in OPS.items() if op.exact]


def everywhere(call) -> None:
    """The same bits from the reference, the CPU kernels of every instruction set on one and two
    threads, and Triton."""
    expected = call("reference")
    native, threads = backends.native(), torch.get_num_threads()
    chosen = native.isa()
    try:
        for isa in ISAS:
            native.choose_isa(isa)
            for count in (1, 2):
                torch.set_num_threads(count)
                assert_bitwise(call("cpu"), expected)
    finally:
        native.choose_isa(chosen)
        torch.set_num_threads(threads)
    assert_bitwise(call(None), expected)
    if HAS_TRITON:
        assert_bitwise(call("triton"), expected)


@pytest.mark.parametrize("op", EXACT)
def test_every_backend_has_the_bits_of_the_reference(op):
    """The cases of ``fastgen verify``, under every instruction set and in Triton's interpreter."""

    @settings(
        max_examples=30, phases=(Phase.explicit, Phase.generate), deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip  # a failure in the interpreter takes too long to shrink
    @given(OPS[op].cases())
    def run(case):
        def make(shape, dtype, layout, seed):
            special = case["seed"] % 3 == 0
            return sample_tensor(shape, getattr(torch, dtype), layout, seed, special=special)

        everywhere(lambda backend: OPS[op].run(make, backend, **case))

    run()


@pytest.mark.parametrize("op", ["randn", "add_noise", "reparameterize", "ddpm_step"])
def test_a_sample_is_the_same_alone_in_any_batch_and_at_any_slot(op):
    x, y = torch.randn(2, 5, 3, 17, 9)
    ids = [40, 7, 123456789012, 3, 11]

    def run(slots):
        one, two = x[slots], y[slots]
        chosen = [ids[i] for i in slots]
        if op == "randn":
            return fastgen.randn(one.shape, seed=9, sample_ids=chosen)
        if op == "add_noise":
            return fastgen.add_noise(one, 0.3, seed=9, step=1, sample_ids=chosen)
        if op == "ddpm_step":
            return fastgen.ddpm_step(one, two, 0.3, 0.4, seed=9, step=1, sample_ids=chosen)
        z, kl = fastgen.reparameterize(one, two, seed=9, step=1, sample_ids=chosen, return_kl=True)
        return torch.cat([z.flatten(1), kl[:, None]], dim=1)

    whole = run([0, 1, 2, 3, 4])
    for slots in ([3], [4, 2], [1, 3, 0, 2]):
        assert_bitwise(run(slots), whole[slots])


def test_reductions_of_a_sample_do_not_depend_on_its_batch():
    x, y = torch.randn(2, 6, 5000)
    whole = fastgen.cfg_combine(x, y, 4.0, rescale=0.7)
    for i in range(6):
        assert_bitwise(
            fastgen.cfg_combine(x[i : i + 1], y[i : i + 1], 4.0, rescale=0.7)[0], whole[i]
        )


def test_flushing_denormals_changes_nothing():
    x = torch.full((1, 64), 1e-40)
    expected = fastgen.combine([x], [1.0])
    torch.set_flush_denormal(True)
    try:
        flushed = fastgen.combine([x], [1.0])
    finally:
        torch.set_flush_denormal(False)
    assert_bitwise(flushed, expected)
    assert_bitwise(expected, x)
