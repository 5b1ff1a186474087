"""What a network costs: parameters, FLOPs, convolutional input/output, DRAM traffic, saved activations.

Operations are counted on the meta device over the plain PyTorch twins of the fused layers: nothing is computed, and a
fused layer shows its convolutions. DRAM traffic is counted from sizes, for plain PyTorch operation by operation, for a
fused layer from its program; it is not a measurement. Saved bytes are measured.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from csp_kernels import layers, reference
from csp_kernels.backends import use_backend
from csp_kernels.programs import Call, calls, graph_of, images_of, program_of
from csp_kernels.stage.cost import costs
from csp_kernels.stage.program import Wanted
from csp_kernels.vocabulary import ACTIVATIONS

_ACTIVATIONS = (*ACTIVATIONS, "hardtanh")  # PyTorch's names: relu6 is a hardtanh, gelu_tanh a gelu


@dataclass
class Row:
    """One module: what its own operations cost, without its children's. Bytes and FLOPs are of the whole batch.

    dram_bytes_fused of a fused layer is that of its whole program, its children have none.
    """

    name: str
    kind: str
    output: tuple[int, ...] = ()  # shape of its last result
    params: int = 0
    weights: int = 0  # of convolutions and linear layers, without biases: the count of DarkNet's tables
    flops: int = 0  # 2 per multiply-add of convolutions and linear layers
    pool_flops: int = 0  # elements of all pooling windows: DarkNet's tables add them to flops
    shortcut_flops: int = 0  # additions of maps
    cio: int = 0
    max_layer_flops: int = 0
    dram_bytes_naive: int = 0
    dram_bytes_fused: int = 0


_SUMS = [f.name for f in fields(Row) if f.name not in ("name", "kind", "output", "max_layer_flops")]


@dataclass
class Profile:
    """Rows per module in order of execution, and their totals; prints as a table.

    total: params, weights, flops, pool_flops, shortcut_flops, cio, dram_bytes_naive and dram_bytes_fused are sums over
    the rows; max_layer_flops is the largest convolution, saved_bytes what autograd keeps for backward.
    """

    rows: list[Row]
    total: dict[str, int]

    def grouped(self, depth: int) -> list[Row]:
        """The rows added up by the first `depth` parts of their names."""
        groups: dict[str, Row] = {}
        for row in self.rows:
            name = ".".join(row.name.split(".")[:depth])
            group = groups.setdefault(name, Row(name, row.kind if row.name == name else ""))
            group.output = row.output or group.output
            for key in _SUMS:
                setattr(group, key, getattr(group, key) + getattr(row, key))
            group.max_layer_flops = max(group.max_layer_flops, row.max_layer_flops)
        return list(groups.values())

    def table(self, depth: int = 2) -> str:
        """Text table of grouped(depth), the total below."""
        rows = [row for row in self.grouped(depth) if row.params or row.flops or row.dram_bytes_naive]
        lines = [["module", "output", "params", "MFLOP", "CIO (k)", "naive MB", "fused MB"]]
        lines += [[row.name or "(network)", "x".join(map(str, row.output[1:])), *_numbers(vars(row))] for row in rows]
        lines.append(["total", "", *_numbers(self.total)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join([f"{r[0]:<{widths[0]}}", *map(str.rjust, r[1:], widths[1:])]) for r in lines]
        largest, saved = self.total["max_layer_flops"] / 1e6, self.total["saved_bytes"] / 1e6
        text.insert(-1, "-" * len(text[0]))
        return "\n".join([*text, f"largest layer {largest:,.1f} MFLOP, saved for backward {saved:,.1f} MB"])

    def __str__(self) -> str:
        return self.table()


def _numbers(row: dict[str, Any]) -> list[str]:
    scaled = (("flops", 1e6), ("cio", 1e3), ("dram_bytes_naive", 1e6), ("dram_bytes_fused", 1e6))
    return [f"{row['params']:,}", *(f"{row[key] / unit:,.1f}" for key, unit in scaled)]


def profile(model: nn.Module, shape: Sequence[int]) -> Profile:
    """What `model` costs for an input of this shape [N, C, H, W].

    flops: 2 per multiply-add of convolutions and linear layers. cio: see `cio`. max_layer_flops: the largest one.
    dram_bytes_naive: each operation of plain PyTorch reads its inputs and writes its output; in training mode
    forward and backward (batch norm reads its input twice, backward of each operation as autograd runs it), in eval
    mode forward alone. dram_bytes_fused: of a fused layer, on its own row, what the instructions of its program read
    and write (`csp.explain` lists them), in training mode with a backward pass that computes every gradient: images
    alone, every read and write from memory; weights, which naive has, are not counted. The same as naive elsewhere, and
    in fused layers that run as the reference (hooks, other norms).
    saved_bytes: the distinct storages kept for backward of one forward pass of the model as it is, on its device and
    the chosen backend, without the input, parameters and buffers. Of a fused layer that are the kept buffers of its
    program, outputs that backward reads, and 16 bytes a channel of batch statistics (mean and variance in float64).
    The model, its statistics and the random state are left as they are. Raises ValueError for a shape of other
    than four sizes.
    """
    rows = _count(model, shape)
    total = {key: sum(getattr(row, key) for row in rows) for key in _SUMS}
    total["max_layer_flops"] = max((row.max_layer_flops for row in rows), default=0)
    total["saved_bytes"] = _saved(model, shape)
    return Profile(rows, total)


def cio(model: nn.Module, shape: Sequence[int]) -> int:
    """Convolutional input/output (HarDNet, arXiv 1909.00948): the elements that all convolutions read and write.

    Counted as the paper's table does (arXiv 1911.11929, section 3: ResNeXt-50 34.4 M, CSPResNeXt-50 32.6 M at
    1x3x256x256): convolutions, linear layers and pooling, input and output each; a split by one convolution with
    two outputs counts as the two convolutions it stands for.
    """
    return sum(row.cio for row in _count(model, shape))


def cio_dense(c: int, m: int, d: int) -> int:
    """CIO per pixel of a dense block of m single-convolution layers of growth d over c channels: cm + (m^2 + m)d/2."""
    return c * m + (m * m + m) * d // 2


def cio_partial(c: int, m: int, d: int, part_ratio: float = 0.5) -> int:
    """cio_dense where round(part_ratio * c) channels bypass the block (arXiv 1911.11929, section 3.1)."""
    return cio_dense(c - round(part_ratio * c), m, d)


def saved_bytes(forward: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd keeps after forward(), without those of `exclude`."""
    known = {t.untyped_storage()._cdata for t in exclude}
    kept: dict[int, torch.UntypedStorage] = {}  # held until counted: no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def _saved(model: nn.Module, shape: Sequence[int]) -> int:
    model = copy.deepcopy(model)  # statistics advance in the copy
    x = _input(model, shape)
    with torch.random.fork_rng(), torch.enable_grad():
        return saved_bytes(lambda: model(x), [x, *model.parameters(), *model.buffers()])


