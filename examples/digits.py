"""Handwritten digits, a classifier that reads them, and what the three examples measure with it.

The images are the 1,797 that scikit-learn ships: the test half of "Optical Recognition of
Handwritten Digits" (E. Alpaydin & C. Kaynak, 1998, UCI, CC BY 4.0).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


class Digits(NamedTuple):
    """images (N, 1, 16, 16) float32 in [-1, 1], labels (N,) int64"""

    images: Tensor
    labels: Tensor


def load(seed: int = 0) -> tuple[Digits, Digits]:
    """The training three quarters and the held-out quarter, each digit in proportion."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
    images = F.interpolate(images, scale_factor=2.0, mode="bilinear")
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=seed
    )
    every = torch.from_numpy(labels).long()
    return Digits(images[train], every[train]), Digits(images[held_out], every[held_out])


class Classifier(nn.Module):
    """Reads digits: images (B, 1, 16, 16) -> logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, 2, 1),  # 8x8
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # 4x4
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """images (B, 1, 16, 16) -> (B, 64), what the head reads."""
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """images (B, 1, 16, 16) -> the digits (B,) int64 that they show."""
        return self(images).argmax(dim=1)


def train_classifier(digits: Digits, *, seed: int = 0, epochs: int = 30) -> Classifier:
    """A classifier in eval mode, trained in seconds on images shifted by up to a pixel each way."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier()
        steps = epochs * (len(digits.labels) // 64)
        optimizer = torch.optim.Adam(classifier.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            batch = torch.randint(len(digits.labels), (64,))
            padded = F.pad(digits.images[batch], (1, 1, 1, 1), value=-1.0)
            down, right = torch.randint(3, (2,)).tolist()
            logits = classifier(padded[:, :, down : down + 16, right : right + 16])
            loss = F.cross_entropy(logits, digits.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def accuracy(classifier: Classifier, digits: Digits) -> float:
    """The share of images that the classifier reads as their label."""
    return (classifier.read(digits.images) == digits.labels).float().mean().item()


def variance_within_classes(digits: Digits) -> float:
    """The variance over the images of one digit, averaged over pixels, then over digits."""
    return float(
        np.mean([digits.images[digits.labels == k].var(dim=0).mean().item() for k in range(10)])
    )


@torch.no_grad()
def frechet_distance(classifier: Classifier, a: Tensor, b: Tensor) -> float:
    """Frechet distance between normals fitted to features of a and b (Heusel et al., 2017, eq. 6).

    a, b: images (N, 1, 16, 16)
    """
    fits = []
    for images in (a, b):
        features = classifier.features(images).double().numpy()
        fits.append((features.mean(axis=0), np.cov(features, rowvar=False)))
    (mean_a, cov_a), (mean_b, cov_b) = fits
    root_trace = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * root_trace)


def distance_to_real(classifier: Classifier, images: Tensor) -> tuple[float, float]:
    """Frechet distance from images to all the real digits, and between halves of those."""
    real = torch.cat([part.images for part in load()])
    halves = frechet_distance(classifier, real[::2], real[1::2])
    return frechet_distance(classifier, images, real), halves


def card(what: str, model: nn.Module, minutes: float, quality: str) -> str:
    """The one line that is stored with the weights."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{what}, {parameters:,} parameters; data: 1,347 of scikit-learn's handwritten digits "
        f"(UCI, CC BY 4.0), 16x16; trained in {minutes:.1f} min on {torch.get_num_threads()} CPU "
        f"threads; {quality}"
    )
