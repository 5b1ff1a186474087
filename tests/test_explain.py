"""csp.explain against counts by hand and what the operators return, and docs/stages.md as it is printed."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import csp_kernels as csp
from csp_kernels.explain import Explanation, _elsewhere
from csp_kernels.ops import _program
from csp_kernels.stage.build import Builder, conv_norm
from csp_kernels.stage.compile import compile_stage
from csp_kernels.stage.dense_block import dense_block
from csp_kernels.stage.graph import Graph
from csp_kernels.stage.program import Wanted
from csp_kernels.stage.text import decode, encode

OPS = torch.ops.csp_kernels
N, H, W = 3, 5, 7
PIXELS = N * H * W


def two_convolutions() -> Graph:
    """3x3 8 -> 20, norm, ReLU, 1x1 20 -> 6."""
    build = Builder(8)
    inner = conv_norm(build, [build.read(0)], 20, 3, prefix="first.")
    build.write([build.read(build.conv([inner], 6, name="last"))])
    return build.graph()


def image(channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(N, channels, H, W, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


Case = tuple[nn.Module, tuple[Any, ...]]
LAYERS: dict[str, Callable[[], Case]] = {  # every fused layer, and the arguments of a call
    "dense": lambda: (csp.DenseBlock(3, 12, 4, 2), (image(12),)),
    "dense, drop": lambda: (csp.DenseBlock(2, 12, 4, 2, drop_rate=0.25, recompute="bottleneck"), (image(12),)),
    "post": lambda: (csp.PostDenseBlock(3, 12, 4, 2), (image(12),)),
    "two_way": lambda: (csp.TwoWayDenseBlock(3, 12, 4, 2), (image(12),)),
    "stage, pre": lambda: (csp.CSPDenseStage(16, 20, 2, 4, 2, recompute="bottleneck"), (image(16),)),
    "stage, post, first": lambda: (
        csp.CSPDenseStage(16, 20, 2, 4, 2, layer="post", fusion="first", part_ratio=0.25), (image(16),)
    ),
    "stage, two_way, last": lambda: (
        csp.CSPDenseStage(16, 20, 2, 4, 1, layer="two_way", fusion="last", pool=None), (image(16),)
    ),
    "stage, no bypass": lambda: (csp.CSPDenseStage(16, 20, 2, 4, 2, part_ratio=0), (image(16),)),
    "transition, pre": lambda: (csp.PartialTransition(8, 12, 10, 6, order="pre"), (image(8), image(12))),
    "transition, first": lambda: (csp.PartialTransition(8, 12, 10, 6, fusion="first"), (image(8), image(12))),
    "transition, last": lambda: (csp.PartialTransition(8, 12, 10, 18, fusion="last"), (image(8), image(12))),
    "transition, no bypass": lambda: (csp.PartialTransition(0, 12, 10, 6, pool=None), (None, image(12))),
    "concat": lambda: (csp.ConcatConv([8, 12], 10, act="leaky_relu"), ([image(8), image(12)],)),
    "concat, split": lambda: (csp.ConcatConv([8], [6, 10], act="silu", negative_slope=0.3), (image(8),)),
    "stage of one's own": lambda: (csp.Stage(dense_block(2, 12, 4, 8, 0.25), recompute="all"), (image(12),)),
}  # fmt: skip
each_layer = pytest.mark.parametrize("case", LAYERS)


@each_layer
def test_a_graph_names_the_children_that_hold_parameters(case: str) -> None:
    layer, _ = LAYERS[case]()
    children = [name for name, child in layer.named_modules() if [*child.parameters(recurse=False)]]
    assert [item.name for item in layer.graph.order] == children
    kinds = [nn.Conv2d if item.kind == "conv" else nn.BatchNorm2d for item in layer.graph.order]
    assert [type(layer.get_submodule(name)) for name in children] == kinds


@each_layer
@pytest.mark.parametrize("mode", ["training", "eval", "inference", "frozen", "first input alone"])
def test_it_is_the_program_that_a_call_runs(
    native: None, monkeypatch: pytest.MonkeyPatch, case: str, mode: str
) -> None:
    layer, inputs = LAYERS[case]()
    layer.train(mode not in ("eval", "inference"))
    if mode == "frozen":
        norms = [child for child in layer.modules() if isinstance(child, nn.BatchNorm2d)]
        norms[0].eval().requires_grad_(False)
        next(child for child in layer.modules() if isinstance(child, nn.Conv2d)).requires_grad_(False)
    layer.requires_grad_(mode != "first input alone") if mode != "frozen" else None
    texts: list[str] = []
    compiled = _program._program

    def spy(*arguments: Any) -> str:
        texts.append(compiled(*arguments))
        return texts[-1]

    monkeypatch.setattr(_program, "_program", spy)
    with torch.set_grad_enabled(mode != "inference"):
        explanation = csp.explain(layer, *inputs)
        layer(*inputs)
    (text,) = texts
    program = decode(text)
    assert [step.text for step in explanation.forward] == [str(step) for step in program.forward]
    assert [step.text for step in explanation.backward] == [str(step) for step in program.backward]
    assert [memory.text for memory in explanation.buffers] == [str(buffer) for buffer in program.buffers]
    assert bool(program.backward) == (mode != "inference")
    recompute = getattr(layer, "recompute", "none")
    kind = "training" if layer.training else "eval"
    assert explanation.title.startswith(f"csp.{type(layer).__name__}, {kind}, recompute={recompute!r}: ")
    assert not explanation.unsupported


def counts(explanation: Explanation, direction: str) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """FLOPs, elements of 4 bytes read and written, by the convolution whose weights are used."""
    steps = getattr(explanation, direction)
    return {s.parameters: (s.flops, s.bytes_read // 4, s.bytes_written // 4) for s in steps if s.parameters}


def test_two_convolutions_by_hand() -> None:
    explanation = csp.explain(csp.Stage(two_convolutions()), image(8))
    first, last = 2 * 9 * 8 * 20 * PIXELS, 2 * 20 * 6 * PIXELS
    assert counts(explanation, "forward") == {
        ("first.conv",): (first, 8 * PIXELS, 20 * PIXELS),
        ("last",): (last, 20 * PIXELS, 6 * PIXELS),
    }
    assert counts(explanation, "backward") == {  # the value of the first is read again: for its norm
        ("last",): (2 * last, (6 + 20) * PIXELS, 20 * PIXELS),
        ("first.conv",): (2 * first, (2 * 20 + 8) * PIXELS, 8 * PIXELS),
    }
    shapes = {step.parameters: step.shape for step in explanation.forward if step.parameters}
    assert shapes == {("first.conv",): (N, 20, H, W), ("last",): (N, 6, H, W)}
    assert explanation.forward_total.flops == first + last
    assert explanation.backward_total.flops == 2 * (first + last)
    assert explanation.forward_total.bytes_read == 4 * 28 * PIXELS
    assert explanation.forward_total.bytes_written == 4 * 26 * PIXELS
    assert explanation.kept_bytes == 4 * 32 * PIXELS  # rows of 20 channels, padded
    assert [memory.text for memory in explanation.read_again] == ["input0[8]"]


def test_halved_sizes() -> None:
    build = Builder(4)
    build.write([build.read(build.conv([build.read(0)], 6, pool=True))])
    explanation = csp.explain(csp.Stage(build.graph()), image(4, torch.float64))
    (product,) = explanation.forward
    pixels = N * (H // 2) * (W // 2)
    assert product.shape == (N, 6, H // 2, W // 2)
    assert product.flops == 2 * 4 * 6 * pixels
    assert (product.bytes_read, product.bytes_written) == (8 * 4 * PIXELS, 8 * 6 * pixels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "bottleneck", "all"])
def test_kept_bytes_are_those_that_the_operator_returns(native: None, recompute: str, dtype: torch.dtype) -> None:
    graph = dense_block(2, 20, 8, 24)
    stage, x = csp.Stage(graph, recompute=recompute), image(20, dtype)
    program = compile_stage(graph, (False,) * len(graph.norms), Wanted.all(graph), recompute)
    params = [p.detach() for p in stage.parameters()]
    _, kept, _ = OPS.stage.default([x.detach()], params, [], None, encode(program), [1e-5] * len(graph.norms), 2)
    explanation = csp.explain(stage, x)
    assert [memory.bytes for memory in explanation.kept] == [t.numel() * t.element_size() for t in kept]
    assert explanation.kept_bytes == sum(t.numel() * t.element_size() for t in kept)
    assert len(explanation.kept) == {"none": 2, "bottleneck": 0, "all": 0}[recompute]


@pytest.mark.parametrize("graph", [two_convolutions(), dense_block(2, 20, 8, 24)], ids=["input", "output"])
def test_inputs_and_outputs_that_backward_reads_again(native: None, graph: Graph) -> None:
    """NaN in them reaches the gradients exactly where it says so."""
    stage, norms = csp.Stage(graph), len(graph.norms)
    x = image(graph.inputs[0]).detach()
    program = encode(compile_stage(graph, (False,) * norms, Wanted.all(graph)))
    params, eps = [p.detach() for p in stage.parameters()], [1e-5] * norms
    outputs, kept, stats = OPS.stage.default([x], params, [], None, program, eps, 2)

    def is_read(inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        grads = [torch.randn_like(y).contiguous(memory_format=torch.channels_last) for y in outputs]
        found = OPS.stage_backward.default(grads, inputs, outputs, kept, stats, params, [], None, program, eps, 2)
        return any(bool(t.isnan().any()) for t in found)

    said = [memory.kind for memory in csp.explain(stage, x.requires_grad_()).read_again]
    x = x.detach()
    assert not is_read([x], outputs)
    assert is_read([torch.full_like(x, torch.nan)], outputs) == ("input" in said)
    assert is_read([x], [torch.full_like(y, torch.nan) for y in outputs]) == ("output" in said)
    assert said


def test_without_gradients_nothing_is_kept() -> None:
    stage, x = csp.Stage(dense_block(2, 20, 8, 24)).eval(), image(20)
    with torch.no_grad():
        explanation = csp.explain(stage, x)
    assert not explanation.backward and not explanation.kept and not explanation.read_again
    assert "running" in explanation.forward[0].text
    assert "kept for backward: nothing" in str(explanation)
    stage.requires_grad_(False)
    assert not csp.explain(stage, x.detach()).kept
    assert csp.explain(stage, x).kept  # eval alone does not forbid gradients


def test_frozen_parameters_take_work_from_backward() -> None:
    stage, x = csp.Stage(two_convolutions()), image(8)
    first, last = 2 * 9 * 8 * 20 * PIXELS, 2 * 20 * 6 * PIXELS
    stage.get_submodule("last").requires_grad_(False)
    assert csp.explain(stage, x).backward_total.flops == 2 * first + last
    assert csp.explain(stage, x.detach()).backward_total.flops == first + last
    stage.get_submodule("first.conv").requires_grad_(False)
    explanation = csp.explain(stage, x.detach())  # sums of the norm's parameters alone
    assert [step.parameters for step in explanation.backward if step.parameters] == [("last",)]
    assert explanation.backward_total.flops == last


def test_frozen_norms_and_eval_change_the_program() -> None:
    stage, x = csp.Stage(dense_block(2, 20, 8, 24, drop_rate=0.5)), image(20)
    training = str(csp.explain(stage, x))
    assert "drop0.5" in training and "running" not in training
    stage.get_submodule("denselayer1.norm2").eval()
    assert re.search(r"norm1\[0:24\] a\d+ running", str(csp.explain(stage, x)))
    assert "drop0.5" not in str(csp.explain(stage.eval(), x))


def test_autocast_and_meta_tensors() -> None:
    stage, x = csp.Stage(two_convolutions()), image(8)
    full = csp.explain(stage, x)
    assert csp.explain(stage, x.to("meta")) == full
    with torch.autocast("cpu", torch.bfloat16):
        half = csp.explain(stage, x)
    assert half.kept_bytes == full.kept_bytes // 2
    assert "bfloat16" in half.title


def test_printed_numbers() -> None:
    lines = str(csp.explain(csp.Stage(two_convolutions()), image(8))).splitlines()
    (row,) = [line for line in lines if "conv3x3 w0(b0" in line]
    kib = PIXELS * 4 / 1024
    assert re.split(r"\s{2,}", row)[:5] == ["[3, 20, 5, 7]", "0.3", f"{8 * kib:.1f}", f"{20 * kib:.1f}", "first.conv"]
    assert f"kept for backward: {32 * kib:.1f} KiB in b2 (kept0[20])" in lines
    assert f"read again by backward: {8 * kib:.1f} KiB in b0 (input0[8])" in lines


def test_what_the_kernels_cannot_run() -> None:
    build = Builder(8)
    build.write([build.read(build.conv([build.read(0)], 8, groups=2))])
    explanation = csp.explain(csp.Stage(build.graph()), image(8))
    assert "v1 has groups" in str(explanation).splitlines()[1]
    build = Builder(8)
    build.write([build.read(build.conv([build.read(0)], 8, drop_rate=0.5))])
    stage = csp.Stage(build.graph())
    assert csp.explain(stage, image(8)).unsupported == "v1 has dropout behind a 1x1"
    assert not csp.explain(stage.eval(), image(8)).unsupported


def test_dropout_is_in_the_graph_where_it_is_on() -> None:
    block = csp.DenseBlock(3, 12, 4, 2, drop_rate=0.25)
    assert rates(block.graph) == [0.0, 0.25] * 3
    block.get_submodule("denselayer2").eval()
    assert rates(block.graph) == [0.0, 0.25, 0.0, 0.0, 0.0, 0.25]
    assert csp.explain(block, image(12)).unsupported == "its layers drop at different rates: 0.0, 0.25"
    assert rates(block.eval().graph) == [0.0] * 6


def rates(graph: Graph) -> list[float]:
    return [getattr(conv, "drop_rate", -1.0) for conv in graph.nodes]


@pytest.mark.parametrize("case", [case for case in LAYERS if case != "stage of one's own"])
def test_what_makes_a_layer_run_as_the_reference(case: str) -> None:
    layer, inputs = LAYERS[case]()
    plain = csp.explain(layer, *inputs)
    name = next(name for name, child in layer.named_modules() if isinstance(child, nn.BatchNorm2d))
    layer.get_submodule(name).register_forward_hook(lambda *_: None)
    explanation = csp.explain(layer, *inputs)
    assert explanation.unsupported == f"{name} has a forward hook"
    assert (
        str(explanation).splitlines()[1] == f"not run by the kernels, but by the reference: {name} has a forward hook"
    )
    assert (explanation.forward, explanation.backward) == (plain.forward, plain.backward)
    layer, inputs = LAYERS[case]()
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert csp.explain(layer, *inputs).unsupported == f"{name} is a SyncBatchNorm, not an nn.BatchNorm2d"
    parent, _, last = name.rpartition(".")
    setattr(layer.get_submodule(parent), last, nn.GroupNorm(1, layer.get_submodule(name).num_features))
    assert csp.explain(layer, *inputs).unsupported == f"{name} is a GroupNorm, not an nn.BatchNorm2d"


def test_a_stage_whose_dense_layers_drop_runs_as_the_reference() -> None:
    stage = csp.CSPDenseStage(16, 20, 2, 4, 2)
    stage.dense.drop_rate = 0.5
    assert csp.explain(stage, image(16)).unsupported == "dense has dropout"
    assert not csp.explain(stage.eval(), image(16)).unsupported


def test_other_devices_in_words() -> None:
    layer, said = csp.DenseBlock(2, 8, 4), {}
    with FakeTensorMode():
        for device in ("cpu", "meta", "cuda", "mps"):
            said[device] = _elsewhere(layer, [torch.empty(2, 8, 5, 5, device=device)])
    assert not said["cpu"] and not said["meta"]
    assert said["cuda"] == (
        "the inputs are on cuda, where kernels have to be chosen or measured: csp.use_backend('triton')"
    )
    assert said["mps"] == "the inputs are on mps, for which there are no kernels"


def test_calls_on_a_gpu_that_were_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def faster(_: torch.device, *call: object) -> tuple[str, ...]:
        asked.append((call[0], call[2]))
        return ("triton",)

    monkeypatch.setattr("csp_kernels.winners.faster", faster)
    monkeypatch.setattr("csp_kernels.ops._transforms._missing", lambda name, device: False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 8, 5, 5, device="cuda")
        assert not _elsewhere(csp.CSPDenseStage(8, 12, 2, 4, 2), [x])
        with torch.no_grad():
            assert not _elsewhere(csp.TwoWayDenseBlock(2, 8, 4, 2), [x])
    assert asked == [("csp_stage", True), ("two_way_dense_block", False)]


def test_errors() -> None:
    kinds = (
        "ConcatConv, csp.CSPDenseStage, csp.CSPStage, csp.DenseBlock, csp.PartialTransition, csp.PostDenseBlock, "
        "csp.Stage, csp.Transition or csp."
    )
    with pytest.raises(TypeError, match=f"^module: got ReLU, expected csp.{kinds}TwoWayDenseBlock$"):
        csp.explain(nn.ReLU(), image(8))
    with pytest.raises(ValueError, match=r"inputs\[0\]: got 9 channels"):
        csp.explain(csp.DenseBlock(2, 8, 4), image(9))
    with pytest.raises(ValueError, match=r"inputs: got tensors of \[8\] channels, expected \[8, 8\]"):
        csp.explain(csp.ConcatConv([8, 8], 4), image(8))
    with pytest.raises(ValueError, match="part: got None, expected a Tensor"):
        csp.explain(csp.PartialTransition(8, 8, 4, 4), None, image(8))
    stage = csp.CSPDenseStage(16, 20, 2, 4, 2)
    stage.dense.denselayer1.conv2 = nn.Sequential(stage.dense.denselayer1.conv2)
    with pytest.raises(RuntimeError, match=r"^denselayer1\.conv2: got a Sequential, expected an nn\.Conv2d$"):
        csp.explain(stage, image(16))
    stage.dense = nn.Identity()
    with pytest.raises(RuntimeError, match=r"got a Identity, expected a csp\.DenseBlock"):
        csp.explain(stage, image(16))
    with pytest.raises(ValueError, match=r"inputs\[0\]: got 9 channels"):
        csp.explain(csp.Stage(two_convolutions()), image(9))


def test_the_document_is_true(native: None) -> None:
    """Its code runs, one block after the other, and prints what it says: "..." stands for lines, errors may differ."""
    text = (Path(__file__).parents[1] / "docs" / "stages.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```)?", text, re.DOTALL)
    assert len(blocks) == text.count("```python") and len(blocks) > 5
    names: dict[str, Any] = {}
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/stages.md", "exec"), names)
        said, real = ([same_errors(line) for line in t.splitlines()] for t in (shown, printed.getvalue()))
        assert fits(said, real), f"shown:\n{shown}\nprinted:\n{printed.getvalue()}"


def same_errors(line: str) -> str:
    return re.sub(r"\d\.\de[+-]\d\d", "?", line.rstrip())


def fits(shown: list[str], printed: list[str]) -> bool:
    """shown is printed, where a line "..." stands for one or more lines."""
    pattern = "".join(r"(?:.*\n)+?" if line == "..." else re.escape(line) + "\n" for line in shown)
    return re.fullmatch(pattern, "".join(line + "\n" for line in printed)) is not None
