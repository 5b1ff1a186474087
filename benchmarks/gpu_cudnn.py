"""A dense block in inference by cuDNN's fused graphs, through its Python front end (the package nvidia-cudnn-frontend):
two graphs a layer, norm, ReLU and 1x1, then norm, ReLU and 3x3, as this package's kernels fuse them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Fused:
    """conv(relu(x * scale + shift)) as one graph, for images of these sizes and strides alone."""

    def __init__(self, handle: Any, x: Tensor, weight: Tensor, norm: nn.BatchNorm2d, y: Tensor) -> None:
        import cudnn

        kinds = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
        kind, single = kinds.get(x.dtype, cudnn.data_type.FLOAT), cudnn.data_type.FLOAT
        graph = cudnn.pygraph(
            handle=handle, io_data_type=kind, intermediate_data_type=single, compute_data_type=single
        )  # fmt: skip
        self.handle, self.graph = handle, graph
        scale, shift = vectors(norm)
        given = {"x": x, "scale": scale, "shift": shift, "weight": weight.contiguous(memory_format=torch.channels_last)}
        names = {
            name: graph.tensor(
                name=name,
                dim=list(t.shape),
                stride=list(t.stride()),
                data_type=single if t.dtype == torch.float32 else kind,
            )
            for name, t in given.items()
        }
        scaled = graph.mul(a=names["x"], b=names["scale"], name="scaled")
        active = graph.relu(input=graph.add(a=scaled, b=names["shift"], name="shifted"), name="active")
        side = weight.shape[2] // 2
        result = graph.conv_fprop(
            image=active, weight=names["weight"], padding=[side, side], stride=[1, 1], dilation=[1, 1], name="conv"
        )
        result.set_output(True).set_data_type(kind).set_dim(list(y.shape)).set_stride(list(y.stride()))
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.tensors = {names[name]: t for name, t in given.items()} | {result: y}
        self.workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=x.device)

    def __call__(self) -> None:
        self.graph.execute(self.tensors, self.workspace, handle=self.handle)


def vectors(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The norm with its running statistics as x * scale + shift, each [1, channels, 1, 1] float32."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.float() * torch.rsqrt(norm.running_var.float() + norm.eps)
    shift = norm.bias.float() - norm.running_mean.float() * scale
    return scale.detach().view(1, -1, 1, 1), shift.detach().view(1, -1, 1, 1)


class FusedGraphs:
    """A csp.reference.DenseBlock in eval mode. The first call builds the graphs, for inputs of that size.

    packed False: layers read and write slices of one buffer, nothing is concatenated. True: every layer reads what
    torch.cat gives, packed, for a cuDNN that takes no slices.
    """

    def __init__(self, block: nn.Module, packed: bool) -> None:
        self.block, self.packed = block, packed
        self.layers: list[tuple[Tensor, Fused, Fused, Tensor]] = []  # what it reads, its graphs, what it writes

    def __call__(self, x: Tensor) -> Tensor:
        if not self.layers:
            self.build(x)
        features = [x]
        if not self.packed:
            self.buffer[:, : x.shape[1]] = x
        for read, first, second, written in self.layers:
            if self.packed:
                torch.cat(features, 1, out=read)
            first()
            second()
            features.append(written)
        return torch.cat(features, 1) if self.packed else self.buffer

    def build(self, x: Tensor) -> None:
        import cudnn

        handle = cudnn.create_handle()
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream if x.is_cuda else 0)
        layers: list[Any] = list(self.block.children())
        growth = layers[0].conv2.out_channels
        self.buffer, at = image(x, x.shape[1] + growth * len(layers)), x.shape[1]
        for layer in layers:
            read, z, written = self.buffer[:, :at], image(x, layer.conv1.out_channels), self.buffer[:, at : at + growth]
            if self.packed:
                read, written = image(x, at), image(x, growth)
            first = Fused(handle, read, layer.conv1.weight, layer.norm1, z)
            second = Fused(handle, z, layer.conv2.weight, layer.norm2, written)
            self.layers.append((read, first, second, written))
            at += growth


def image(like: Tensor, channels: int) -> Tensor:
    n, _, h, w = like.shape
    return torch.empty(n, channels, h, w, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
