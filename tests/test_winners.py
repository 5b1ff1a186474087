"""The table of measured winners and what "auto" makes of it. There is no GPU here: the CPU stands in for one, by
another answer to what family its devices are of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import csp_kernels as csp
from csp_kernels import winners
from csp_kernels.backends import resolve, selected
from csp_kernels.ops import _transforms
from csp_kernels.ops._node import TRITON_ALONE

FAMILY = "sm_90"
Plant = Callable[..., None]


def row(pixels: int = 2, channels: int = 3, **other: Any) -> dict[str, Any]:
    """[2, 8, 5, 5] is of class 2 (16 to 63 pixels), 3 (8 to 15 channels)."""
    kind = {"family": FAMILY, "operator": "dense_block", "dtype": "float32", "mode": "training", "caller": "eager"}
    return {**kind, "pixels": pixels, "channels": channels, **other}


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """plant(row, ...): these rows are the table, and tensors on the CPU are on a device of FAMILY."""
    monkeypatch.setattr(winners, "FILE", tmp_path / "winners.json")
    monkeypatch.setattr(winners, "family", lambda device: FAMILY)
    monkeypatch.setattr(_transforms, "resolve", lambda kind: "reference" if selected() == "auto" else resolve(kind))
    monkeypatch.setattr(_transforms, "_missing", lambda name, device: False)

    def write(*rows: dict[str, Any]) -> None:
        winners.write(rows)

    yield write
    winners.table.cache_clear()


class Calls(TorchDispatchMode):
    """Who was to run each call of an operator: "native", "triton"; none: the reference ran."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._opname in ("stage", "stage_backward"):
            self.found.append("triton" if args[-1] & TRITON_ALONE else "native")
            args = *args[:-1], args[-1] & ~TRITON_ALONE  # the CPU knows no Triton
        return func(*args, **(kwargs or {}))


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (2, 8, 5, 5), dtype=dtype).requires_grad_()


def ran(module: nn.Module, *inputs: Any, backward: bool = True) -> list[str]:
    with Calls() as calls:
        y = module(*inputs)
        if backward:
            y.sum().backward()
    return calls.found


def test_the_committed_table_can_be_read_and_is_as_it_would_be_written() -> None:
    winners.table.cache_clear()
    assert isinstance(winners.table(), dict)
    rows, text = json.loads(winners.FILE.read_text()), winners.FILE.read_text()
    assert text.count("\n") == (len(rows) + 2 if rows else 1)


def test_nothing_in_the_table_is_the_references(plant: Plant) -> None:
    plant()
    assert not ran(csp.DenseBlock(2, 8, 4), image())


@pytest.mark.parametrize(
    "ratios, expected",
    [
        ({"native": 1.2, "triton": 1.5}, ["triton"] * 2),
        ({"native": 1.5, "triton": 1.2}, ["native"] * 2),
        ({"native": 1.5}, ["native"] * 2),
        ({}, []),
    ],
    ids=str,
)
def test_the_fastest_runs_forward_and_backward(ratios: dict[str, float], expected: list[str], plant: Plant) -> None:
    plant(row(**ratios))
    assert ran(csp.DenseBlock(2, 8, 4), image()) == expected


def test_results_are_those_of_the_reference(plant: Plant) -> None:
    plant(row(triton=1.5))
    block, twin = csp.DenseBlock(2, 8, 4), csp.reference.DenseBlock(2, 8, 4)
    twin.load_state_dict(block.state_dict())
    x = image()
    assert ran(block, x) == ["triton"] * 2
    mine = x.grad
    x.grad = None
    assert not ran(twin, x)
    torch.testing.assert_close(mine, x.grad)


@pytest.mark.parametrize(
    "other",
    [
        {"family": "sm_80"}, {"operator": "concat_conv"}, {"dtype": "bfloat16"}, {"dtype": "tf32"},
        {"mode": "inference"}, {"caller": "compiled"}, {"pixels": 3}, {"pixels": 1}, {"channels": 2}, {"channels": 4},
    ],
    ids=str,
)  # fmt: skip
def test_rows_of_other_calls_do_not_count(other: dict[str, Any], plant: Plant) -> None:
    plant(row(native=2.0, **other))
    assert not ran(csp.DenseBlock(2, 8, 4), image())


def test_modes_and_types_are_told_apart(plant: Plant) -> None:
    plant(row(mode="inference", native=2.0), row(dtype="tf32", triton=2.0), row(dtype="bfloat16", native=2.0))
    block = csp.DenseBlock(2, 8, 4)
    with torch.no_grad():
        assert ran(block, image(), backward=False) == ["native"]
    assert not ran(block, image())
    torch.set_float32_matmul_precision("high")
    assert ran(block, image()) == ["triton"] * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert ran(block, image()) == ["native"] * 2


LAYERS: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "dense_block": (lambda: csp.DenseBlock(2, 8, 4), [image()]),
    "post_dense_block": (lambda: csp.PostDenseBlock(2, 8, 4), [image()]),
    "two_way_dense_block": (lambda: csp.TwoWayDenseBlock(2, 8, 4, 2), [image()]),
    "csp_stage": (lambda: csp.CSPDenseStage(8, 12, 2, 4, 2), [image()]),
    "concat_conv": (lambda: csp.ConcatConv([3, 5], 6), [[image(2, 3, 5, 5), image(2, 5, 5, 5)]]),
    "partial_transition": (lambda: csp.PartialTransition(3, 5, 4, 6), [image(2, 3, 5, 5), image(2, 5, 5, 5)]),
    "stage": (lambda: csp.Stage(csp.DenseBlock(2, 8, 4).graph), [image()]),
}


