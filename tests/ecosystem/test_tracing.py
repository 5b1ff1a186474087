"""Recorded to run elsewhere: torch.jit.trace, both ONNX exporters, torch.fx and what is built on it, torch.export."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import ALL, check_same, inputs, make, plain, step, tensors

import csp_kernels as csp

NAMES = list(ALL)


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """None of our warnings, whatever the tools themselves say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not [w for w in caught if "csp" in str(w.message) or "csp_kernels" in w.filename]


def check_outputs(got: Any, expected: Any, tolerance: float = 1e-9) -> None:
    for y, other in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(y, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_jit_trace(name: str, training: bool) -> None:
    """With gradients on, saved and loaded; for another batch size; even with "native" chosen."""
    ours = make(name).train(training)
    arguments = inputs(name)
    with csp.use_backend("native"):
        traced = torch.jit.trace(ours, tuple(arguments), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    theirs = plain(make(name)).train(training)
    theirs.load_state_dict(loaded.state_dict())
    more = inputs(name, 3)
    check_same(step(loaded, more), step(theirs, more))


DYNAMO = ["two_way", "join", "partial pre", "stage pre", "residual slice"]  # it takes seconds for each
SLOW = [pytest.param(name, True, marks=pytest.mark.slow) for name in NAMES if name not in DYNAMO]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "dynamo"), [*((name, False) for name in NAMES), *((name, True) for name in DYNAMO), *SLOW]
)
def test_onnx(name: str, dynamo: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ours = make(name, torch.float32).eval()
    arguments = inputs(name, dtype=torch.float32)
    file = tmp_path / "model.onnx"
    torch.onnx.export(ours, tuple(arguments), str(file), dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors(arguments), strict=True)}
    got = [torch.from_numpy(y) for y in session.run(None, feeds)]
    check_outputs(got, ours(*arguments), 1e-4)
    assert not any("csp_kernels" in node for node in operators(file))


def operators(file: Path) -> list[str]:
    onnx = pytest.importorskip("onnx")
    return [f"{node.domain}::{node.op_type}" for node in onnx.load(str(file)).graph.node]


@pytest.mark.parametrize("name", NAMES)
def test_fx(name: str) -> None:
    """The graph has the children as nodes and trains as the plain twin."""
    ours = make(name)
    arguments = inputs(name)
    traced = torch.fx.symbolic_trace(ours)
    targets = {n.target for n in traced.graph.nodes if n.op == "call_module"}
    convolutions = {path for path, m in ours.named_modules() if isinstance(m, nn.Conv2d)}
    assert convolutions <= targets
    theirs = plain(make(name))
    theirs.load_state_dict(ours.state_dict())
    got, expected = step(traced, arguments), step(theirs, arguments)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-9)


def test_feature_extractor() -> None:
    """Nodes by the names of children inside a fused layer."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    for name, node in (
        ("densenet_digits", "features.denseblock2.denselayer3.conv1"),
        ("csp_peleenet_digits", "features.stage1.dense.denselayer1.branch2.conv3"),
    ):
        ours = make(name).eval()
        extractor = extraction.create_feature_extractor(ours, {node: "inner", "classifier": "logits"})
        found: list[Tensor] = []
        theirs = plain(ours)
        theirs.get_submodule(node).register_forward_hook(lambda m, a, y, found=found: found.append(y))
        (x,) = inputs(name)
        got, logits = extractor(x), theirs(x)
        check_outputs([got["inner"], got["logits"]], [found[0], logits])


@pytest.mark.filterwarnings("ignore")
def test_fx_quantization() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    ours = make("densenet_digits", torch.float32).eval()
    (x,) = inputs("densenet_digits", dtype=torch.float32)
    prepared = prepare_fx(ours, get_default_qconfig_mapping("onednn"), (x,))
    prepared(x)
    quantized = convert_fx(prepared)
    assert any("Quantized" in type(m).__name__ or "quantized" in type(m).__module__ for m in quantized.modules())
    expected = ours(x)
    if "onednn" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "onednn"
        assert (quantized(x) - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["dense", "join", "transition", "partial post", "stage two_way"])
def test_export_keeps_the_operators(name: str, strict: bool) -> None:
    ours = make(name).eval()
    arguments = inputs(name)
    program = torch.export.export(ours, tuple(arguments), strict=strict)
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert any("csp_kernels" in n for n in names)
    check_outputs(program.module()(*arguments), ours(*arguments))


@pytest.mark.parametrize("name", ["dense", "join", "stage pre", "residual conv"])
def test_script_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"csp\.\w+ cannot be compiled by torch.jit.script; use torch.jit.trace"):
        torch.jit.script(make(name))
