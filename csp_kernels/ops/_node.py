"""What the compiled operators share: tensors in their format, fake outputs, and one way into autograd and beyond."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csp_kernels import native
from csp_kernels._tracing import constant_when_traced
from csp_kernels.backends import running_as, selected, why_not_triton
from csp_kernels.ops._checks import check_storage, converted, dense
from csp_kernels.ops._transforms import batched, transformed


class Saved(NamedTuple):
    """What backward needs."""

    images: Sequence[Tensor | None]  # in the format of `in_place`
    kept: Sequence[Any]  # tensors, None and lists of tensors, contiguous (weights: or channels_last)
    rest: Sequence[Any]  # no tensors


Twin = tuple[Sequence[Tensor | None], Callable[..., Sequence[Tensor]]]


class Formula(NamedTuple):
    """How an operator is differentiated; its first output, a tensor or a list of them, is its only differentiable one.

    The arguments that have gradients, lists flat, are the schema's first ones.
    """

    save: Callable[[tuple[Any, ...], Any], Saved]  # of arguments and outputs
    gradients: Callable[[Saved, Any], Sequence[Tensor | None]]  # of those arguments, from the first output's
    twin: Callable[[Saved], Twin]  # those arguments, and the reference as a function of them


def in_place(x: Tensor) -> Tensor:
    """x if its channels lie side by side and its pixels at one distance (channels_last, or a channel slice of that)."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    n, c, h, w = x.shape
    pitch = x.stride(3) if w > 1 else x.stride(2) if h > 1 else x.stride(0) if n > 1 else c
    wanted = (h * w * pitch, 1, w * pitch, pitch)
    fits = pitch >= c and all(
        size == 1 or got == want for size, got, want in zip(x.shape, x.stride(), wanted, strict=True)
    )
    return x if fits else packed(x)


