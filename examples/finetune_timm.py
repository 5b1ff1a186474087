"""Fine-tunes a timm network on MNIST digits with a plain training loop, fused by one line.

    pip install "csp_kernels[demo]" timm
    python examples/finetune_timm.py        # 60 steps
    python examples/finetune_timm.py 100    # 100 steps

It downloads nothing: weights are random here (pretrained=True fetches timm's), and the digits come with a package.
"""

from __future__ import annotations

import sys
import time

import timm
import torch
import torch.nn.functional as F

import csp_kernels as csp
from csp_kernels.demo.data import batches, load_digits


def main(steps: int = 60, fuse: bool = True) -> list[float]:
    """The loss of each step; fuse=False: the same training by timm's own forwards."""
    torch.manual_seed(0)
    model = timm.create_model("cs3darknet_s", pretrained=False, in_chans=1, num_classes=10)
    if fuse:
        print(csp.fuse(model))  # the one line; it returns a report of what it did
    digits = load_digits(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: list[float] = []
    model.train()
    start = time.perf_counter()
    while len(losses) < steps:
        for images, labels in batches(digits, batch_size=32, seed=len(losses)):
            images = F.interpolate(images, size=(64, 64), mode="bilinear")
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) % 10 == 0:
                print(f"step {len(losses):4d}: loss {sum(losses[-10:]) / 10:.3f} on average of ten")
            if len(losses) == steps:
                break
    print(f"{steps} steps in {time.perf_counter() - start:.1f} s, {'fused' if fuse else 'as timm runs it'}")
    model.eval()
    with torch.inference_mode():
        images = F.interpolate(digits.test_images[:256], size=(64, 64), mode="bilinear")
        right = (model(images).argmax(1) == digits.test_labels[:256]).float().mean().item()
    print(f"{right:.1%} of 256 digits that it has not seen are right")
    return losses


if __name__ == "__main__":
    main(int(sys.argv[1])) if sys.argv[1:] else main()
