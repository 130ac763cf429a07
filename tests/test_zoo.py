"""The zoo's models load, refuse damaged weights, and are as good as their cards say."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastgen
from fastgen import zoo
from fastgen.zoo import networks

LABELS = torch.arange(10).repeat_interleave(100)


@pytest.fixture(scope="module")
def digits():
    """examples/digits.py as a module."""
    pytest.importorskip("sklearn")
    path = Path(__file__).parents[1] / "examples" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(digits):
    return digits.load()


@pytest.fixture(scope="module")
def classifier(digits, data):
    return digits.train_classifier(data[0])


@pytest.fixture(scope="module")
def guided(digits):
    """1,000 guided samples, a hundred of each digit."""
    model = zoo.load("digits-diffusion")
    schedule = fastgen.NoiseSchedule.cosine(1000)
    plan = fastgen.solvers.ddim(schedule, 50, prediction="v")
    images = fastgen.sample(
        model,
        plan,
        (1000, 1, 16, 16),
        seed=0,
        guidance_scale=3.0,
        cond=LABELS,
        uncond=torch.full_like(LABELS, model.unconditional),
    )
    return digits.Digits(images, LABELS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the weight files, in the place of the zoo's own."""
    for path in zoo._FOLDER.glob("*.safetensors"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(zoo, "_FOLDER", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", zoo.names())
def test_models_load_in_eval_mode_as_float32_without_gradients(name):
    model = zoo.load(name)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", zoo.names())
def test_a_card_is_one_line_with_the_licence_of_the_data(name):
    assert "CC BY 4.0" in zoo.card(name)
    assert len(zoo.card(name).splitlines()) == 1


def test_weights_together_are_under_6_megabytes():
    assert sum(path.stat().st_size for path in zoo._FOLDER.glob("*.safetensors")) < 6e6


def test_importing_the_zoo_does_not_import_scikit_learn():
    code = "import sys, fastgen.zoo; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="digits-dcgan"):
        zoo.load("digits-gan")
    with pytest.raises(ValueError, match="digits-vae"):
        zoo.card("digits-gan")


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, 0.999])
@pytest.mark.parametrize("name", zoo.names())
def test_weights_cut_short_are_refused(folder, name, keep):
    path = folder / f"{name}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if keep == 0 or keep >= 1 else int(keep * len(whole))])
    with pytest.raises(ValueError, match=path.name):
        zoo.load(name)


@pytest.mark.parametrize("name", zoo.names())
def test_weights_with_a_flipped_bit_are_refused(folder, name):
    path = folder / f"{name}.safetensors"
    flipped = bytearray(path.read_bytes())
    flipped[-1000] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=path.name):
        zoo.load(name)


def test_weights_of_another_model_are_refused(folder):
    shutil.copy(folder / "digits-dcgan.safetensors", folder / "digits-vae.safetensors")
    with pytest.raises(ValueError, match=r"digits-vae.* other tensors"):
        zoo.load("digits-vae")


@pytest.mark.parametrize("batch", [1, 3])
def test_output_shapes(batch):
    images = torch.zeros(batch, 1, 16, 16)
    diffusion, vae, dcgan = (zoo.load(name) for name in zoo.names())
    t = torch.zeros(batch, dtype=torch.int64)
    assert diffusion(images, t, t).shape == images.shape
    mean, logvar = vae.encode(images)
    assert mean.shape == logvar.shape == (batch, vae.latent)
    assert vae.decode(mean).shape == vae(images).shape == images.shape
    assert dcgan(torch.zeros(batch, dcgan.latent)).shape == images.shape


def test_a_fused_transposed_convolution_equals_its_parts():
    block = networks.TransposedConv(6, 5)
    torch.nn.init.normal_(block.norm.running_mean)
    torch.nn.init.uniform_(block.norm.running_var, 0.5, 2.0)
    block.eval()
    x = torch.randn(4, 6, 7, 3)
    y = F.conv_transpose2d(x, block.weight, block.bias, block.stride, block.padding)
    torch.testing.assert_close(block(x), F.relu(block.norm(y)))


def test_the_classifier_reads_held_out_digits(digits, data, classifier):
    assert digits.accuracy(classifier, data[1]) >= 0.97


def test_guided_samples_are_read_as_the_digit_asked_for(digits, classifier, guided):
    assert digits.accuracy(classifier, guided) >= 0.90


def test_guided_samples_vary_as_held_out_digits_do(digits, data, guided):
    held_out = digits.variance_within_classes(data[1])
    assert digits.variance_within_classes(guided) >= 0.7 * held_out


def test_vae_reconstructions_are_read_as_their_digit(digits, data, classifier):
    vae = zoo.load("digits-vae")
    reconstructed = digits.Digits(vae(data[1].images), data[1].labels)
    assert digits.accuracy(classifier, reconstructed) >= 0.9


def test_dcgan_makes_all_ten_digits(classifier):
    dcgan = zoo.load("digits-dcgan")
    z = torch.randn(1000, dcgan.latent, generator=torch.Generator().manual_seed(0))
    assert torch.bincount(classifier.read(dcgan(z)), minlength=10).min() >= 30
