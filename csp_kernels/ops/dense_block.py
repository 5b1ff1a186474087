"""The concat-free dense block: checks, dispatch, fake kernels and autograd of torch.ops.csp_kernels.dense_block*."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csp_kernels import native
from csp_kernels.backends import resolve
from csp_kernels.reference import dense_block as reference_dense_block

NAMES = ("norm1.weight", "norm1.bias", "conv1.weight", "norm2.weight", "norm2.bias", "conv2.weight")  # of one layer
RECOMPUTE = ("none", "bottleneck")
_ACCUMULATE = {  # storage dtype -> dtype of parameters, statistics and sums
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


class _Sizes(NamedTuple):
    layers: int  # L
    channels: int  # c0
    growth: int  # g
    width: int  # b, the bottleneck

    @property
    def total(self) -> int:  # C
        return self.channels + self.layers * self.growth

    @property
    def columns(self) -> int:  # of stats
        return self.total + self.layers * self.width


def dense_block(
    x: Tensor,
    params: Sequence[Tensor | None],
    running: Sequence[Tensor] = (),
    *,
    frozen: Sequence[bool] | None = None,
    eps: float | Sequence[float] = 1e-5,
    drop_rate: float = 0.0,
    recompute: str = "none",
) -> tuple[Tensor, Tensor]:
    """L layers of batch norm, ReLU, 1x1, batch norm, ReLU, 3x3 over a growing feature buffer; nothing is concatenated.

    DenseNet-BC (arXiv 1608.06993, section 3) with the statistics of each channel computed once (arXiv 1707.06990).

    Shapes: K_l = c0 + l * g prefix channels, b bottleneck and g growth channels, C = c0 + L * g.
      x        [N, c0, H, W], any strides; float32, bfloat16, float16 or float64. Under autocast cast to its dtype.
      params   6 a layer: norm1.weight [K_l], norm1.bias [K_l], conv1.weight [b, K_l, 1, 1], norm2.weight [b],
               norm2.bias [b], conv2.weight [g, b, 3, 3]; None for a norm's weight (ones) or bias (zeros).
               dtype of x; for a 16-bit x also float32.
      running  mean and variance of each frozen norm, in the order norm1, norm2 of layer 0, 1, ...; dtype as params.
      frozen   2L flags in that order: True normalises with `running`, False with batch statistics (default: all False).
      eps      one number or 2L.
      drop_rate  dropout on each layer's new features, 0 <= drop_rate < 1; 0 in eval mode.
      recompute  "none" keeps the bottleneck for backward, "bottleneck" computes it again there.
    Returns y [N, C, H, W] in the dtype and memory format of x (its first c0 channels are x), and stats [2, C + L * b]
    float64, no gradient: batch mean and biased variance of the features, then of each layer's bottleneck; unspecified
    where no norm needs them. Running statistics are the caller's to update: `csp.DenseBlock` does.
    Once differentiable on the native backend (RuntimeError beyond), any number of times on the reference.
    Raises TypeError or ValueError for bad arguments before any work, RuntimeError if the chosen backend cannot run.
    """
    x = _autocast(_checked_input(x))
    sizes = _checked_params(x, params)
    frozen = _flags(frozen, sizes)
    eps = _epsilons(eps, frozen)
    _check_running(x, running, frozen, sizes)
    _check_options(x, frozen, drop_rate, recompute)
    backend = resolve(x.device.type)
    channels_last = _is_channels_last(x)
    if backend == "reference" or x.numel() == 0:
        y, stats = reference_dense_block(x, params, running, frozen=frozen, eps=eps, drop_rate=drop_rate)
    else:
        y, stats = _native(x, params, running, sizes, frozen, eps, drop_rate, recompute)
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format), stats


def _native(
    x: Tensor,
    params: Sequence[Tensor | None],
    running: Sequence[Tensor],
    sizes: _Sizes,
    frozen: list[bool],
    eps: list[float],
    drop_rate: float,
    recompute: str,
) -> tuple[Tensor, Tensor]:
    ops = torch.ops.csp_kernels
    dtype = _ACCUMULATE[x.dtype]
    full = [_filled(i, sizes, dtype) if p is None else _as(p, dtype) for i, p in enumerate(params)]
    fixed = [_as(r, dtype) for r in running]
    x = x.contiguous(memory_format=torch.channels_last)
    winograd = _winograd(x.dtype)
    gradients = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in full))
    if all(frozen) and not gradients and drop_rate == 0:
        y = ops.dense_block_inference.default(x, full, fixed, eps, winograd)
        return y, x.new_zeros((2, sizes.columns), dtype=torch.float64)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64) if drop_rate > 0 else None
    keep = gradients and recompute == "none"
    rest = fixed, [int(f) for f in frozen], eps, seed, float(drop_rate), keep, winograd
    if gradients and not torch.compiler.is_compiling():
        y, _, stats = _DenseBlock.apply(x, *rest, *full)
    else:
        y, _, stats = ops.dense_block.default(x, full, *rest)
    return y, stats


def _winograd(dtype: torch.dtype) -> int:
    """Winograd tile: 2 stays within twice the direct form's error, 4 is for where precision was given up for speed."""
    if dtype == torch.float32:
        return 2 if _float32_precision() == "highest" else 4
    return 2 if dtype == torch.float64 else 4


