"""The 3x3 of the compiled library (csrc/cuda/dense_block.h): which layers it takes, and its launchers, with the
arguments of their twins in kernels/conv3x3.py. P = N * H * W pixels, b bottleneck channels enter, g grown leave."""

from __future__ import annotations

import torch
from torch import Tensor

from csp_kernels.backends import running, why_not_cuda
from csp_kernels.kernels import activate
from csp_kernels.kernels.launch import Correction, Geometry, Norm
from csp_kernels.ops._node import padded

Mask = tuple[Tensor | None, int, int, float]  # of dropout: seed, layer, threshold, scale


def takes(z: Tensor, weight: Tensor, grown: Tensor, geometry: Geometry, precision: str) -> bool:
    """Whether CUDA C++ runs this layer, forward and backward alike, so that both see the same masks. z [P, b], grown
    [P, g]: the slice of the features that the layer writes."""
    if running() == "triton" or not _runs_on(z.device):
        return False
    return not torch.ops.csp_kernels.conv3x3_unsupported(z, weight, grown, _images(geometry), precision == "tf32")


def forward(
    z: Tensor,
    norm: Norm,
    weight: Tensor,
    out: Tensor,
    geometry: Geometry,
    precision: str,
    statistics: Tensor | None,
    mask: Mask,
) -> None:
    """out [P, g] = dropout(conv3x3(relu(norm(z)), weight)); statistics [2, g] float64: mean and biased variance."""
    torch.ops.csp_kernels.conv3x3_forward(
        z, _vectors(norm), weight, out, statistics, _images(geometry), *mask, precision == "tf32"
    )


def dgrad(
    features: Tensor,
    gradient: Tensor,
    correction: Correction | None,
    weight: Tensor,
    z: Tensor,
    norm: Norm,
    out: Tensor | None,
    geometry: Geometry,
    precision: str,
    mask: Mask,
    source: Tensor | None = None,
) -> Tensor:
    """out [P, b] = dn * scale, added to source in a second step; returns sums [2, b] of dn and dn * (z - mean)."""
    dn = out if out is not None and source is None and _fits(out) else _beside(z)
    tensors = *_slices(features, gradient, correction), weight, z, _vectors(norm)
    sums: Tensor = torch.ops.csp_kernels.conv3x3_dgrad(*tensors, dn, _images(geometry), *mask, precision == "tf32")
    if out is not None and out is not dn:
        activate.backward(dn, None, None, out, geometry, activate.IDENTITY, source)
    return sums


def wgrad(
    features: Tensor,
    gradient: Tensor,
    correction: Correction | None,
    weight: Tensor,
    z: Tensor,
    norm: Norm,
    geometry: Geometry,
    precision: str,
    mask: Mask,
) -> Tensor:
    """dweight [g, b, 3, 3] float32."""
    tensors = *_slices(features, gradient, correction), weight, z, _vectors(norm)
    dweight: Tensor = torch.ops.csp_kernels.conv3x3_wgrad(*tensors, _images(geometry), *mask, precision == "tf32")
    return dweight


def takes_layer(features: Tensor, weight: Tensor, out: Tensor, geometry: Geometry) -> bool:
    """Whether one kernel computes a whole layer with frozen norms and is estimated to be faster than two. features
    [P, K]: those that enter; weight [g, b, 3, 3]; out [P, g]."""
    if running() == "triton" or not _runs_on(features.device):
        return False
    return bool(torch.ops.csp_kernels.dense_layer_wins(features, weight, out, _images(geometry)))


def layer(
    features: Tensor, norm1: Norm, weight1: Tensor, norm2: Norm, weight2: Tensor, out: Tensor, geometry: Geometry
) -> None:
    """out [P, g] = conv3x3(relu(norm2(z)), weight2), z = relu(norm1(features)) weight1^T, which is never stored."""
    vectors = _vectors(norm1), weight1, _vectors(norm2), weight2
    torch.ops.csp_kernels.dense_layer(features, *vectors, out, _images(geometry))


def _runs_on(device: torch.device) -> bool:
    """Of a device that is no GPU only the emulation has kernels, in tests."""
    if device.type == "cuda" and why_not_cuda(device.index):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key("csp_kernels::conv3x3_forward", device.type.upper())


def _images(geometry: Geometry) -> list[int]:
    return [geometry.n, geometry.h, geometry.w]


def _vectors(affine: Norm | Correction) -> list[Tensor]:
    if isinstance(affine, Norm):
        return [affine.mean, affine.scale, affine.shift]
    return [affine.mean, affine.slope, affine.offset]


def _slices(features: Tensor, gradient: Tensor, correction: Correction | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Features, gradient and correction as the kernels take them: without a correction nobody has written the features
    that they read, and the gradient stands for these, times 0."""
    gradient = _aligned(gradient)
    if correction is not None:
        return features, gradient, _vectors(correction)
    nothing = gradient.new_zeros((3, gradient.shape[1]), dtype=torch.float32)
    return gradient, gradient, list(nothing.unbind())


def _aligned(gradient: Tensor) -> Tensor:
    """The caller's gradient may be a slice at any offset: the features, which decide who runs, are not."""
    return gradient if _fits(gradient) else gradient.clone(memory_format=torch.contiguous_format)


def _fits(x: Tensor) -> bool:
    """Whether the kernels can read or write it."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % (16 // x.element_size()) == 0


def _beside(z: Tensor) -> Tensor:
    """Memory for the gradient of z, which the kernels read."""
    return z.new_empty((z.shape[0], padded(z.shape[1])))[:, : z.shape[1]]
