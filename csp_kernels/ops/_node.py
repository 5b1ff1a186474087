"""What the compiled operators share: tensors in their format, fake outputs, and one way into autograd."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from csp_kernels import native
from csp_kernels.backends import running_as, selected, why_not_triton
from csp_kernels.ops._checks import check_storage

Save = Callable[[Any, tuple[Any, ...], Any], None]  # ctx, arguments, outputs
Gradients = Callable[..., tuple[Any, ...]]  # ctx, gradients of the outputs -> gradients of the arguments


def in_place(x: Tensor) -> Tensor:
    """x if its channels lie side by side and its pixels at one distance (channels_last, or a channel slice of that)."""
    n, c, h, w = x.shape
    pitch = x.stride(3) if w > 1 else x.stride(2) if h > 1 else x.stride(0) if n > 1 else c
    wanted = (h * w * pitch, 1, w * pitch, pitch)
    fits = pitch >= c and all(
        size == 1 or got == want for size, got, want in zip(x.shape, x.stride(), wanted, strict=True)
    )
    return x if fits else packed(x)


def packed(x: Tensor) -> Tensor:
    check_storage(x)
    return x.contiguous(memory_format=torch.channels_last)


def padded(channels: int) -> int:
    """Columns that the kernels keep for these channels."""
    return -(-channels // 16) * 16


def wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def winograd(dtype: torch.dtype) -> int:
    """Winograd tile: 2 stays within twice the direct form's error, 4 is for where precision was given up for speed."""
    if dtype == torch.float32:
        return 2 if _float32_precision() == "highest" else 4
    return 2 if dtype == torch.float64 else 4


@torch.compiler.assume_constant_result  # safe: Dynamo guards on this setting
def _float32_precision() -> str:
    return torch.get_float32_matmul_precision()


def fake_image(like: Tensor, channels: int, height: int | None = None, width: int | None = None) -> Tensor:
    """Uninitialised [N, channels, H, W], channels_last; of the size of `like` unless given."""
    n, _, h, w = like.shape
    shape = (n, channels, h if height is None else height, w if width is None else width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def fake_statistics(like: Tensor, columns: int) -> Tensor:
    return like.new_empty((2, columns), dtype=torch.float64)


class _Node(torch.autograd.Function):
    """What register_autograd makes of the same formula, with its arguments flat: a third of the overhead of a call."""

    @staticmethod
    def forward(
        ctx: Any, op: Any, save: Save, gradients: Gradients, lengths: list[int], outputs: list[int], *flat: Any
    ) -> tuple[Any, ...]:
        arguments = _folded(flat, lengths)
        with torch._C._AutoDispatchBelowAutograd():  # past the other door, which would only pass the call on
            output = op(*arguments)
        save(ctx, arguments, output)
        outputs += _lengths(output)
        ctx.gradients, ctx.outputs, ctx.backend = gradients, outputs, selected()
        return _flat(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph: the other door knows that there is no double backward
            return *[None] * 5, *_flat(ctx.gradients(ctx, *_folded(grads, ctx.outputs)))
        with torch._C._AutoDispatchBelowAutograd(), running_as(ctx.backend):
            return *[None] * 5, *_flat(ctx.gradients(ctx, *_folded(grads, ctx.outputs)))


def _lengths(values: Sequence[Any]) -> list[int]:
    """Of the lists among them; -1: no list of tensors."""
    return [len(v) if isinstance(v, list) and (not v or isinstance(v[0], Tensor)) else -1 for v in values]


def _flat(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(item for v in values for item in (v if isinstance(v, list) else [v]))


def _folded(flat: Sequence[Any], lengths: list[int]) -> tuple[Any, ...]:
    values: list[Any] = []
    at = 0
    for n in lengths:
        values.append(flat[at] if n < 0 else list(flat[at : at + n]))
        at += abs(n)
    return tuple(values)


def save_kept(ctx: Any, kept: Sequence[Any], x: Tensor, params: list[Tensor], running: list[Tensor]) -> None:
    """What the operator returned beside y, without gradients, and its tensors."""
    flat = _flat(kept)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*flat)
    ctx.kept, ctx.sizes = _lengths(kept), (len(flat), len(params))
    ctx.save_for_backward(x, *flat, *params, *running)


def saved(ctx: Any) -> tuple[Tensor, tuple[Any, ...], list[Tensor], list[Tensor]]:
    """x, kept, params and running of save_kept."""
    x, *tensors = ctx.saved_tensors
    kept, params = ctx.sizes
    return x, _folded(tensors[:kept], ctx.kept), tensors[kept : kept + params], tensors[kept + params :]


def call(op: Any, save: Save, gradients: Gradients, arguments: tuple[Any, ...]) -> Any:
    """op(*arguments) with the gradient formula that is registered for it."""
    if torch.compiler.is_compiling():
        return op(*arguments)
    lengths = _lengths(arguments)
    flat = [item for v, n in zip(arguments, lengths, strict=True) for item in (v if n >= 0 else [v])]
    outputs: list[int] = []
    result = _Node.apply(op, save, gradients, lengths, outputs, *flat)
    return _folded(result, outputs)


def register(name: str, fakes: dict[str, Callable[..., Any]], save: Save, gradients: Gradients) -> None:
    """Fake kernels ("" and suffixes of the name), Triton kernels and autograd of torch.ops.csp_kernels.<name>, once
    differentiable."""
    if not native.available():
        return

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"csp_kernels.{name} is differentiable once; for double backward choose csp.use_backend('reference')"
        )

    for suffix, fake in fakes.items():
        torch.library.register_fake(f"csp_kernels::{name}{suffix}", _on_one_device(name + suffix, fake))
    _register_triton(name, fakes)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # torch passes them by name
        save(ctx, inputs, output)

    torch.library.register_autograd(f"csp_kernels::{name}", gradients, setup_context=setup_context)
    torch.library.register_autograd(f"csp_kernels::{name}_backward", refuse)


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake kernel, which refuses real tensors beside meta tensors: it would return memory that nobody wrote."""

    def run(*arguments: Any) -> Any:
        first: Tensor | None = None
        schema = getattr(torch.ops.csp_kernels, name).default._schema
        for argument, value in zip(schema.arguments, arguments, strict=True):
            for t in value if isinstance(value, (list, tuple)) else [value]:
                if not isinstance(t, Tensor):
                    continue
                first = t if first is None else first
                if t.device != first.device:
                    raise RuntimeError(
                        f"{name}: {argument.name}: got a tensor on {t.device} beside one on {first.device}, "
                        "expected all on one device; move them with .to()"
                    )
        return fake(*arguments)

    return run


def _register_triton(name: str, suffixes: Iterable[str]) -> None:
    """torch.ops.csp_kernels.<name><suffix> -> the function of csp_kernels.kernels.<name> that runs it on a GPU.

    Triton is imported by the first call.
    """
    if why_not_triton():
        return

    def implementation(function: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            module = importlib.import_module(f"csp_kernels.kernels.{name}")
            with torch.cuda.device_of(next(a for a in _flat(arguments) if isinstance(a, Tensor))):
                return getattr(module, function)(*arguments)

        return run

    for suffix in suffixes:
        function = suffix.removeprefix("_") or "forward"
        torch.library.impl(f"csp_kernels::{name}{suffix}", "CUDA", implementation(function))
