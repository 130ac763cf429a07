"""The ``fastgen`` command: sample from the zoo's models, see what runs where."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastgen
from fastgen import backends, cli_checks, zoo
from fastgen.plan import Plan
from fastgen.schedules import SPACINGS

SOLVERS: dict[str, Callable[..., Plan]] = {
    "ddim": fastgen.solvers.ddim,
    "ddpm": fastgen.solvers.ddpm,
    "dpmpp_2m": fastgen.solvers.dpmpp_2m,
}
DIFFUSION: dict[str, Any] = {  # options of digits-diffusion alone, and their defaults
    "solver": "ddim",
    "steps": 50,
    "spacing": "trailing",
    "eta": 0.0,
    "guidance": 3.0,
    "labels": "0-9",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fastgen", description=(__doc__ or "").replace("``", ""))
    parser.add_argument("--version", action="version", version=f"fastgen {fastgen.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_sample(commands)
    info = commands.add_parser("info", help="what runs where, and why")
    info.set_defaults(run=_info)
    models = commands.add_parser("models", help="the zoo's models, a line each")
    models.set_defaults(run=_models)
    demo = commands.add_parser("demo", help="sample all models into one picture; time the sampler")
    demo.add_argument("--out", type=Path, default=Path("demo.png"), help="default: %(default)s")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo.set_defaults(run=_demo)
    cli_checks.add_verify(commands)
    cli_checks.add_bench(commands)
    options = parser.parse_args(arguments)
    status = 0
    try:
        if hasattr(options, "out"):
            _check_picture(options.out)
        status = options.run(options) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        parser.exit(130, "fastgen: interrupted\n")
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, AssertionError) as error:
        parser.exit(2, f"fastgen: {str(error).splitlines()[0]}\n")
    return status


def _add_sample(commands: Any) -> None:
    sample = commands.add_parser(
        "sample",
        help="sample from a model of the zoo into a PNG",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sample.add_argument("--model", choices=zoo.names(), default="digits-diffusion",
                        help="which of the zoo's")  # fmt: skip
    sample.add_argument(
        "--count", type=int, default=4, help="samples of each label; without labels, tens"
    )
    sample.add_argument("--seed", type=int, default=0, help="seed of all noise")
    sample.add_argument("--out", type=Path, default=Path("samples.png"), help="PNG to write")
    sample.add_argument("--device", default="cpu", help="device to run on")
    diffusion = sample.add_argument_group("of digits-diffusion")
    diffusion.add_argument("--solver", choices=sorted(SOLVERS), help="of the plan")
    diffusion.add_argument("--steps", type=int, help="network calls for each sample")
    diffusion.add_argument("--spacing", choices=SPACINGS, help="of the timesteps")
    diffusion.add_argument("--eta", type=float, help="noise of ddim: 0 none, 1 as ddpm's")
    diffusion.add_argument("--guidance", type=float, help="classifier-free guidance scale")
    diffusion.add_argument("--labels", help="digits to draw, as in 0-9 or 3,1,4")
    sample.set_defaults(**DIFFUSION)
    sample.set_defaults(run=_sample)


def _check_picture(path: Path) -> None:
    """ValueError, before the work is done, where no PNG can be written."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out: got {path}, expected a name that ends in .png")
    if not path.parent.is_dir():
        raise ValueError(f"--out: {path.parent} is not a folder")


def labels_of(text: str) -> list[int]:
    """ "0-9" or "3,1,4" as a list of digits. ValueError for anything else."""
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        single = len(first) == 1 and len(last) == len(dash)
        if not single or not (first + last).isascii() or not (first + last).isdigit():
            raise ValueError(f"--labels: got {text!r}, expected digits as in 0-9 or 3,1,4")
        if int(last or first) < int(first):
            raise ValueError(f"--labels: got {text!r}, expected a range that rises")
        labels += range(int(first), int(last or first) + 1)
    return labels


def sample_digits(
    model: torch.nn.Module,
    plan: Plan,
    labels: Tensor,
    guidance: float,
    seed: int,
    progress: bool = False,
) -> tuple[Tensor, float, float]:
    """(images (B, 1, 16, 16), seconds in the network, seconds in the sampler)."""
    from tqdm.auto import tqdm

    network = sampler = 0.0
    unconditional = torch.full_like(labels, int(model.unconditional))  # type: ignore[arg-type]
    both = torch.cat([unconditional, labels])
    x = fastgen.randn((len(labels), 1, 16, 16), seed=seed, device=labels.device)
    loop = fastgen.Loop(
        plan,
        x,
        seed=seed if plan.stochastic else None,
        guidance_scale=guidance,
        guided=True,
    )
    for _ in tqdm(range(len(plan)), desc="sampling", unit="step", disable=not progress):
        start = time.perf_counter()
        output = model(loop.model_input, loop.time, both)
        middle = time.perf_counter()
        loop.step(output)
        network += middle - start
        sampler += time.perf_counter() - middle
    return loop.x, network, sampler


def decode_prior(model: torch.nn.Module, name: str, count: int, seed: int, device: str) -> Tensor:
    """Images from standard normal latents, by a decoder or generator: (count, 1, 16, 16)."""
    z = fastgen.randn((count, int(model.latent)), seed=seed, device=device)  # type: ignore[arg-type]
    return model.decode(z) if name == "digits-vae" else model(z)  # type: ignore[operator]


