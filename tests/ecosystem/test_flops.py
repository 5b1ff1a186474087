"""FlopCounterMode and the compiler's memory budget see the multiplications inside the fused operators."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from modes import outputs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import csp_kernels as csp
from csp_kernels.ops.flops import FORMULAS
from csp_kernels.stage.dense_block import dense_block

pytestmark = pytest.mark.usefixtures("native")

N, H, W = 2, 5, 7  # odd: pooling drops a row and a column
POOLED = Fraction((H // 2) * (W // 2), H * W)
BLOCKS: dict[str, tuple[Any, ...]] = {
    "DenseBlock": (3, 10, 6),
    "PostDenseBlock": (3, 10, 6),
    "TwoWayDenseBlock": (3, 10, 6, 2),
}


def image(channels: int, wanted: bool = True) -> Tensor:
    return torch.randn(N, channels, H, W, requires_grad=wanted)


def counted(module: nn.Module, inputs: list[Any], backward: bool = True) -> tuple[int, int, dict[str, int]]:
    """FLOPs of forward, of backward, and forward by the name of each module."""
    module = copy.deepcopy(module)
    with FlopCounterMode(display=False) as forward:
        results = outputs(module, inputs)
    counts = {name: sum(ops.values()) for name, ops in forward.get_flop_counts().items()}
    with FlopCounterMode(display=False) as rest:
        if backward:
            sum(y.square().sum() for y in results).backward()
    return forward.get_total_flops(), rest.get_total_flops(), counts


def check_same(ours: nn.Module, naive: nn.Module, inputs: Callable[[], list[Any]]) -> None:
    """The reference's count exactly, in training, frozen, and in inference."""
    for change in (lambda m: m.train(), lambda m: m.eval()):
        change(ours), change(naive)
        expected = counted(naive, inputs())[:2]
        assert expected[0] > 0 and expected[1] == 2 * expected[0]
        assert counted(ours, inputs())[:2] == expected
    with torch.no_grad():
        assert counted(ours, inputs(), backward=False)[0] == expected[0]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    check_same(getattr(csp, name)(*BLOCKS[name]), getattr(csp.reference, name)(*BLOCKS[name]), lambda: [image(10)])


@pytest.mark.parametrize("sizes", [([10], 7), ([10, 4, 3], 7), ([10], [3, 4])])
def test_concat_conv(sizes: tuple[list[int], Any]) -> None:
    check_same(csp.ConcatConv(*sizes), csp.reference.ConcatConv(*sizes), lambda: [[image(c) for c in sizes[0]]])


STAGES = [("pre", "csp"), ("pre", "first"), ("pre", "last"), ("post", "csp"), ("post", "first"), ("two_way", "last")]


def pooled_before_product(counts: dict[str, int], owner: str, fusion: str, order: str, pool: str | None) -> Fraction:
    """What pooling in front of the last product saves of the reference's forward count."""
    last = f"{owner}.t.conv" if fusion == "last" else f"{owner}.u.conv"
    return (1 - POOLED) * counts[last] if order == "pre" and pool else Fraction()


@pytest.mark.parametrize("pool", ["avg", None])
@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("fusion", ["csp", "first", "last"])
@pytest.mark.parametrize("part", [6, 0])
def test_partial_transition(part: int, fusion: str, order: str, pool: str | None) -> None:
    """The reference's count, less what is pooled before it is multiplied."""
    arguments = part, 10, 9, part + 9 if fusion == "last" else 12
    options = {"fusion": fusion, "order": order, "pool": pool}
    ours = csp.PartialTransition(*arguments, **options)
    naive = csp.reference.PartialTransition(*arguments, **options)
    inputs = [image(part) if part else None, image(10)]
    forward, backward, counts = counted(naive, inputs)
    saved = pooled_before_product(counts, "PartialTransition", fusion, order, pool)
    assert counted(ours, inputs)[:2] == (forward - saved, backward - 2 * saved)


@pytest.mark.parametrize("pool", ["avg", None])
@pytest.mark.parametrize(("layer", "fusion"), STAGES)
def test_stage(layer: str, fusion: str, pool: str | None) -> None:
    options = {"layer": layer, "fusion": fusion, "pool": pool, "bn_size": 2}
    ours = csp.CSPDenseStage(20, 24, 2, 6, **options)
    naive = csp.reference.CSPDenseStage(20, 24, 2, 6, **options)
    forward, backward, counts = counted(naive, [image(20)])
    saved = pooled_before_product(counts, "CSPDenseStage.transition", fusion, "pre" if layer == "pre" else "post", pool)
    assert counted(ours, [image(20)])[:2] == (forward - saved, backward - 2 * saved)


@pytest.mark.parametrize("split", ["conv", "slice"])
def test_residual_stage(split: str) -> None:
    ours = csp.CSPStage(12, 16, 1, split=split)
    with csp.use_backend("reference"):
        expected = counted(ours, [image(12)])[:2]
    assert counted(ours, [image(12)])[:2] == expected


def test_transition_pools_before_its_product() -> None:
    ours, naive = csp.Transition(12, 8), csp.reference.Transition(12, 8)
    forward, backward, _ = counted(naive, [image(12)])
    assert counted(ours, [image(12)])[:2] == (forward * POOLED, backward * POOLED)


