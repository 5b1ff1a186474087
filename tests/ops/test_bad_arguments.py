"""Operators called directly, torch.ops.csp_kernels.*, with one argument spoiled: each call must raise an error that
names the operator and the argument. It may not end the process, and it may not read what is not there.

One call is made right, then every argument is spoiled in every way that fits its type. All calls run in a process of
their own, which says what it is about to do: a signal is a failure with a name, and the rest goes on in another one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import csp_kernels as csp
from csp_kernels.ops._program import read_again
from csp_kernels.ops.stage import parameter_shapes
from csp_kernels.stage.build import Builder
from csp_kernels.stage.compile import compile_stage
from csp_kernels.stage.concat_conv import concat_conv
from csp_kernels.stage.csp_stage import csp_stage
from csp_kernels.stage.dense_block import dense_block
from csp_kernels.stage.graph import Conv, Graph, without_dropout
from csp_kernels.stage.partial_transition import partial_transition
from csp_kernels.stage.program import Wanted
from csp_kernels.stage.text import decode, encode
from csp_kernels.stage.two_way_dense_block import two_way_dense_block

OPS = torch.ops.csp_kernels
SIZE = (2, 4, 6)  # N, H, W
Arguments = dict[str, Any]
ERRORS = (RuntimeError, TypeError, ValueError, IndexError)
NAN, INF, HUGE = float("nan"), float("inf"), 2**40

pytestmark = pytest.mark.usefixtures("native")


class Case(NamedTuple):
    operator: str  # or the layer
    argument: str
    what: str
    call: Callable[[], Any]
    blames: tuple[str, ...]  # of these the error names one; none: the call must work

    @property
    def name(self) -> str:
        return f"{self.operator}: {self.argument}: {self.what}"


# --- right arguments ---


def image(channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    n, h, w = SIZE
    return torch.randn(n, channels, h, w).to(dtype).contiguous(memory_format=torch.channels_last)


def statistics(channels: list[int]) -> list[Tensor]:
    return [t for c in channels for t in (torch.randn(c), torch.rand(c) + 0.5)]


def named(op: str, *values: Any) -> Arguments:
    """By the names in the operator's schema."""
    names = [a.name for a in getattr(OPS, op).default._schema.arguments]
    return dict(zip(names, values, strict=True))


def call(op: str, arguments: Arguments) -> Any:
    return getattr(OPS, op).default(*arguments.values())


def parameters(graph: Graph) -> list[Tensor]:
    shapes = map(torch.Size, parameter_shapes(graph)[1])
    return [torch.randn(s) / s[1:].numel() ** 0.5 if len(s) == 4 else torch.rand(s) + 0.5 for s in shapes]


def stage(
    graph: Graph, frozen: tuple[bool, ...], recompute: str = "none", inference: bool = False
) -> dict[str, Arguments]:
    """Right calls of the operators; frozen is repeated."""
    flags = tuple(frozen[i % len(frozen)] for i in range(len(graph.norms)))
    running = statistics([c for c, f in zip(graph.norms, flags, strict=True) if f])
    wanted = None if inference else Wanted.all(graph)
    program = encode(compile_stage(graph, flags, wanted, recompute))
    drops = any(isinstance(node, Conv) and node.drop_rate for node in graph.nodes)
    seed = torch.tensor([3]) if drops else None
    given = parameters(graph), running, seed, program, [1e-5] * len(flags), 2
    inputs = [image(c) for c in graph.inputs]
    calls = {"stage": named("stage", inputs, *given)}
    if inference:
        shared = OPS.stage_inference.default(inputs, given[0], running, [], *given[3:])[2]
        calls["stage_inference"] = named("stage_inference", inputs, given[0], running, shared, *given[3:])
    else:
        outputs, kept, stats = call("stage", calls["stage"])
        grads = [torch.randn_like(t) for t in outputs]
        calls["stage_backward"] = named("stage_backward", grads, inputs, outputs, kept, stats, *given)
    return calls


def residual() -> Graph:
    """Two inputs, a bottleneck, a 3x3 and a sum, and another output that is averaged."""
    build = Builder(5, 16)
    z = build.conv([build.read(0), build.read(1, act="silu")], 20)
    y = build.conv([build.read(z, build.norm(20), "relu")], 16, 3, drop_rate=0.5)
    build.write([build.read(y)])
    total = build.sum([build.read(y, build.norm(16), "mish"), build.read(1)])
    build.write([build.read(total), build.read(z, stop=7)], pool=True)
    return build.graph()