def _input(model: nn.Module, shape: Sequence[int]) -> Tensor:
    if len(shape) != 4:
        raise ValueError(f"shape: got {tuple(shape)}, expected (N, C, H, W)")
    for p in model.parameters():
        if p.is_floating_point():
            return torch.zeros(tuple(shape), dtype=p.dtype, device=p.device)
    return torch.zeros(tuple(shape))


def _count(model: nn.Module, shape: Sequence[int]) -> list[Row]:
    naive = copy.deepcopy(model).to("meta").eval()
    x = _input(naive, shape)
    found = calls(model, x)
    counter = _Counter(naive, model.training, _moved(found, model.training), _beside(found))
    with use_backend("reference"), torch.no_grad(), counter:
        naive(x)
    return counter.finish()


def _moved(found: Iterable[Call], training: bool) -> dict[str, int]:
    """Bytes that the programs of all calls of each fused layer read and write, by the layer's name."""
    moved: dict[str, int] = {}
    for name, layer, inputs in found:
        graph, images = graph_of(layer), images_of(layer, inputs)
        program = program_of(layer, graph, Wanted.all(graph) if training else None)
        batch, _, height, width = images[0].shape
        steps = chain(*costs(program, batch, height, width))
        numbers = sum(cost.read + cost.written for cost in steps)
        moved[name] = moved.get(name, 0) + numbers * images[0].element_size()
    return moved


def _beside(found: Iterable[Call]) -> set[str]:
    """Names of the children that fused layers call beside their programs."""
    return {f"{call.name}.{child}".lstrip(".") for call in found for child in getattr(call.layer, "called", ())}


def _to_twin(module: nn.Module) -> None:
    """Make a fused layer its plain twin in `reference`, which calls its children."""
    name = type(module).__name__
    twin = getattr(reference, name, None)
    if type(module) is getattr(layers, name, None) and twin is not None and isinstance(module, twin):
        module.__class__ = twin


