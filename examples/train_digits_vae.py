"""Train `digits-vae`: a variational autoencoder of handwritten digits. Kingma & Welling (2014)."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import digits
import torch
from torch import Tensor
from tqdm import tqdm

import fastgen
from fastgen.zoo import networks, weights

BATCH = 64


def negative_elbo(model: networks.VAE, x: Tensor, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """x (B, 1, 16, 16) -> distortion -log p(x | z), rate KL(q(z | x) || p(z)): nats (B,) each"""
    mean, logvar = model.encode(x)
    z, rate = fastgen.reparameterize(mean, logvar, seed=seed, step=step, return_kl=True)
    error = (x - model.decode(z)).square() / model.pixel_logvar.exp()
    density = error + model.pixel_logvar + math.log(2 * math.pi)
    return 0.5 * density.flatten(1).sum(dim=1), rate


def train(train_set: digits.Digits, *, steps: int, seed: int) -> networks.VAE:
    """Maximise the evidence lower bound with Adam."""
    torch.manual_seed(seed)
    model = networks.VAE()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    learning_rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in (bar := tqdm(range(steps))):
        batch = torch.randint(len(train_set.labels), (BATCH,))
        distortion, rate = negative_elbo(model, train_set.images[batch], seed=seed, step=step)
        loss = (distortion + rate).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learning_rate.step()
        if step % 50 == 0:
            bar.set_postfix(nats=f"{loss.item():.1f}")
    return model.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default="digits-vae.safetensors")
    args = parser.parse_args()

    train_set, held_out = digits.load()
    start = time.perf_counter()
    model = train(train_set, steps=args.steps, seed=args.seed)
    minutes = (time.perf_counter() - start) / 60

    draws = [negative_elbo(model, held_out.images, seed=args.seed + 1, step=k) for k in range(32)]
    distortion, rate = (torch.stack(part).mean().item() for part in zip(*draws, strict=True))
    deviation = model.pixel_logvar.exp().sqrt().item()
    classifier = digits.train_classifier(train_set)
    same = digits.accuracy(classifier, digits.Digits(model(held_out.images), held_out.labels))

    likelihood = f"normal likelihood, standard deviation {deviation:.3f}"
    print(f"held-out ELBO, {likelihood}")
    print(f"  {-distortion - rate:.1f} nats an image: distortion {distortion:.1f}, rate {rate:.1f}")
    print(f"reconstructions read as their digit  {same:.1%}")
    weights.write(
        args.out,
        model,
        digits.card(
            f"variational autoencoder, {model.latent} latents",
            model,
            minutes,
            f"held-out ELBO {-distortion - rate:.1f} nats an image ({likelihood}, 256 pixels in "
            f"[-1, 1]); {same:.1%} of held-out reconstructions read as their digit",
        ),
    )


if __name__ == "__main__":
    main()