RIGHT: dict[str, Callable[[], dict[str, Arguments]]] = {
    "residual": lambda: stage(residual(), (False, True)),
    "residual, recomputed": lambda: stage(without_dropout(residual()), (True, False), "all"),
    "dense block": lambda: stage(dense_block(2, 5, 4, 6, 0.5), (False, True)),
    "dense block, inference": lambda: stage(dense_block(2, 5, 4, 6), (True,), inference=True),
    "two outputs": lambda: stage(concat_conv([5, 16], [16, 8], "hardswish"), (False,)),
    "two outputs, inference": lambda: stage(concat_conv([5, 16], [4, 8], "leaky_relu", 0.1), (True,), inference=True),
    "csp, post": lambda: stage(partial_transition(3, 8, 6, 10), (False, True)),
    "first, pre": lambda: stage(partial_transition(3, 8, 6, 10, fusion="first", order="pre"), (False,)),
    "two ways": lambda: stage(two_way_dense_block(5, 4, [6, 6]), (False,), "bottleneck"),
    "csp stage": lambda: stage(csp_stage(8, 3, 4, [6, 6], 6, 10), (False, True)),
    "csp stage, last": lambda: stage(csp_stage(8, 3, 4, [6, 6], 6, 10, layer="two_way", fusion="last"), (False,)),
}

# --- how arguments are spoiled ---