@pytest.mark.parametrize("operator", LAYERS)
def test_every_operator_asks_by_its_name_and_all_its_channels(operator: str, plant: Plant) -> None:
    plant(row(operator=operator, triton=2.0))
    build, inputs = LAYERS[operator]
    assert ran(build(), *inputs) == ["triton"] * 2
    assert not ran(csp.PostDenseBlock(2, 8, 4) if operator != "post_dense_block" else csp.DenseBlock(2, 8, 4), image())


def test_a_backend_that_is_not_available_leaves_its_place_to_the_next(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(row(native=2.0, triton=1.5))
    assert ran(csp.DenseBlock(2, 8, 4), image()) == ["native"] * 2
    monkeypatch.setattr(_transforms, "_missing", lambda name, device: name == "native")
    assert ran(csp.DenseBlock(2, 8, 4), image()) == ["triton"] * 2


def test_a_choice_comes_before_the_table(plant: Plant) -> None:
    plant(row(triton=2.0))
    block = csp.DenseBlock(2, 8, 4)
    with csp.use_backend("reference"):
        assert not ran(block, image())
    with csp.use_backend("native"):
        assert ran(block, image()) == ["native"] * 2


def test_backward_runs_as_forward_chose_whatever_is_chosen_then(plant: Plant) -> None:
    plant(row(triton=2.0))
    with Calls() as calls:
        y = csp.DenseBlock(2, 8, 4)(image())
        plant()
        csp.use_backend("native")
        y.sum().backward()
    assert calls.found == ["triton"] * 2


def test_transforms_and_empty_batches_stay_the_references(plant: Plant) -> None:
    plant(row(triton=2.0), row(pixels=0, triton=2.0))
    block = csp.DenseBlock(2, 8, 4).eval()
    with Calls() as calls:
        block(torch.empty(0, 8, 5, 5))
        torch.func.grad(lambda x: block(x).sum())(image().detach())
    assert not calls.found


def test_compiled_functions_have_rows_of_their_own(plant: Plant) -> None:
    """Constant when traced; a size of the same class needs no new graph, one of another class gets one."""
    plant(row(caller="compiled", triton=2.0), row(pixels=3, caller="compiled", native=2.0))
    graphs: list[list[str]] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        stages = [n for n in module.graph.nodes if "csp_kernels.stage" in str(n.target)]
        graphs.append(["triton" if n.args[-1] & TRITON_ALONE else "native" for n in stages])
        for n in stages:
            n.args = *n.args[:-1], n.args[-1] & ~TRITON_ALONE
        module.recompile()
        return module

    block = csp.DenseBlock(2, 8, 4)
    compiled = torch.compile(block, backend=keep, fullgraph=True, dynamic=True)
    small, large = image(2, 8, 5, 6), image(3, 8, 5, 6)  # 60 and 90 pixels
    for x in (small, large):
        torch.testing.assert_close(compiled(x), block(x))
        compiled(x).sum().backward()
    assert graphs == [["triton"], ["native"]]
    compiled(image(2, 8, 4, 7))
    compiled(image(4, 8, 6, 7))
    assert len(graphs) == 2
    assert not ran(block, image())


def test_classes() -> None:
    assert winners.shape_class(1, 1) == (0, 0) and winners.shape_class(3, 3) == (0, 1)
    assert winners.shape_class(4, 4) == (1, 2) and winners.shape_class(2**16 - 1, 127) == (7, 6)
    assert winners.shape_class(2**16, 128) == (8, 7)


def test_devices_without_kernels_have_no_family(monkeypatch: pytest.MonkeyPatch) -> None:
    assert winners.family(torch.device("cpu")) == "" == winners.family(torch.device("meta"))
    winners._family.cache_clear()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert winners.family(torch.device("cuda", 0)) == ""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9, index))
    winners._family.cache_clear()
    assert winners.family(torch.device("cuda", 0)) == "sm_90" and winners.family(torch.device("cuda", 1)) == "sm_91"
    winners._family.cache_clear()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "winners.json: .*; write it with benchmarks/gpu_report.py, or an empty one"),
        ("{}", "winners.json: got dict, expected a list of rows"),
        ('[{"family": "sm_90"}]', "winners.json: got the row .*, expected one as benchmarks/gpu_report.py writes it"),
    ],
)
def test_a_damaged_table_is_an_error(text: str, message: str, plant: Plant) -> None:
    winners.FILE.write_text(text)
    winners.table.cache_clear()
    with pytest.raises(ValueError, match=message):
        csp.DenseBlock(2, 8, 4)(image())


def test_what_is_written_is_read_and_a_line_a_row(plant: Plant) -> None:
    rows = [row(pixels=10, triton=1.5), row(pixels=9, native=2.0), row(pixels=9, channels=2)]
    plant(*rows)
    lines = winners.FILE.read_text().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == [rows[2], rows[1], rows[0]]
    assert winners.table() == {tuple(row().values())[:5]: {(9, 2): (), (9, 3): ("native",), (10, 3): ("triton",)}}


def test_in_words(plant: Plant) -> None:
    plant(row(native=2.0), row(pixels=3))
    assert winners.summary("sm_90").startswith("on sm_90 native or triton for 1 of 2 measured classes of calls")
    assert winners.summary("sm_80") == ("reference: nothing has been measured on sm_80 (winners.json has no row of it)")