def packed(x: Tensor) -> Tensor:
    """x channels_last, without gaps."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x  # the operator checks its storage
    check_storage(x)
    return x.contiguous(memory_format=torch.channels_last)


def padded(channels: int) -> int:
    """Columns that the kernels keep for these channels."""
    return -(-channels // 16) * 16


def wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def fixed(running: Sequence[Tensor], dtype: torch.dtype, gradients: bool) -> list[Tensor]:
    """Running statistics in dtype, contiguous; for backward copies, since later steps of training change them."""
    return [_copied(r) if gradients and r.dtype is dtype else converted(r, dtype) for r in running]


def _copied(t: Tensor) -> Tensor:
    check_storage(t)
    return dense(t.clone())


TRITON_ALONE = 8  # in an operator's argument `winograd`, on a GPU: this call is Triton's, CUDA C++ takes no part of it


def winograd(dtype: torch.dtype, backend: str = "native") -> int:
    """Winograd tile: 2 stays within twice the direct form's error, 4 is for where precision was given up for speed.

    backend "triton": and TRITON_ALONE. So the choice travels with the call, into compiled graphs and into backward.
    """
    alone = TRITON_ALONE if backend == "triton" else 0
    if dtype == torch.float32:
        return alone + (2 if _float32_precision() == "highest" else 4)
    return alone + (2 if dtype == torch.float64 else 4)


@constant_when_traced  # safe: Dynamo guards on this setting
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
        ctx: Any, op: Any, formula: Formula, lengths: list[int], outputs: list[int], *flat: Any
    ) -> tuple[Any, ...]:
        arguments = _folded(flat, lengths)
        with torch._C._AutoDispatchBelowAutograd():  # past the other door, which would only pass the call on
            output = op(*arguments)
        _save(ctx, formula, arguments, output, lengths)
        outputs += _lengths(output)
        ctx.outputs, ctx.backend, ctx.watched = outputs, selected(), []
        return _flat(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = _saved(ctx)  # outside the guard: a checkpoint computes it now, with autograd
        for watched in ctx.watched:
            watched.check()
        grad = _folded(grads, ctx.outputs)[0]
        with running_as(ctx.backend):
            found = _beyond_kernels(ctx, saved, grad)
            if found is None:
                with torch._C._AutoDispatchBelowAutograd():
                    found = ctx.formula.gradients(saved, grad)
        return *[None] * 4, *found, *[None] * (ctx.arguments - len(found))


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


def _save(ctx: Any, formula: Formula, arguments: tuple[Any, ...], output: Any, lengths: list[int]) -> None:
    images, kept, ctx.rest = formula.save(arguments, output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*_flat(output[1:]))
    ctx.save_for_backward(*images, *_flat(kept))
    ctx.formula, ctx.images, ctx.kept = formula, len(images), _lengths(kept)
    ctx.lengths, ctx.arguments = lengths, sum(map(abs, lengths))


def _saved(ctx: Any) -> Saved:
    """As it was saved: hooks (disk, compression, pinned memory) may give back other strides."""
    tensors = ctx.saved_tensors
    images = [None if t is None else in_place(t) for t in tensors[: ctx.images]]
    kept = [t if t is None or t.is_contiguous() else dense(t) for t in tensors[ctx.images :]]
    return Saved(images, _folded(kept, ctx.kept), ctx.rest)


def _beyond_kernels(ctx: Any, saved: Saved, grad: Any) -> Sequence[Tensor | None] | None:
    """Gradients that the kernels cannot compute: none, and through the reference those to be differentiated again
    (create_graph), batched (is_grads_batched) or with tangents. None where the kernels can."""
    given = grad if isinstance(grad, list) else [grad]
    if all(g is None for g in given):
        return []
    differentiable = torch.is_grad_enabled()
    if not differentiable and not transformed(given) and not batched(given):
        return None
    device = next(g for g in given if g is not None).device.type
    with torch.enable_grad(), torch.autocast(device, enabled=False):  # forward has settled the dtypes
        arguments, reference = ctx.formula.twin(saved)
        # new tensors, so that an argument computed from another one counts as a variable of its own
        leaves = [None if t is None else t.view_as(t) for t in arguments]
        pairs = [(y, g) for y, g in zip(reference(*leaves), given, strict=True) if g is not None]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        outputs, gradients = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=differentiable, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in leaves]


class _Watched(NamedTuple):
    """A tensor whose values were copied for backward, or from what backward needs: changing it in place is an error
    as it would be without the copy, so that no program works in one memory format alone."""

    name: str
    alias: Tensor  # without its memory: autograd's version counter is all that they share
    version: int

    def check(self) -> None:
        if self.alias._version != self.version:
            raise RuntimeError(
                f"{self.name} has been modified by an inplace operation, but backward needs it as it was: "
                f"it is at version {self.alias._version}, expected version {self.version}; use the operation that "
                "returns a new tensor (F.relu(y), y + 1), or clone() first"
            )


def watch(result: Tensor, name: str, original: Tensor, used: Tensor) -> None:
    """Let the backward of `result` fail if `original` is changed meanwhile, though the operator works on a copy."""
    if original is used or type(original) is not Tensor or torch.compiler.is_compiling():
        return
    watched = getattr(result.grad_fn, "watched", None)
    if watched is not None:
        alias = original.detach()
        alias.data = original.new_empty(0)
        watched.append(_Watched(name, alias, alias._version))


def call(op: Any, formula: Formula, arguments: tuple[Any, ...]) -> Any:
    """op(*arguments) with the gradient formula that is registered for it."""
    if torch.compiler.is_compiling():
        return op(*arguments)
    lengths = _lengths(arguments)
    flat = [item for v, n in zip(arguments, lengths, strict=True) for item in (v if n >= 0 else [v])]
    outputs: list[int] = []
    result = _Node.apply(op, formula, lengths, outputs, *flat)
    return _folded(result, outputs)


def without_gradients(op: Any, arguments: tuple[Any, ...]) -> Any:
    """op(*arguments), past what is registered for autograd: Python that would pass the call on, in a third of a small
    call's time."""
    if torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def register(
    name: str, fakes: dict[str, Callable[..., Any]], formula: Formula, on_cpu: dict[str, Callable[..., Any]]
) -> None:
    """Fake kernels ("" and suffixes of the name), Triton kernels and autograd of torch.ops.csp_kernels.<name>; on_cpu:
    fake kernels of those without gradients that a CPU alone has."""
    if not native.available():
        return

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"csp_kernels.{name}_backward is not differentiable; for second derivatives call csp.ops outside of "
            "torch.compile, or choose csp.use_backend('reference')"
        )

    def refuse_inference(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"csp_kernels.{name}_inference is not differentiable; call csp_kernels.{name}, or csp.ops")

    for suffix, fake in {**fakes, **on_cpu}.items():
        torch.library.register_fake(f"csp_kernels::{name}{suffix}", _on_one_device(name + suffix, fake))
    _register_triton(name, fakes)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # torch passes them by name
        _save(ctx, formula, inputs, output, _lengths(inputs))

    def backward(ctx: Any, grad: Any, *_: Any) -> tuple[Any, ...]:
        saved = _saved(ctx)
        found = _beyond_kernels(ctx, saved, grad)
        found = formula.gradients(saved, grad) if found is None else found
        return _folded([*found, *[None] * (ctx.arguments - len(found))], ctx.lengths)

    torch.library.register_autograd(f"csp_kernels::{name}", backward, setup_context=setup_context)
    torch.library.register_autograd(f"csp_kernels::{name}_backward", refuse)
    for suffix in on_cpu:
        torch.library.register_autograd(f"csp_kernels::{name}{suffix}", refuse_inference)


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