def like(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Of another shape, in the same order of elements."""
    new = torch.zeros(shape, dtype=t.dtype)
    last = t.dim() == len(shape) == 4 and t.stride(1) == 1 and not t.is_contiguous()
    return new.contiguous(memory_format=torch.channels_last) if last else new


def shortened(t: Tensor, bytes_left: int) -> Tensor:
    copy = t.detach().clone()
    copy.untyped_storage().resize_(bytes_left)
    return copy


def spoiled_tensor(t: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """What is wrong, and the tensor."""
    yield "other float", lambda: t.to(torch.float64 if t.dtype != torch.float64 else torch.float32)
    yield "integers", lambda: t.to(torch.int32)
    yield "complex", lambda: t.to(torch.complex64)
    yield "meta", lambda: t.to("meta")
    yield "sparse", lambda: t.to_sparse()
    yield "no dimensions", lambda: torch.zeros((), dtype=t.dtype)
    yield "a dimension more", lambda: t.unsqueeze(0)
    if t.dim() > 1:
        yield "flat", lambda: t.flatten()
    for d in range(t.dim()):
        for what, size in ("less", t.shape[d] - 1), ("more", t.shape[d] + 1), ("none", 0):
            if size != t.shape[d] and size >= 0:
                shape = (*t.shape[:d], size, *t.shape[d + 1 :])
                yield f"size {d}: {what}", lambda shape=shape: like(t, shape)
    if t.numel() == 0:
        return
    yield "freed", lambda: shortened(t, 0)
    yield "storage short", lambda: shortened(t, t.untyped_storage().nbytes() - t.element_size())
    if t.dim() == 4 and t.shape[2] * t.shape[3] > 1:
        if t.stride(1) == 1:
            yield "NCHW", lambda: t.contiguous() if not t.is_contiguous() else t.transpose(2, 3).contiguous()
        yield "transposed", lambda: t.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3)
    elif t.numel() > 1:
        yield (
            "every second element",
            lambda: torch.stack([t.flatten(), t.flatten()], -1)[:, 0].as_strided(
                t.shape, tuple(2 * s for s in t.stride())
            ),
        )
    wide = [d for d in range(t.dim()) if t.shape[d] > 1]
    if wide:
        yield "stride 0", lambda: t.narrow(wide[0], 0, 1).expand_as(t)


def spoiled_value(value: Any, name: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    if isinstance(value, Tensor):
        yield from spoiled_tensor(value)
        yield "None", lambda: None
    elif isinstance(value, list):
        yield from spoiled_list(value, name)
    elif isinstance(value, bool):
        yield "a string", lambda: "yes"
    elif isinstance(value, int):
        for bad in (-1, -HUGE, HUGE, 2**63 - 1, -(2**63), 3 if name == "winograd" else 100):
            yield str(bad), lambda bad=bad: bad
    elif isinstance(value, float):
        for bad in (NAN, INF, -INF, -1.0):
            if (name, bad) != ("negative_slope", -1.0):
                yield str(bad), lambda bad=bad: bad


def spoiled_list(values: list[Any], name: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "a tensor", lambda: torch.zeros(3, 3)
    if values:
        yield "one less", lambda: values[:-1]
        if values[1:]:
            yield "none", lambda: []
        yield "one more", lambda: [*values, values[-1]]
        yield "None in it", lambda: [*values[:-1], None]
    else:
        yield "one more", lambda: [torch.zeros(5)]
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            options = list(spoiled_tensor(value))
        elif isinstance(value, float):
            options = [(str(bad), lambda bad=bad: bad) for bad in (NAN, INF, -1e-5)]
        else:
            options = [(str(bad), lambda bad=bad: bad) for bad in (-1, 2, HUGE, 2**63 - 1)]
        for what, make in options:
            yield f"{i}: {what}", lambda i=i, make=make: [*values[:i], make(), *values[i + 1 :]]


def harmless(op: str, name: str, what: str, arguments: Arguments) -> bool:
    """Another right call: its only image has another size, or something else that nothing is asked of."""
    if op == "stage_inference" and name == "packed" and len(arguments["packed"]) == 1 and what == "one less":
        return True  # none: they are made
    if op == "stage_inference" and name == "packed" and what == "none":
        return True
    if op != "stage_backward" and name == "inputs" and len(arguments["inputs"]) == 1:
        return what in {f"0: size {d}: {how}" for d in (0, 2, 3) for how in ("less", "more", "none")}
    lies = op == "stage_backward" and re.search("NCHW|transposed|stride 0|freed|short", what)
    return bool(lies) and name in ("inputs", "outputs") and f"{name}[{what[0]}]" not in read(arguments["program"])


def read(text: str) -> set[str]:
    """Inputs and outputs whose values backward reads."""
    program = decode(text)
    buffers = [program.buffers[i] for i in read_again(text)]
    return {f"{buffer.kind}s[{buffer.index}]" for buffer in buffers}


def unambiguous(what: str) -> bool:
    """The spoiled argument is to blame, whatever the others are."""
    return bool(re.search(r"freed|short|stride|NCHW|transposed|second|integers|complex|None in it", what))


def bad_cases() -> Iterator[Case]:
    for variant, make in RIGHT.items():
        for op, arguments in make().items():
            for name, value in arguments.items():
                for what, bad in spoiled_value(value, name):
                    if harmless(op, name, what, arguments):
                        continue
                    blames = (name,) if unambiguous(what) else tuple(arguments)
                    if "sparse" in what:
                        blames = ("Sparse",)  # the dispatcher's own words
                    spoil = partial(call_spoiled, op, arguments, name, bad)
                    yield Case(op, name, f"{what} ({variant})", spoil, blames)
            yield from specific_cases(variant, op, arguments)


def call_spoiled(op: str, arguments: Arguments, name: str, bad: Callable[[], Any]) -> Any:
    return call(op, {**arguments, name: bad()})


def specific_cases(variant: str, op: str, arguments: Arguments) -> Iterator[Case]:
    """What the argument's type does not say."""
    values: list[tuple[str, Any]] = [("program", text) for text in ("", "0", arguments["program"] + " 0")]
    if arguments.get("seed") is not None:
        two = torch.tensor([1, 2])
        values += [("seed", s) for s in (two[:0], two, two.int()[:1], two.float()[:1], two[0])]
    else:
        values += [("seed", torch.tensor([1], dtype=torch.int32)), ("seed", torch.zeros(0))]
    if not arguments["running"]:
        values += [("eps", [0.0] * len(arguments["eps"]))]
    for name, bad in values:
        text = re.sub(r"\s+", " ", str(bad))[-60:]
        spoil = partial(call, op, {**arguments, name: bad})
        yield Case(op, name, f"{text} ({variant})", spoil, tuple(arguments))


# --- unusual and right ---


def on_all(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return [changed(v) for v in value] if isinstance(value, list) else value

    return {name: changed(value) for name, value in arguments.items()}


def channel_slice(t: Tensor) -> Tensor:
    """An image in the middle of a wider one; anything else as it is."""
    if t.dim() != 4 or t.is_contiguous() or t.shape[2:] == (3, 3):
        return t
    n, c, h, w = t.shape
    wide = torch.full((n, c + 7, h, w), NAN, dtype=t.dtype).contiguous(memory_format=torch.channels_last)
    wide[:, 3 : 3 + c] = t
    return wide[:, 3 : 3 + c]


def in_one_storage(t: Tensor) -> Tensor:
    """Behind and in front of other values, as parameters in one flat tensor are."""
    if t.numel() == 0:
        return t
    flat = torch.full((t.numel() + 24,), 3, dtype=t.dtype)
    view = flat.as_strided(t.shape, t.stride(), 11)
    view.copy_(t)
    return view


def exact_storage(t: Tensor) -> Tensor:
    """A channel slice whose storage ends with its last element."""
    cut = channel_slice(t)
    last = sum((n - 1) * s for n, s in zip(cut.shape, cut.stride(), strict=True)) + cut.storage_offset() + 1
    if cut.numel() and cut is not t:
        cut.untyped_storage().resize_(last * cut.element_size())
    return cut


def weights_channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def odd_strides(t: Tensor) -> Tensor:
    """Dimensions of size one with strides that mean nothing."""
    return t.as_strided(t.shape, [s if n > 1 else 77 for n, s in zip(t.shape, t.stride(), strict=True)])


UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda t: t,
    "channel slices": channel_slice,
    "one storage": in_one_storage,
    "a storage that ends with the tensor": exact_storage,
    "weights in channels_last": weights_channels_last,
    "strides of sizes of one": odd_strides,
    "negative bit": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
    "wants gradients": lambda t: t.detach().requires_grad_(t.dtype == torch.float32),
    "inference tensors": lambda t: inference_tensor(t),
}


def inference_tensor(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def flattened(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in flattened(v)] if isinstance(value, (list, tuple)) else []


def call_changed(op: str, arguments: Arguments, change: Callable[[Tensor], Tensor]) -> None:
    """The same numbers as without the change."""
    plain, changed = (flattened(call(op, a)) for a in (arguments, on_all(arguments, change)))
    for t, u in zip(plain, changed, strict=True):
        padded = not op.endswith("backward") and t.dim() < 4 and t.dtype != torch.float64  # what forward keeps
        assert t.shape == u.shape and (padded or torch.equal(t, u)), "other numbers than without the change"


def call_of_size(op: str, make: Callable[[], dict[str, Arguments]], size: tuple[int, int, int]) -> None:
    global SIZE
    before, SIZE = SIZE, size
    try:
        for t in flattened(call(op, make()[op])):
            assert t.device.type == "cpu"
    finally:
        SIZE = before


def call_in_dtype(op: str, make: Callable[[], dict[str, Arguments]], dtype: torch.dtype) -> None:
    """Images and what is kept in this dtype."""
    arguments = make()["stage"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = {
        name: on_all({"": value}, lambda t: t.to(dtype))[""]
        if name == "inputs"
        else on_all({"": value}, lambda t: t.to(wide) if t.is_floating_point() else t)[""]
        for name, value in arguments.items()
    }
    for t in flattened(call("stage", arguments)):
        assert t.dtype in (dtype, torch.float64)


def call_on_meta(op: str, arguments: Arguments) -> None:
    """Shapes, dtypes and strides as on the CPU; nothing is computed."""
    real, fake = (flattened(call(op, a)) for a in (arguments, on_all(arguments, lambda t: t.to("meta"))))
    for t, u in zip(real, fake, strict=True):
        assert u.is_meta and (t.shape, t.dtype) == (u.shape, u.dtype)


def good_cases() -> Iterator[Case]:
    for variant, make in RIGHT.items():
        for op, arguments in make().items():
            for what, change in UNUSUAL.items():
                if op == "stage_backward" and what in (
                    "channel slices",
                    "a storage that ends with the tensor",
                ):
                    continue  # takes no slices, see `packed`
                if what == "weights in channels_last":
                    change = lambda t: weights_channels_last(t) if t.shape[2:] == (3, 3) else t  # noqa: E731
                yield Case(op, what, variant, partial(call_changed, op, arguments, change), ())
            for size in (0, 4, 6), (3, 2, 2), (1, 2, 9), (1, 9, 2), (1, 2, 3):
                yield Case(op, f"size {size}", variant, partial(call_of_size, op, make, size), ())
            for dtype in (torch.bfloat16, torch.float16, torch.float64):
                yield Case(op, str(dtype), variant, partial(call_in_dtype, op, make, dtype), ())
            yield Case(op, "meta", variant, partial(call_on_meta, op, arguments), ())


# --- layers ---


LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "ConcatConv": lambda: csp.ConcatConv([8], 6),
    "DenseBlock": lambda: csp.DenseBlock(2, 8, growth_rate=4),
    "PostDenseBlock": lambda: csp.PostDenseBlock(2, 8, growth_rate=4),
    "TwoWayDenseBlock": lambda: csp.TwoWayDenseBlock(2, 8, growth_rate=4),
    "CSPDenseStage": lambda: csp.CSPDenseStage(8, 8, 2, growth_rate=4),
}


def through(layer: str, tensor: str, train: bool, dtype: torch.dtype, x: Tensor) -> Any:
    """The layer with this parameter or buffer, or its input, freed. In backward: after forward."""
    module = LAYERS[layer]().train(train).to(dtype)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers()) | {"input": x.to(dtype)}
    when, _, name = tensor.rpartition(" ")
    given = tensors["input"]
    if not when:
        tensors[name].data.untyped_storage().resize_(0)
    y = module([given] if layer == "ConcatConv" else given)
    if when:
        tensors[name].data.untyped_storage().resize_(0)
        (y[0] if isinstance(y, list) else y).sum().backward()


def layer_cases() -> Iterator[Case]:
    for layer, make in LAYERS.items():
        module = make()
        statistics = [name for name, _ in module.named_buffers() if "running" in name]
        names = ["input", *(name for name, _ in module.named_parameters()), *statistics]
        modes = (True, torch.float32, True), (False, torch.float32, False), (True, torch.bfloat16, False)
        for train, dtype, nhwc in modes:
            kept = [name for name in names if "conv" in name and train and dtype == torch.float32]  # others are copies
            for name in [*names, *(f"backward {name}" for name in kept)]:
                x = image(8) if nhwc else image(8).contiguous()
                run = partial(through, layer, name, train, dtype, x)
                what = f"freed, {'train' if train else 'eval'} {dtype} {'NHWC' if nhwc else 'NCHW'}"
                yield Case(layer, name, what, run, ("storage",))


def cases() -> list[Case]:
    torch.manual_seed(0)
    return [*bad_cases(), *good_cases(), *layer_cases()]


# --- the subprocess ---


def outcome(case: Case) -> str:
    """ "", or what went wrong."""
    try:
        case.call()
    except ERRORS as error:
        text = str(error)
        if not case.blames:
            return f"raised {type(error).__name__}: {text}"
        if "Sparse" not in case.blames and re.search(r"/\w+/|\.(cpp|h|cu):\d", text):
            return f"names a file: {text}"
        blamed = any(re.search(rf"\b{name}", text) for name in case.blames)
        known = blamed and (case.operator in LAYERS or case.operator in text)
        return "" if known else f"does not name {' or '.join(case.blames)}: {text}"
    except AssertionError as error:
        return str(error) or "assertion failed"
    return "raised nothing" if case.blames else ""


def run_from(first: int, table: list[Case]) -> None:
    for i, case in enumerate(table[first:], first):
        print(json.dumps(["run", i, ""]), flush=True)
        print(json.dumps(["end", i, outcome(case)]), flush=True)


def main() -> None:
    """Says of each case that it begins, and how it ended. A child runs them; after a signal another goes on."""
    csp.use_backend("native")
    torch.set_num_threads(1)
    table, first = cases(), 0
    print(json.dumps([[case.operator, case.name] for case in table]), flush=True)
    while first < len(table):
        reader, writer = os.pipe()
        if not (child := os.fork()):
            os.dup2(writer, 1)
            os.close(reader)
            run_from(first, table)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as lines:
            for line in lines:
                first = json.loads(line)[1] + 1
                print(line, end="", flush=True)
        _, status = os.waitpid(child, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            print(json.dumps(["end", first - 1, f"signal {-code}" if code < 0 else f"exit status {code}"]), flush=True)


def run_all() -> dict[str, list[str]]:
    """Operator -> its cases and what went wrong in each, "" if nothing did."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], text=True, capture_output=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    head, *lines = map(json.loads, done.stdout.splitlines())
    ends = {i: text for kind, i, text in lines if kind == "end"}
    assert sorted(ends) == list(range(len(head))), "not every case ran"
    found: dict[str, list[str]] = {}
    for i, (operator, name) in enumerate(head):
        found.setdefault(operator, []).append(f"{name}: {ends[i]}" if ends[i] else "")
    return found


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    return run_all()


OPERATORS = ["stage", "stage_backward", "stage_inference"]


@pytest.mark.parametrize("layer", LAYERS)
def test_freed_memory_in_a_layer(layer: str, outcomes: dict[str, list[str]]) -> None:
    """Not a signal: neither from the operators nor from PyTorch's copies in front of them."""
    failures = [text for text in outcomes[layer] if text]
    assert len(outcomes[layer]) >= 10
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("operator", OPERATORS)
def test_each_call_names_its_argument_or_works(operator: str, outcomes: dict[str, list[str]]) -> None:
    failures = [text for text in outcomes[operator] if text]
    assert len(outcomes[operator]) >= 100
    assert not failures, "\n".join(failures)


def test_every_operator_is_in_the_table() -> None:
    """Of those that take tensors on a CPU."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("csp_kernels::")]
    on_cpu = {n.partition("::")[2] for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CPU")}
    takes_tensors = {n for n in on_cpu if getattr(OPS, n).default._schema.arguments}
    assert takes_tensors == {*OPERATORS, "update_running"}


RUNNING: dict[str, tuple[int, Any, str]] = {  # position and value of an argument -> what the message names
    "float16": (0, [torch.zeros(5).half()], r"means\[0\]: got float16 \[5\]"),
    "two dimensions": (0, [torch.zeros(5, 1)], r"means\[0\]: got float32 \[5, 1\]"),
    "not contiguous": (0, [torch.zeros(10)[::2]], r"means\[0\]: .* strides \[2\]"),
    "more channels than columns": (0, [torch.zeros(9)], r"vars\[0\]|means\[0\]"),
    "other dtype": (1, [torch.zeros(5).double()], r"vars\[0\]: got float64 \[5\], expected float32 \[5\]"),
    "other size": (1, [torch.zeros(4)], r"vars\[0\]: got float32 \[4\], expected float32 \[5\]"),
    "no variance": (1, [], "vars: got 0, expected 1"),
    "float counter": (2, [torch.tensor(0.0)], r"counters\[0\]: got float32"),
    "counter of two": (2, [torch.zeros(2, dtype=torch.int64)], r"counters\[0\]: got int64 \[2\]"),
    "float32 statistics": (3, torch.zeros(2, 8), r"stats: got float32 \[2, 8\], expected float64"),
    "one row": (3, torch.zeros(1, 8).double(), r"stats: got float64 \[1, 8\]"),
    "no start": (4, [], "starts: got 0, expected 1"),
    "before the columns": (4, [-1], r"starts\[0\]: got -1, expected 0 to 3"),
    "behind the columns": (4, [4], r"starts\[0\]: got 4, expected 0 to 3"),
    "no momentum": (5, [], "momenta: got 0, expected 1"),
    "no factor": (6, [], "unbiased: got 0, expected 1"),
}


@pytest.mark.parametrize("name", RUNNING)
def test_running_statistics(name: str) -> None:
    """A refused call has changed nothing; the same call with the right argument has."""
    at, value, message = RUNNING[name]
    right: list[Any] = [
        [torch.zeros(5)],
        [torch.ones(5)],
        [torch.tensor(3)],
        torch.ones(2, 8).double(),
        [3],
        [0.5],
        [1.0],
    ]
    wrong = [*right[:at], value, *right[at + 1 :]]
    with pytest.raises(RuntimeError, match=message):
        OPS.update_running(*wrong)
    kept = [t for i, tensors in enumerate(right[:3]) if i != at for t in tensors]
    assert all(bool((t == (0, 1, 3)[i]).all()) for i, t in zip([i for i in range(3) if i != at], kept, strict=True))
    OPS.update_running(*right)
    assert right[0][0].eq(0.5).all() and right[1][0].eq(1).all() and right[2][0] == 4


def test_freed_running_statistics() -> None:
    mean = torch.zeros(5)
    mean.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"means\[0\]: .* storage holds 0 bytes"):
        OPS.update_running([mean], [torch.ones(5)], [], torch.ones(2, 8).double(), [0], [0.5], [1.0])


if __name__ == "__main__":
    main()
