"""Train `digits-diffusion`: a guided diffusion model of handwritten digits, in minutes.

Ho, Jain & Abbeel (2020) with v-prediction (Salimans & Ho, 2022), the cosine schedule (Nichol &
Dhariwal, 2021) and labels dropped at random for classifier-free guidance (Ho & Salimans, 2022).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import digits
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import fastgen
from fastgen.zoo import networks, weights

BATCH = 128
LABEL_DROPPED = 0.1


def train(train_set: digits.Digits, *, steps: int, seed: int) -> networks.UNet:
    """The exponential moving average of a U-Net's weights over its training."""
    torch.manual_seed(seed)
    model = networks.UNet().to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    learning_rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    alpha_bars = torch.tensor(fastgen.NoiseSchedule.cosine(1000).alpha_bars).float()
    for step in (bar := tqdm(range(steps))):
        batch = torch.randint(len(train_set.labels), (BATCH,))
        spread = (torch.arange(BATCH) + torch.rand(1)) / BATCH  # t evenly over the schedule
        t = (spread * 1000).long().clamp(max=999)  # float32 may round up to 1000
        x_t, v = fastgen.add_noise(
            train_set.images[batch], alpha_bars[t], seed=seed, step=step, return_velocity=True
        )
        dropped = torch.rand(BATCH) < LABEL_DROPPED
        label = train_set.labels[batch].masked_fill(dropped, model.unconditional)
        loss = (model(x_t, t, label) - v).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learning_rate.step()
        average.update_parameters(model)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    averaged: networks.UNet = average.module
    return averaged.eval().requires_grad_(False)


def sample(model: networks.UNet, guidance_scale: float, *, seed: int) -> digits.Digits:
    """1,000 guided samples, a hundred of each digit, by 50 steps of DDIM."""
    labels = torch.arange(10).repeat_interleave(100)
    schedule = fastgen.NoiseSchedule.cosine(1000)
    plan = fastgen.solvers.ddim(schedule, 50, prediction="v")
    images = fastgen.sample(
        model,
        plan,
        (1000, 1, 16, 16),
        seed=seed,
        guidance_scale=guidance_scale,
        cond=labels,
        uncond=torch.full_like(labels, model.unconditional),
        progress=True,
    )
    return digits.Digits(images, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default="digits-diffusion.safetensors")
    args = parser.parse_args()

    train_set, held_out = digits.load()
    start = time.perf_counter()
    model = train(train_set, steps=args.steps, seed=args.seed)
    minutes = (time.perf_counter() - start) / 60

    classifier = digits.train_classifier(train_set)
    samples = sample(model, args.guidance_scale, seed=args.seed)
    read = digits.accuracy(classifier, samples)
    variance = digits.variance_within_classes(samples) / digits.variance_within_classes(held_out)
    distance, floor = digits.distance_to_real(classifier, samples.images)

    print(f"classifier on held-out digits        {digits.accuracy(classifier, held_out):.1%}")
    print(f"samples read as the digit asked for  {read:.1%}")
    print(f"variance within classes, to held-out {variance:.2f}")
    print(f"Frechet distance to real digits      {distance:.1f}")
    print(f"  between halves of the real digits  {floor:.1f}")
    weights.write(
        args.out,
        model,
        digits.card(
            "class-conditional diffusion U-Net, v-prediction, cosine schedule of 1,000 timesteps",
            model,
            minutes,
            f"of 1,000 samples (DDIM 50, guidance {args.guidance_scale:g}) {read:.1%} read as "
            f"asked for, variance within classes {variance:.2f} of held-out, Frechet distance "
            f"{distance:.1f} (halves of the data {floor:.1f})",
        ),
    )


if __name__ == "__main__":
    main()