@torch.inference_mode()
def _sample(options: argparse.Namespace) -> None:
    if options.count < 1:
        raise ValueError(f"--count: got {options.count}, expected at least 1")
    for name, default in DIFFUSION.items():
        given = getattr(options, name) != default
        if given and options.model != "digits-diffusion":
            raise ValueError(f"--{name}: is not for {options.model}, but for digits-diffusion")
        if given and name == "eta" and options.solver != "ddim":
            raise ValueError(f"--eta: is not for {options.solver}, but for ddim")
    model = zoo.load(options.model, options.device)
    where = f"{options.device}, {backends.native().isa()} kernels"
    if options.model == "digits-diffusion":
        labels = torch.tensor(labels_of(options.labels), device=options.device)
        every = labels.repeat(options.count)
        extra = {"eta": options.eta} if options.solver == "ddim" else {}
        plan = SOLVERS[options.solver](
            fastgen.NoiseSchedule.cosine(),
            options.steps,
            prediction="v",
            spacing=options.spacing,
            **extra,
        )
        images, network, sampler = sample_digits(
            model, plan, every, options.guidance, options.seed, progress=True
        )
        columns = len(labels)
        line = (
            f"{options.model}: {options.solver}, {options.steps} steps, guidance "
            f"{options.guidance:g}, {len(every)} samples on {where}: network {network:.2f} s, "
            f"sampler {1e3 * sampler:.1f} ms ({1e6 * sampler / options.steps:.0f} µs a step)"
        )
    else:
        start = time.perf_counter()
        images = decode_prior(
            model, options.model, 10 * options.count, options.seed, options.device
        )
        columns = 10
        seconds = time.perf_counter() - start
        line = f"{options.model}: {len(images)} samples on {where} in {seconds:.3f} s"
    write_grid(images, options.out, columns)
    print(f"{line}\nwrote {options.out}")


def write_grid(images: Tensor, path: Path, columns: int, scale: int = 3) -> None:
    """(B, 1, H, W) in [-1, 1] as a PNG, row by row, each pixel ``scale`` wide."""
    from PIL import Image

    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.full((rows * (height + 1) + 1, columns * (width + 1) + 1), 32, dtype=torch.uint8)
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    for i in range(count):
        top, left = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        sheet[top : top + height, left : left + width] = pixels[i, 0]
    sheet = sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    Image.fromarray(sheet.numpy()).save(path, format="PNG")


@torch.inference_mode()
def _demo(options: argparse.Namespace) -> None:
    from fastgen.bench import eager
    from fastgen.bench.timing import interleaved, machine, report

    print(machine())
    plan = fastgen.solvers.ddim(fastgen.NoiseSchedule.cosine(), 50, prediction="v")
    diffusion = zoo.load("digits-diffusion")
    labels = torch.arange(10).repeat(4)
    images, network, sampler = sample_digits(diffusion, plan, labels, 3.0, options.seed)
    print(f"digits-diffusion: 40 digits, 50 steps: network {network:.2f} s, sampler "
          f"{1e3 * sampler:.1f} ms")  # fmt: skip
    rest = [
        decode_prior(zoo.load(n), n, 20, options.seed, "cpu")
        for n in ("digits-vae", "digits-dcgan")
    ]
    write_grid(torch.cat([images, *rest]), options.out, 10)
    print(f"wrote {options.out}: four rows of diffusion, two of the VAE, two of the DCGAN")

    a_t, a_s = 0.5, 0.6
    rows = []
    for shape in ((1, 16, 8), (40, 1, 16, 16), (1, 4, 64, 64), (8, 4, 128, 128)):
        x, c, u = (torch.randn(shape) for _ in range(3))

        def eager_step(x=x, c=c, u=u):
            return eager.ddim_step(x, eager.cfg_combine(c, u, 3.0), a_t, a_s)

        def our_step(x=x, c=c, u=u):
            return fastgen.ddim_step(x, c, a_t, a_s, uncond=u, guidance_scale=3.0)

        difference = (our_step() - eager_step()).abs().max()
        if not difference < 1e-4:
            raise ValueError(f"the step differs from eager PyTorch's by {difference}")
        rows.append(
            (f"ddim + guidance {shape}", interleaved({"fastgen": our_step, "eager": eager_step}))
        )

        def eager_ancestral(x=x, c=c, u=u):
            return eager.ddpm_step(x, eager.cfg_combine(c, u, 3.0), a_t, a_s)

        def our_ancestral(x=x, c=c, u=u):
            return fastgen.ddpm_step(x, c, a_t, a_s, uncond=u, guidance_scale=3.0, seed=0, step=1)

        timings = interleaved({"fastgen": our_ancestral, "eager": eager_ancestral})
        rows.append((f"ddpm + guidance {shape}", timings))
    report("sampler time per step", rows)


def _info(options: argparse.Namespace) -> None:
    print(f"fastgen {fastgen.__version__}")
    print(fastgen.info())


def _models(options: argparse.Namespace) -> None:
    for name in zoo.names():
        print(f"{name}: {zoo.card(name)}")
