"""What every network is made of: named stages that give a pyramid, and a classifier on its last map."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from csp_kernels.fusion.choose import fuse


class Features(nn.Sequential):
    """Named modules in order: [N, in_channels, H, W] -> the outputs of those named in `taps`, finest first.

    taps: name -> (channels, stride); the last one is the last module. Sizes the stride does not divide are rounded.
    """

    def __init__(self, stages: dict[str, nn.Module], taps: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.taps = tuple(taps)
        self.channels = tuple(channels for channels, _ in taps.values())
        self.strides = tuple(stride for _, stride in taps.values())

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for name, stage in self._modules.items():
            assert stage is not None
            x = stage(x)
            if name in self.taps:
                maps.append(x)
        return maps


class Network(nn.Module):
    """Features, global average pooling, dropout, linear: [N, in_channels, H, W] -> logits [N, num_classes].

    features(x): the pyramid, a list of maps, finest first, with `channels` and `strides`: what the necks take.
    Initialised as the field does: convolutions He-normal over the fan out, batch norms 1 and 0.
    """

    def __init__(self, features: Features, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes}, expected at least 1")
        self.features = features
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(features.channels[-1], num_classes)
        initialise(self)
        fuse(self.features)  # stems, and stages of plain modules; layers of this package are operators already

    @property
    def channels(self) -> Sequence[int]:
        """Channels of the maps of features(x), finest first."""
        return self.features.channels

    @property
    def strides(self) -> Sequence[int]:
        """Pixels of the image per pixel of each map."""
        return self.features.strides

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.features(x)[-1].mean((2, 3))))


def initialise(module: nn.Module) -> None:
    """Convolutions He-normal over the fan out, batch norms 1 and 0, biases of linear layers 0."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear):
            nn.init.zeros_(m.bias)
