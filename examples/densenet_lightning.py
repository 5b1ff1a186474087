"""Trains torchvision's DenseNet-121 under Lightning, fused by one line, and loads the checkpoint into a plain network.

    pip install "csp_kernels[demo]" torchvision lightning
    python examples/densenet_lightning.py       # 10 steps
    python examples/densenet_lightning.py 50    # 50 steps
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import csp_kernels as csp
from csp_kernels.demo.data import load_digits


class Classifier(lightning.LightningModule):
    """A DenseNet for ten classes, on the images of one channel that the digits are."""

    def __init__(self, fuse: bool = True) -> None:
        super().__init__()
        self.network = torchvision.models.densenet121(num_classes=10)
        self.losses: list[float] = []
        if fuse:
            print(csp.fuse(self.network))  # the one line; weights may be loaded before or after it

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(F.interpolate(images, size=(64, 64), mode="bilinear").expand(-1, 3, -1, -1))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int = 10, fuse: bool = True) -> tuple[list[float], float]:
    """The loss of each step, and by how much the plain network that has the checkpoint differs from the trained one."""
    lightning.seed_everything(0, verbose=False)
    model = Classifier(fuse)
    digits = load_digits(seed=0)
    loader = DataLoader(TensorDataset(digits.train_images, digits.train_labels), batch_size=16)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader)
    print("losses:", " ".join(f"{loss:.3f}" for loss in model.losses))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "densenet.ckpt"
        trainer.save_checkpoint(path)
        plain = Classifier.load_from_checkpoint(path, fuse=False)
    images = digits.test_images[:16]
    with torch.inference_mode():
        differs = (plain.eval()(images) - model.eval()(images)).abs().max().item()
    print(f"the checkpoint loads into a plain network, whose logits differ by at most {differs:.1e}")
    return model.losses, differs


if __name__ == "__main__":
    main(int(sys.argv[1])) if sys.argv[1:] else main()