@pytest.mark.parametrize(
    ("layer", "again"),
    [
        ("pre", ["conv1"]),
        ("post", ["conv1"]),
        ("two_way", ["branch1.conv1", "branch2.conv1", "branch2.conv2"]),
    ],
)
def test_recomputed_products_count_again(layer: str, again: list[str]) -> None:
    """recompute="bottleneck" runs all but the last product of each branch a second time."""
    arguments, options = (20, 24, 2, 6), {"layer": layer, "pool": None, "bn_size": 2}
    forward, backward, counts = counted(csp.reference.CSPDenseStage(*arguments, **options), [image(20)])
    extra = sum(
        n for name, n in counts.items() if any(f"denselayer{i}.{conv}" in name for i in (1, 2) for conv in again)
    )
    lean = csp.CSPDenseStage(*arguments, **options, recompute="bottleneck")
    assert extra > 0 and counted(lean, [image(20)])[:2] == (forward, backward + extra)
    if layer == "pre":
        forward, backward, counts = counted(csp.reference.DenseBlock(2, 10, 6), [image(10)])
        extra = sum(n for name, n in counts.items() if name.endswith("conv1"))
        assert counted(csp.DenseBlock(2, 10, 6, recompute="bottleneck"), [image(10)])[:2] == (forward, backward + extra)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("frozen", ["x", "parameters", "x and norms"])
def test_unwanted_gradients_are_left_out(name: str, frozen: str) -> None:
    """Those that autograd leaves out of plain layers, and those of slices: naive layers read a concatenation."""
    counts = []
    for library in (csp, csp.reference):
        block = getattr(library, name)(*BLOCKS[name])
        for module in block.modules() if "norms" in frozen else ():
            module.requires_grad_(not isinstance(module, nn.BatchNorm2d))
        block.requires_grad_(frozen != "parameters") if frozen == "parameters" else None
        counts.append(counted(block, [image(10, wanted="x" not in frozen)])[:2])
    (forward, backward), (naive_forward, naive_backward) = counts
    assert forward == naive_forward and forward <= backward <= naive_backward
    assert backward < 2 * forward or (frozen, name) == ("x", "DenseBlock")  # its norms behind x want their gradients


def test_concat_conv_leaves_out_unwanted_inputs() -> None:
    module, channels = csp.ConcatConv([10, 4], 7), (10, 4)
    for wanted in ((True, True), (True, False), (False, False)):
        forward, backward, _ = counted(module, [[image(c, w) for c, w in zip(channels, wanted, strict=True)]])
        read = sum(c for c, w in zip(channels, wanted, strict=True) if w)
        assert forward == 2 * N * H * W * 14 * 7 and backward == forward + 2 * N * H * W * read * 7


@pytest.mark.parametrize("name", ["densenet_digits", "csp_peleenet_digits"])
def test_network_counts_as_with_plain_layers(name: str) -> None:
    """A step of a whole network is what its layers cost as the reference."""
    model = getattr(csp.models, name)()
    x = torch.randn(2, 1, 28, 28)
    with csp.use_backend("reference"):
        expected = counted(model, [x])[:2]
    assert counted(model, [x])[:2] == expected


def test_any_stage() -> None:
    """A dense block's graph counts as the dense block; frozen weights take their half of backward away."""
    stage = csp.Stage(dense_block(3, 10, 6, 24))
    naive = csp.reference.DenseBlock(3, 10, 6)
    check_same(stage, naive, lambda: [image(10)])
    forward, backward, _ = counted(stage, [image(10)])
    stage.requires_grad_(False)
    assert counted(stage, [image(10)])[:2] == (forward, backward // 2)


def test_every_operator_that_multiplies_has_a_formula() -> None:
    """Those without: what the library says of itself."""
    names = {
        schema.name.partition("::")[2] for schema in torch._C._jit_get_all_schemas() if "csp_kernels::" in schema.name
    }
    silent = {"cpu_isa", "cpu_isas", "cuda_architectures", "cuda_error", "conv3x3_unsupported", "dense_layer_wins"}
    silent |= {"empty_cache", "scratch_bytes", "update_running"}
    assert names - silent == set(FORMULAS)
    assert all(getattr(torch.ops.csp_kernels, name) in flop_registry for name in FORMULAS)


def test_parts_of_gpu_operators() -> None:
    """By shapes alone: these run on a GPU."""
    ops, n, b, g, k = torch.ops.csp_kernels, 30, 16, 8, 24
    z, w, features = torch.empty(n, b), torch.empty(g, b, 3, 3), torch.empty(n, k)
    for name in ("conv3x3_dgrad", "conv3x3_wgrad"):
        assert flop_registry[getattr(ops, name)](features, z, [], w, z, [], out_val=z) == 2 * n * 9 * b * g
    assert flop_registry[ops.conv3x3_forward](z, [], w, features, out_val=None) == 2 * n * 9 * b * g
    layer = flop_registry[ops.dense_layer](
        features, [], torch.empty(b, k, 1, 1), [], w, features, [1, 5, 6], out_val=None
    )
    assert layer == 2 * n * (k * b + 9 * b * g)


@pytest.mark.parametrize("name", BLOCKS)
def test_memory_budget_weighs_the_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled with half of the activations: the partitioner asks for our FLOPs, gradients are eager's."""
    op = torch.ops.csp_kernels.stage
    asked, formula = [], flop_registry[op]

    def recorded(*arguments: Any, **named: Any) -> int:
        asked.append(formula(*arguments, **named))
        return asked[-1]

    monkeypatch.setitem(flop_registry, op, recorded)
    block, head = getattr(csp, name)(*BLOCKS[name]).double(), nn.Conv2d(28, 4, 1).double()
    model = nn.Sequential(nn.Conv2d(10, 10, 3, padding=1).double(), block, nn.ReLU(), head)
    x = torch.randn(N, 10, H, W, dtype=torch.float64)
    twin = copy.deepcopy(model)
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
        compiled(x).square().sum().backward()
    twin(x).square().sum().backward()
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-10, atol=1e-10)
    assert counted(twin[1], [x])[0] in asked