@torch.compiler.assume_constant_result  # safe: Dynamo guards on this setting
def _float32_precision() -> str:
    return torch.get_float32_matmul_precision()


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in dtype, contiguous or channels_last."""
    if t.dtype is not dtype:
        t = t.to(dtype)
    if t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)):
        return t
    return t.contiguous()


def _filled(index: int, sizes: _Sizes, dtype: torch.dtype) -> Tensor:
    """Weight (ones) or bias (zeros) of a norm without affine parameters."""
    layer, slot = divmod(index, 6)
    channels = sizes.width if slot > 2 else sizes.channels + layer * sizes.growth
    return (torch.ones if slot % 3 == 0 else torch.zeros)(channels, dtype=dtype)


def _is_channels_last(x: Tensor) -> bool:
    """True also for a channel slice of a channels_last tensor; False for a contiguous one with a single channel."""
    return x.stride(1) == 1 and x.stride(3) >= x.shape[1]


def _autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):  # autocast leaves float64 alone
        return x
    if torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


# --- checks ---


def _checked_input(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a Tensor [N, channels, H, W]")
    if x.dim() != 4:
        raise ValueError(f"x: got {x.dim()} dimensions {list(x.shape)}, expected 4 [N, channels, H, W]")
    if x.dtype not in _ACCUMULATE:
        raise TypeError(f"x: got {x.dtype}, expected float32, bfloat16, float16 or float64; convert with x.float()")
    if 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {list(x.shape)}, expected at least one channel, row and column")
    return x


def _checked_params(x: Tensor, params: Sequence[Tensor | None]) -> _Sizes:
    if not params or len(params) % 6:
        raise ValueError(f"params: got {len(params)}, expected 6 a layer, at least one layer: {', '.join(NAMES)}")
    last, where = params[5], "params: layer 0 conv2.weight"
    if not isinstance(last, Tensor):
        raise TypeError(f"{where}: got {type(last).__name__}, expected a Tensor [growth, width, 3, 3]")
    if last.dim() != 4 or 0 in last.shape:
        raise ValueError(f"{where}: got shape {list(last.shape)}, expected [growth, width, 3, 3]")
    g, b = last.shape[:2]
    sizes = _Sizes(len(params) // 6, x.shape[1], g, b)
    allowed = _dtypes(x)
    for layer in range(sizes.layers):
        k = sizes.channels + layer * g
        shapes = ((k,), (k,), (b, k, 1, 1), (b,), (b,), (g, b, 3, 3))
        for slot, shape in enumerate(shapes):
            p = params[6 * layer + slot]
            if p is None and slot % 3 != 2:
                continue
            if not isinstance(p, Tensor) or p.shape != shape or p.dtype not in allowed or p.device != x.device:
                _refuse(f"params: layer {layer} {NAMES[slot]}", p, shape, x)
    return sizes


def _dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    return (x.dtype, torch.float32) if x.element_size() == 2 else (x.dtype,)


def _refuse(name: str, t: object, shape: tuple[int, ...], x: Tensor) -> None:
    """Raise the error that says what is wrong with t."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, expected a Tensor {list(shape)}")
    if name.endswith(("layer 0 norm1.weight", "layer 0 norm1.bias")) and t.dim() == 1 and t.shape != shape:
        raise ValueError(f"x: got {x.shape[1]} channels {list(x.shape)}, expected {t.shape[0]}, the size of {name}")
    if t.shape != shape:
        raise ValueError(f"{name}: got shape {list(t.shape)}, expected {list(shape)} for x with {x.shape[1]} channels")
    if t.device != x.device:
        raise ValueError(f"{name}: got a tensor on {t.device}, expected {x.device}, where x is; move one with .to()")
    names = " or ".join(str(d) for d in _dtypes(x))
    raise TypeError(f"{name}: got {t.dtype}, expected {names} for x of {x.dtype}; convert one with .to()")


def _flags(frozen: Sequence[bool] | None, sizes: _Sizes) -> list[bool]:
    norms = 2 * sizes.layers
    if frozen is None:
        return [False] * norms
    if len(frozen) != norms:
        raise ValueError(f"frozen: got {len(frozen)} flags, expected {norms}, two a layer")
    return list(frozen)


def _epsilons(eps: float | Sequence[float], frozen: list[bool]) -> list[float]:
    norms = len(frozen)
    values = [float(eps)] * norms if isinstance(eps, (int, float)) else [float(e) for e in eps]
    if len(values) != norms:
        raise ValueError(f"eps: got {len(values)} numbers, expected one or {norms}, two a layer")
    if min(values) <= 0 and any(e < 0 or (e == 0 and not f) for e, f in zip(values, frozen, strict=True)):
        raise ValueError(f"eps: got {min(values)}, expected more than 0 (or 0 for a frozen norm)")
    return values


