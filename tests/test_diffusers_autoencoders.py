"""diffusers' posterior over latents, drawn here in one pass, and autoencoders that give it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastgen
from fastgen.testing import assert_bitwise

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Theirs  # noqa: E402

from fastgen.integrations import diffusers as fast  # noqa: E402

Ours = fast.DiagonalGaussianDistribution
EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def moments(*shape, dtype=torch.float32, spread=2.0):
    """With log-variances on both sides of the clamp where the spread is large."""
    return (spread * torch.randn(shape or (3, 8, 6, 5), generator=generator(1))).to(dtype)


def exact_sample(parameters, noise):
    mean, logvar = parameters.double().chunk(2, dim=1)
    return mean, (0.5 * logvar.clamp(-30, 20)).exp() * noise.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", ["plain", "channels last", "every other"])
@pytest.mark.parametrize("spread", [2.0, 20.0])
def test_a_seed_gives_diffusers_latents(dtype, memory, spread):
    parameters = moments(dtype=dtype, spread=spread)
    if dtype is torch.float16:
        parameters[:, 4:].clamp_(max=10.0)  # exp(20 / 2) times a normal is beyond its range
    if memory == "channels last":
        parameters = parameters.contiguous(memory_format=torch.channels_last)
    elif memory == "every other":
        parameters = parameters.repeat_interleave(2, dim=3)[..., ::2]
    first, second = generator(), generator()
    theirs, ours = Theirs(parameters).sample(first), Ours(parameters).sample(second)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert_bitwise(first.get_state(), second.get_state())
    noise = torch.randn(ours.shape, generator=generator(), dtype=dtype)
    mean, drawn = exact_sample(parameters, noise)
    exact = mean + drawn
    # exp within 2 ulp of an argument that is exact, a product and a sum; one rounding at the end
    bound = EPS * (3 * drawn.abs() + exact.abs()) + torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((ours - exact).abs() <= bound).all()
    if dtype is not torch.float32:
        assert (ours - exact).abs().max() <= (theirs - exact).abs().max()


def test_float64_is_diffusers_own_to_its_roundings():
    parameters = moments(dtype=torch.float64)
    theirs, ours = (kind(parameters).sample(generator()) for kind in (Theirs, Ours))
    assert (ours - theirs).abs().max() <= 4 * torch.finfo(torch.float64).eps * theirs.abs().max()


@pytest.mark.parametrize("deterministic", [False, True])
def test_its_parts_are_diffusers(deterministic):
    parameters, other = moments(spread=20.0), moments(dtype=torch.float32, spread=0.5)
    theirs, ours = (kind(parameters, deterministic) for kind in (Theirs, Ours))
    assert isinstance(ours, Theirs)
    for name in ("parameters", "mean", "logvar", "std", "var", "deterministic"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0)
    assert_bitwise(ours.mode(), theirs.mode())
    assert ours.mean.untyped_storage().data_ptr() == parameters.untyped_storage().data_ptr()
    x = torch.randn(3, 4, 6, 5, generator=generator())
    assert_bitwise(ours.nll(x), theirs.nll(x))
    assert_bitwise(ours.nll(x, dims=(1, 3)), theirs.nll(x, dims=(1, 3)))
    for kind in (Theirs, Ours):
        assert_bitwise(ours.kl(kind(other)), theirs.kl(Theirs(other)))


def test_deterministic_is_its_mean_and_draws_as_there():
    parameters, first, second = moments(), generator(), generator()
    theirs, ours = Theirs(parameters, True).sample(first), Ours(parameters, True).sample(second)
    assert_bitwise(ours, theirs)
    assert_bitwise(first.get_state(), second.get_state())
    assert ours.untyped_storage().data_ptr() != parameters.untyped_storage().data_ptr()
    z, kl = Ours(parameters, True).sample(generator(), return_kl=True)
    assert_bitwise((z, kl), (theirs, torch.zeros(1)))
    assert_bitwise(Ours(parameters, True).kl(), torch.zeros(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_divergence_is_diffusers(dtype):
    parameters = moments(3, 8, 16, 15, dtype=dtype, spread=1.0)
    theirs, ours = Theirs(parameters).kl(), Ours(parameters).kl()
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    mean, logvar = parameters.double().chunk(2, dim=1)
    exact = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)
    size = 0.5 * (mean**2 + logvar.exp() + logvar.abs() + 1).flatten(1).sum(1)
    # a few roundings a term, a tree of 10 levels; then the one to the moments' dtype
    bound = 16 * EPS * size + torch.finfo(dtype).eps / 2 * exact
    assert ((ours - exact).abs() <= bound).all()
    z, kl = Ours(parameters).sample(generator(), return_kl=True)
    assert kl.dtype is torch.float32
    assert_bitwise(kl.to(dtype), ours)
    assert_bitwise(z, Ours(parameters).sample(generator()))


def test_the_divergence_of_a_video_is_summed_as_there():
    parameters = moments(2, 8, 3, 4, 5)
    assert_bitwise(Ours(parameters).kl(), Theirs(parameters).kl())
    _, kl = Ours(parameters).sample(return_kl=True)
    torch.testing.assert_close(kl, Theirs(parameters).kl().sum(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_diffusers(dtype):
    given = moments(dtype=dtype, spread=1.0)
    given[0, 4:], given[1, 4:] = -40.0, 40.0 if dtype is not torch.float16 else -40.0  # clamped
    noise = torch.randn(3, 4, 6, 5, generator=generator(), dtype=dtype)
    weight = torch.randn(3, 4, 6, 5, generator=generator(5))

    def gradient(loss):
        parameters = given.clone().requires_grad_()
        return torch.autograd.grad(loss(parameters), parameters)[0]

    def of(kind):
        def loss(parameters):
            posterior = kind(parameters)
            return (posterior.sample(generator()).float() * weight).sum() + posterior.kl().sum()

        return gradient(loss)

    def exact(parameters):
        mean, logvar = parameters.double().chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        z = mean + (0.5 * logvar).exp() * noise.double()
        return (z * weight).sum() + 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum()

    want, theirs, ours = gradient(exact), of(Theirs), of(Ours)
    assert ours.dtype == theirs.dtype
    assert (want[:2, 4:] == 0).all()
    assert (ours[:2, 4:] == 0).all()
    # each of two gradients is rounded, and their sum; so is the weight, to a half's dtype
    assert (ours - want).abs().max() <= 4 * max(torch.finfo(dtype).eps, 8 * EPS) * want.abs().max()


def test_noise_of_the_kernel_does_not_depend_on_the_batch():
    parameters = moments()

    def drawn(seeds, rows):
        posterior = Ours(parameters[rows], noise="fastgen")
        return posterior.sample([generator(s) for s in seeds])

    together = drawn([5, 6, 7], slice(None))
    assert_bitwise(drawn([6], slice(1, 2)), together[1:2])
    assert_bitwise(drawn([5, 9, 7], slice(None))[::2], together[::2])
    alone = Ours(parameters, noise="fastgen").sample(generator())
    seed = int(torch.randint(2**63 - 1, (1,), generator=generator()))
    mean, logvar = parameters.chunk(2, dim=1)
    assert_bitwise(alone, fastgen.reparameterize(mean, logvar, seed=seed, step=0))
    source = generator()
    posterior = Ours(parameters, noise="fastgen")
    assert not torch.equal(posterior.sample(source), posterior.sample(source))
    torch.manual_seed(0)
    first = posterior.sample()
    torch.manual_seed(0)
    assert_bitwise(posterior.sample(), first)


def test_a_noise_of_another_name_is_refused():
    with pytest.raises(ValueError, match="noise: got 'other'"):
        Ours(moments(), noise="other")
    with pytest.raises(ValueError, match="noise: got 'other'"):
        fast.convert(autoencoder(), noise="other")


def autoencoder():
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def test_an_autoencoder_gives_these_posteriors():
    vae, image = autoencoder(), torch.randn(2, 3, 16, 16, generator=generator())
    made = fast.convert(vae)
    with torch.no_grad():
        theirs, ours = vae.encode(image).latent_dist, made.encode(image).latent_dist
        (alone,) = made.encode(image, return_dict=False)
        assert type(theirs) is Theirs
        for posterior in (ours, alone, made.encode(image)[0]):
            assert type(posterior) is Ours
            assert_bitwise(posterior.parameters, theirs.parameters)
        decoded = [kind(image, sample_posterior=True, generator=generator()).sample
                   for kind in (vae, made)]  # fmt: skip
    torch.testing.assert_close(*decoded)
    assert isinstance(made, diffusers.AutoencoderKL)
    assert made.config == vae.config
    assert next(made.parameters()) is next(vae.parameters())


def test_an_autoencoder_is_copied_pickled_and_converted_again(tmp_path):
    image = torch.randn(1, 3, 16, 16, generator=generator())
    made = fast.convert(autoencoder(), noise="fastgen")
    with torch.no_grad():
        expected = made.encode(image).latent_dist.sample(generator())
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), fast.convert(made)):
            assert type(other) is type(made)
            assert_bitwise(other.encode(image).latent_dist.sample(generator()), expected)
    made.save_pretrained(tmp_path)
    loaded = diffusers.AutoModel.from_pretrained(str(tmp_path))
    assert type(loaded) is diffusers.AutoencoderKL


def test_what_has_another_latent_is_left_as_it_is():
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip
    image = torch.randn(1, 3, 16, 16, generator=generator())
    with torch.no_grad():
        assert_bitwise(fast.convert(tiny).encode(image).latents, tiny.encode(image).latents)


def test_the_autoencoder_of_a_pipeline():
    vae = autoencoder()
    pipe = diffusers.DiTPipeline(
        diffusers.DiTTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=8),
        vae, diffusers.DDIMScheduler(),
    )  # fmt: skip
    assert fast.convert(pipe).vae is vae
    pipe.vae = fast.convert(vae)
    assert pipe.config["vae"] == ("diffusers", "AutoencoderKL")