class _Counter(TorchDispatchMode):
    """Charges every operation to the innermost module that runs. fused: bytes of the layers that run programs."""

    def __init__(self, model: nn.Module, training: bool, fused: dict[str, int], beside: set[str]) -> None:
        super().__init__()
        self.training, self.fused, self.beside, self.stack = training, fused, beside, [""]
        self.names = {module: name for name, module in model.named_modules()}
        self.rows: dict[str, Row] = {}
        never_called = {
            child for stage in model.modules() if isinstance(stage, layers.Stage) for child in stage.modules()
        }
        for module in self.names:
            _to_twin(module)
            if module not in never_called or isinstance(module, layers.Stage):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)
        self.modules = dict(model.named_modules())

    def _enter(self, module: nn.Module, _: Any) -> None:
        name = self.names[module]
        self.stack.append(name)
        if name in self.fused:
            self._row(name).dram_bytes_fused = self.fused[name]

    def _leave(self, module: nn.Module, _: Any, result: Any) -> None:
        self.stack.pop()
        if isinstance(result, Tensor):
            self._row(self.names[module]).output = tuple(result.shape)

    def _row(self, name: str) -> Row:
        return self.rows.setdefault(name, Row(name, type(self.modules[name]).__name__))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        out = result[0] if isinstance(result, (tuple, list)) and result else result
        if isinstance(out, Tensor) and out.is_floating_point() and not func.is_view:
            self._charge(func._schema.name.removeprefix("aten::").rstrip("_"), args, out)
        return result

    def _charge(self, op: str, args: tuple[Any, ...], out: Tensor) -> None:
        row = self._row(self.stack[-1])
        x = next((t for t in _flat(args) if t.dim() > 1), None)
        if x is None:  # numbers and vectors
            return
        if op in ("convolution", "addmm", "mm"):
            weight = args[1] if op == "convolution" else args[-1]
            x = args[1] if op == "addmm" else args[0]
            per_output = weight[0].numel() if op == "convolution" else weight.shape[0]
            transposed = op == "convolution" and args[6]
            flops = 2 * per_output * (x if transposed else out).numel()
            parts = self._parts(out)
            row.flops += flops
            row.max_layer_flops = max(row.max_layer_flops, flops * max(parts) // sum(parts))
            row.cio += len(parts) * x.numel() + out.numel()
        elif "pool" in op or (op == "mean" and x.dim() == 4):
            window = _window(args[1]) if op in ("max_pool2d_with_indices", "avg_pool2d") else x.numel() // out.numel()
            row.pool_flops += window * out.numel()
            row.cio += x.numel() + out.numel()
        elif op == "add" and sum(t.dim() == 4 for t in _flat(args)) == 2:
            row.shortcut_flops += out.numel()
        moved = _naive_bytes(op, args, out, self.training)
        row.dram_bytes_naive += moved
        if self.stack[-1] in self.beside or not any(name in self.fused for name in self.stack[1:]):
            row.dram_bytes_fused += moved

    def _parts(self, out: Tensor) -> tuple[int, ...]:
        """The outputs that one convolution computes for a ConcatConv with several."""
        parent = self.stack[-1].rpartition(".")[0]
        module = self.modules.get(parent)
        return module.splits if isinstance(module, reference.ConcatConv) else (out.shape[1],)

    def finish(self) -> list[Row]:
        """The rows, with parameters, in order of execution; modules that did nothing and own nothing are left out."""
        seen: set[Tensor] = set()
        for name, module in self.modules.items():
            for key, p in module.named_parameters(recurse=False):
                if p not in seen:
                    seen.add(p)
                    row = self._row(name)
                    row.params += p.numel()
                    row.weights += p.numel() if key == "weight" and p.dim() > 1 else 0
        return [row for row in self.rows.values() if any(getattr(row, key) for key in _SUMS)]


def _flat(args: Iterable[Any]) -> Iterator[Tensor]:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _flat(a)


def _window(kernel: Sequence[int]) -> int:
    return math.prod(kernel) ** (2 if len(kernel) == 1 else 1)


def _sizes(op: str, args: tuple[Any, ...], out: Tensor) -> tuple[int, int, int]:
    """Bytes of the inputs, the weight and the output."""
    i = sum(t.nbytes for t in _flat(args) if t.is_floating_point() and t.dim() > 1)
    w = {"convolution": args[1:2], "addmm": args[2:3], "mm": args[1:2]}.get(op, ())
    weight = sum(t.nbytes for t in _flat(w))
    return i - weight, weight, out.nbytes


def _naive_bytes(op: str, args: tuple[Any, ...], out: Tensor, training: bool) -> int:
    """What one operation of plain PyTorch reads and writes, forward and (in training) backward."""
    i, w, o = _sizes(op, args, out)
    indices = o // out.element_size() * 8 if op in ("max_pool2d_with_indices", "adaptive_max_pool2d") else 0
    forward = i + w + o + indices
    if not training:
        return forward
    if op in ("convolution", "addmm", "mm"):
        return forward + 2 * i + 2 * w + 2 * o  # input gradient, weight gradient
    if "batch_norm" in op:
        return forward + i + 5 * o  # statistics; sums over (x, dy), then dx from both
    if op in _ACTIVATIONS:
        return forward + 3 * o
    if op in ("cat", "add"):
        return forward + 3 * o  # the gradients add up where the inputs are used again
    if op == "mul":
        return forward + 5 * o
    return 2 * forward