def _check_running(x: Tensor, running: Sequence[Tensor], frozen: list[bool], sizes: _Sizes) -> None:
    count = 2 * sum(frozen)
    if len(running) != count:
        raise ValueError(
            f"running: got {len(running)} tensors, expected {count}, mean and variance of each frozen norm"
        )
    allowed = _dtypes(x)
    norms = [i for i, flag in enumerate(frozen) if flag]
    for position, t in enumerate(running):
        layer, second = divmod(norms[position // 2], 2)
        shape = (sizes.width if second else sizes.channels + layer * sizes.growth,)
        if not isinstance(t, Tensor) or t.shape != shape or t.dtype not in allowed or t.device != x.device:
            _refuse(f"running: layer {layer} norm{second + 1} {'var' if position % 2 else 'mean'}", t, shape, x)


def _check_options(x: Tensor, frozen: list[bool], drop_rate: float, recompute: str) -> None:
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate: got {drop_rate}, expected 0 <= drop_rate < 1")
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute: got {recompute!r}, expected one of {', '.join(RECOMPUTE)}")
    if x.numel() == x.shape[1] and not all(frozen):
        raise ValueError(
            f"x: got one value per channel {list(x.shape)}, expected more to compute batch statistics; "
            "use a larger batch or image, or eval()"
        )


# --- fake kernels: shapes only ---


def _features(x: Tensor, channels: int) -> Tensor:
    """Uninitialised [N, channels, H, W], channels_last."""
    n, _, h, w = x.shape
    return torch.empty((n, channels, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _sizes(x: Tensor, params: Sequence[Tensor]) -> _Sizes:
    return _Sizes(len(params) // 6, x.shape[1], params[5].shape[0], params[5].shape[1])


def _fake_forward(
    x: Tensor,
    params: list[Tensor],
    running: list[Tensor],
    frozen: list[int],
    eps: list[float],
    seed: Tensor | None,
    drop_rate: float,
    keep_bottleneck: bool,
    winograd: int,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _sizes(x, params)
    pixels, padded = x.shape[0] * x.shape[2] * x.shape[3], -(-sizes.width // 16) * 16
    z = x.new_empty((sizes.layers, pixels, padded) if keep_bottleneck else (0,))
    return _features(x, sizes.total), z, x.new_empty((2, sizes.columns), dtype=torch.float64)


def _fake_backward(
    grad_y: Tensor,
    y: Tensor,
    z: Tensor,
    stats: Tensor,
    params: list[Tensor],
    running: list[Tensor],
    frozen: list[int],
    eps: list[float],
    seed: Tensor | None,
    drop_rate: float,
    in_channels: int,
    winograd: int,
) -> list[Tensor]:
    return [_features(y, in_channels), *(torch.empty_like(p) for p in params)]


def _fake_inference(x: Tensor, params: list[Tensor], running: list[Tensor], eps: list[float], winograd: int) -> Tensor:
    return _features(x, _sizes(x, params).total)


# --- autograd ---


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, params, running, ctx.frozen, ctx.eps, seed, ctx.drop_rate, _, ctx.winograd = inputs
    y, z, stats = output
    ctx.channels, ctx.count, ctx.fixed = x.shape[1], len(params), len(running)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(z, stats)
    ctx.save_for_backward(y, z, stats, seed, *params, *running)


def _gradients(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    """Gradients in the order of the schema: x, params, then none for the rest."""
    none = [None] * ctx.fixed
    if grad_y is None:
        return None, [None] * ctx.count, none, None, None, None, None, None, None
    y, z, stats, seed, *tensors = ctx.saved_tensors
    dx, *dparams = torch.ops.csp_kernels.dense_block_backward.default(
        grad_y.contiguous(memory_format=torch.channels_last),
        y,
        z,
        stats,
        tensors[: ctx.count],
        tensors[ctx.count :],
        ctx.frozen,
        ctx.eps,
        seed,
        ctx.drop_rate,
        ctx.channels,
        ctx.winograd,
    )
    return dx, dparams, none, None, None, None, None, None, None


class _DenseBlock(torch.autograd.Function):
    """What register_autograd makes of the same formula, with its arguments flat: a third of the overhead of a call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs = x, list(rest[7:]), *rest[:7]
        with torch._C._AutoDispatchBelowAutograd():  # past the other door, which would only pass the call on
            output: tuple[Tensor, Tensor, Tensor] = torch.ops.csp_kernels.dense_block.default(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: the other door knows that there is no double backward
            dx, dparams, *_ = _gradients(ctx, *grads)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                dx, dparams, *_ = _gradients(ctx, *grads)
        return dx, *[None] * 7, *dparams


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "csp_kernels.dense_block is differentiable once; for double backward choose csp.use_backend('reference')"
    )


def _register() -> None:
    library = torch.library
    library.register_fake("csp_kernels::dense_block", _fake_forward)
    library.register_fake("csp_kernels::dense_block_backward", _fake_backward)
    library.register_fake("csp_kernels::dense_block_inference", _fake_inference)
    library.register_autograd("csp_kernels::dense_block", _gradients, setup_context=_save)
    library.register_autograd("csp_kernels::dense_block_backward", _no_double_backward)


if native.available():
    _register()
