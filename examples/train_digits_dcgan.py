"""Train `digits-dcgan`: a generator of handwritten digits. Radford, Metz & Chintala (2016)."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import digits
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from tqdm import tqdm

from fastgen.zoo import networks, weights

BATCH = 64


def discriminator(width: int = 32) -> nn.Sequential:
    """Images (B, 1, 16, 16) -> logits (B, 1), with spectral norms (Miyato et al., 2018)."""
    return nn.Sequential(
        spectral_norm(nn.Conv2d(1, width, 4, 2, 1)),  # 8x8
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(width, 2 * width, 4, 2, 1)),  # 4x4
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        spectral_norm(nn.Linear(2 * width * 16, 1)),
    )


def shifted(images: Tensor) -> Tensor:
    """Images moved by up to a pixel each way, so that the critic cannot learn them by heart."""
    down, right = torch.randint(3, (2,)).tolist()
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    return padded[:, :, down : down + 16, right : right + 16]


def train(train_set: digits.Digits, *, steps: int, seed: int) -> networks.Generator:
    """The exponential moving average of the generator over the game's rounds."""
    torch.manual_seed(seed)
    generator, critic = networks.Generator(), discriminator()
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    generator_optimizer = torch.optim.Adam(generator.parameters(), 2e-4, betas=(0.5, 0.999))
    critic_optimizer = torch.optim.Adam(critic.parameters(), 4e-4, betas=(0.5, 0.999))
    for step in (bar := tqdm(range(steps))):
        batch = torch.randint(len(train_set.labels), (BATCH,))
        fake = generator(torch.randn(BATCH, generator.latent))
        on_real = critic(shifted(train_set.images[batch]))
        on_fake = critic(shifted(fake.detach()))
        critic_loss = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
        critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_optimizer.step()

        generator_loss = F.softplus(-critic(shifted(fake))).mean()
        generator_optimizer.zero_grad()
        generator_loss.backward()
        generator_optimizer.step()
        average.update_parameters(generator)
        if step % 50 == 0:
            bar.set_postfix(critic=f"{critic_loss.item():.2f}", generator=f"{generator_loss:.2f}")
    averaged: networks.Generator = average.module
    update_bn((torch.randn(BATCH, averaged.latent) for _ in range(100)), averaged)
    return averaged.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default="digits-dcgan.safetensors")
    args = parser.parse_args()

    train_set, _ = digits.load()
    start = time.perf_counter()
    model = train(train_set, steps=args.steps, seed=args.seed)
    minutes = (time.perf_counter() - start) / 60

    classifier = digits.train_classifier(train_set)
    images = model(torch.randn(1000, model.latent))
    counts = torch.bincount(classifier.read(images), minlength=10).tolist()
    distance, floor = digits.distance_to_real(classifier, images)

    print("digits read in 1,000 images          ", *(f"{k}: {n}" for k, n in enumerate(counts)))
    print(f"Frechet distance to real digits      {distance:.1f}")
    print(f"  between halves of the real digits  {floor:.1f}")
    weights.write(
        args.out,
        model,
        digits.card(
            f"DCGAN generator, {model.latent} latents",
            model,
            minutes,
            f"of 1,000 images {min(counts)} to {max(counts)} read as each digit; "
            f"Frechet distance {distance:.1f} (halves of the data {floor:.1f})",
        ),
    )


if __name__ == "__main__":
    main()
