"""The command line, as a user would call it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

from fastgen import cli


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("model", ["digits-diffusion", "digits-vae", "digits-dcgan"])
def test_sample_writes_a_grid_and_says_what_ran(model, tmp_path, capsys):
    out = tmp_path / "digits.png"
    options = ["--steps", 3, "--labels", "0-9"] if model == "digits-diffusion" else []
    status, text = run(capsys, "sample", "--model", model, *options, "--count", 2, "--out", out)
    assert status == 0
    assert model in text
    assert str(out) in text
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.size == (3 * (10 * 17 + 1), 3 * (2 * 17 + 1))
    if model == "digits-diffusion":
        assert "ddim, 3 steps, guidance 3, 20 samples on cpu" in text
        assert "network" in text
        assert "sampler" in text


def test_the_same_seed_writes_the_same_picture(tmp_path, capsys):
    pictures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.png"
        run(capsys, "sample", "--solver", "ddpm", "--steps", 4, "--labels", "3", "--count", 1,
            "--seed", seed, "--out", out)  # fmt: skip
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize(
    ("text", "labels"), [("0-3", [0, 1, 2, 3]), ("7", [7]), ("1,8-9", [1, 8, 9])]
)
def test_labels(text, labels):
    assert cli.labels_of(text) == labels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--labels", "0-12"], "--labels: got '0-12'"),
        (["sample", "--labels", "x"], "--labels: got 'x'"),
        (["sample", "--steps", "0"], "steps: got 0"),
        (["sample", "--steps", "2000"], "steps: got 2000"),
        (["sample", "--count", "0"], "--count: got 0"),
        (["sample", "--seed", "-1"], "seed: got -1"),
        (["sample", "--out", "/nowhere/at/all.png", "--steps", "1"], "is not a folder"),
        (["sample", "--model", "mnist"], "invalid choice: 'mnist'"),
        (["sample", "--model", "digits-vae", "--steps", "9"], "--steps: is not for digits-vae"),
        (["sample", "--solver", "ddpm", "--eta", "nan"], "--eta: is not for ddpm"),
        (["sample", "--eta", "nan"], "eta: got nan"),
        ([], "required"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_info_names_every_op_and_backend(capsys):
    _, text = run(capsys, "info")
    for word in ("step", "reparameterize", "conv_transpose", "triton", "reference", "cpu kernels"):
        assert word in text


def test_models_has_a_line_each(capsys):
    _, text = run(capsys, "models")
    assert len(text.strip().splitlines()) == 3


def test_the_module_runs():
    result = subprocess.run(
        [sys.executable, "-m", "fastgen", "--help"], capture_output=True, text=True, check=True
    )
    assert "sample" in result.stdout
