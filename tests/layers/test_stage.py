"""`csp.Stage` and `csp.check`: a graph as a module, against a network written by hand."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels.stage.build import Builder, conv_norm
from csp_kernels.stage.graph import Graph
from csp_kernels.vocabulary import RECOMPUTE


def osa(in_channels: int, width: int, layers: int, out_channels: int, drop_rate: float = 0.0) -> Graph:
    """One-shot aggregation (VoVNet, arXiv 1904.09730), and its averages as a second output."""
    build = Builder(in_channels)
    features = [build.read(0)]
    for i in range(layers):
        features.append(conv_norm(build, features[-1:], width, 3, prefix=f"layers.{i}."))
    joined = build.conv(features, out_channels, name="concat.conv")
    down = build.conv([build.read(joined, build.norm(out_channels, "concat.norm"), "relu")], 8, pool=True, name="down")
    build.write([build.read(joined, 3, "relu")])
    build.write([build.read(down, build.norm(8, "last"), "silu")])
    return build.graph()


class Naive(nn.Module):
    """The same in PyTorch's words."""

    def __init__(self, in_channels: int, width: int, layers: int, out_channels: int) -> None:
        super().__init__()
        widths = [in_channels, *[width] * layers]
        self.layers = nn.ModuleList(self.unit(a, width, 3) for a in widths[:-1])
        self.concat = self.unit(sum(widths), out_channels, 1)
        self.down = nn.Conv2d(out_channels, 8, 1, bias=False)
        self.last = nn.BatchNorm2d(8)

    @staticmethod
    def unit(a: int, b: int, kernel: int) -> nn.ModuleDict:
        return nn.ModuleDict(
            {"conv": nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False), "norm": nn.BatchNorm2d(b)}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = [x]
        for unit in self.layers:
            features.append(F.relu(unit["norm"](unit["conv"](features[-1]))))
        y = F.relu(self.concat["norm"](self.concat["conv"](torch.cat(features, 1))))
        return y, F.silu(self.last(self.down(F.avg_pool2d(y, 2))))


def pair(recompute: str = "none") -> tuple[csp.Stage, Naive]:
    stage = csp.Stage(osa(20, 17, 3, 24), recompute=recompute).double()
    naive = Naive(20, 17, 3, 24).double()
    for p in naive.parameters():
        nn.init.normal_(p, mean=p.dim() == 1, std=0.3)
    stage.load_state_dict(naive.state_dict())
    return stage, naive


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("train", [True, False])
def test_equals_the_network_by_hand(recompute: str, train: bool, native: None) -> None:
    """Outputs, gradients, running statistics: of norms over different numbers of pixels too."""
    stage, naive = (m.train(train) for m in pair(recompute))
    x = torch.randn(2, 20, 9, 10, dtype=torch.float64)
    results = []
    for module in (stage, naive):
        leaf = x.clone().requires_grad_()
        outputs = module(leaf)
        sum((y * torch.arange(y.numel()).view_as(y).cos()).sum() for y in outputs).backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        results.append([*outputs, leaf.grad, *(grads[n] for n in sorted(grads)), *module.state_dict().values()])
    assert list(stage.state_dict()) == list(naive.state_dict())
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_keeps_what_it_must(native: None) -> None:
    """A step keeps raw values of convolutions, and neither concatenation, norms nor activations."""
    stage, naive = (m.float() for m in pair())
    x = torch.randn(2, 20, 8, 8).contiguous(memory_format=torch.channels_last)

    def saved(module: nn.Module) -> int:
        return csp.analysis.saved_bytes(lambda: module(x), [x, *module.parameters(), *module.buffers()])

    pixels = 2 * 64
    values = pixels * (64 + 32) + pixels // 4 * 16  # of 3 x 17, 24 and 8 channels, padded to multiples of 16
    columns = 3 * 17 + 24 + 8
    assert saved(stage) == values * 4 + 2 * columns * 8
    assert saved(stage) * 2 < saved(naive)


def test_dropout_in_training_alone() -> None:
    build = Builder(8)
    build.write([build.read(build.conv([build.read(0)], 8, 3, drop_rate=0.5))])
    stage = csp.Stage(build.graph())
    x = torch.randn(2, 8, 16, 16)
    assert 0.4 < (stage(x) == 0).float().mean().item() < 0.6
    assert not (stage.eval()(x) == 0).any()


def test_a_norm_that_is_frozen(native: None) -> None:
    stage, naive = pair()
    for module in (stage, naive):
        module.layers[1]["norm"].eval() if module is naive else stage.get_submodule("layers.1.norm").eval()
    x = torch.randn(2, 20, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(stage(x), naive(x), rtol=1e-9, atol=1e-10)
    assert stage.get_submodule("layers.1.norm").num_batches_tracked == 0
    assert stage.get_submodule("layers.0.norm").num_batches_tracked == 1


def test_frozen_parameters_have_no_gradient(native: None) -> None:
    stage, _ = pair()
    stage.requires_grad_(False)
    stage.last.weight.requires_grad_(True)
    _, z = stage(torch.randn(2, 20, 8, 8, dtype=torch.float64))
    z.square().sum().backward()
    assert [n for n, p in stage.named_parameters() if p.grad is not None] == ["last.weight"]


def test_copies_and_pickles() -> None:
    stage, _ = pair()
    stage.eval()
    x = torch.randn(1, 20, 8, 8, dtype=torch.float64)
    for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        assert torch.equal(other(x)[0], stage(x)[0])


def test_says_what_it_cannot_run() -> None:
    build = Builder(8)
    build.write([build.read(build.conv([build.read(0)], 8, groups=2))])
    stage, x = csp.Stage(build.graph()), torch.randn(1, 8, 4, 4)
    with pytest.warns(RuntimeWarning, match="csp.Stage runs its plain PyTorch reference: v1 has groups"):
        stage(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stage(x)  # said once
    csp.use_backend("native")
    with pytest.raises(RuntimeError, match="v1 has groups"):
        stage(x)


class Loud(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "kind": (lambda s: setattr(s, "last", nn.SyncBatchNorm(8).double()), "last is a SyncBatchNorm, not a BatchNorm2d"),
    "forward": (lambda s: setattr(s, "last", Loud(8).double()), "last is a Loud, not a BatchNorm2d"),
    "stride": (lambda s: setattr(s.down, "stride", (2, 2)), "down has another stride"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_children_that_would_do_something_else(name: str) -> None:
    """Nobody calls them: said before any work."""
    stage, _ = pair()
    change, message = CHANGES[name]
    change(stage)
    before = {k: v.clone() for k, v in stage.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"csp.Stage: {message}"):
        stage(torch.randn(1, 20, 8, 8, dtype=torch.float64))
    assert all(torch.equal(v, before[k]) for k, v in stage.state_dict().items())


HOOKED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "norm": (lambda s: s.last.register_forward_hook(lambda *_: None), "last has a forward hook"),
    "convolution": (lambda s: s.down.register_full_backward_hook(lambda *_: None), "down has a backward hook"),
    "level": (lambda s: s.concat.register_forward_pre_hook(lambda *_: None), "concat has a forward hook"),
}


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_that_nobody_calls(name: str) -> None:
    """Said once; networks under tools that hook every module still run."""
    stage, _ = pair()
    hook, message = HOOKED[name]
    hook(stage)
    x = torch.randn(1, 20, 8, 8, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=f"csp.Stage: {message}, which is not called"):
        stage(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stage(x)


def test_what_a_network_with_a_stage_costs() -> None:
    """csp.analysis hooks every module that is called."""
    network = nn.Sequential(nn.Conv2d(3, 20, 3), pair()[0].float())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        total = csp.analysis.profile(network, (2, 3, 16, 16)).total
    assert total["flops"] > 0 and total["dram_bytes_fused"] < total["dram_bytes_naive"]


def test_a_parametrized_convolution(native: None) -> None:
    """Its weight is computed anew at each call."""
    stage, naive = pair()
    for conv in (stage.down, naive.down):
        nn.utils.parametrizations.weight_norm(conv)
    x = torch.randn(2, 20, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(stage(x), naive(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: csp.Stage(osa(4, 4, 3, 4), recompute="some"), "recompute: got 'some'"),
        (lambda: csp.Stage(Graph((), (), (), (), ())), "inputs: got"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_check_agrees(dtype: torch.dtype, native: None) -> None:
    verdict = csp.check(
        pair()[0].to(torch.float64 if dtype == torch.float64 else torch.float32), torch.randn(2, 20, 9, 9).to(dtype)
    )
    assert verdict, str(verdict)
    names = [item.name for item in verdict.items]
    assert {"output 1", "gradient of input 0", "gradient of last.bias", "last.running_var"} <= {*names}
    assert str(verdict).startswith("backend 'native' against the reference")


@pytest.mark.parametrize("part", [0, 1, 2])
def test_check_sees_a_wrong_number(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output, a gradient or a statistic that is off by one part in a thousand."""
    module = sys.modules["csp_kernels.ops.stage"]
    real = module.run

    def wrong(*arguments: Any, **options: Any) -> Any:
        y, moments = real(*arguments, **options)
        if part == 0:
            y = [t * 1.001 for t in y]
        elif part == 1:
            y = [t + (t - t.detach()) * 1e-3 for t in y]
        return y, moments._replace(stats=moments.stats * 1.001) if part == 2 else moments

    monkeypatch.setattr(module, "run", wrong)
    verdict = csp.check(pair()[0].float(), torch.randn(2, 20, 9, 9))
    assert not verdict
    assert "DIFFERS" in str(verdict)
    kinds = {item.name.split()[0] for item in verdict.items if not item.agrees}
    assert ("output" in kinds, "gradient" in kinds, bool(kinds - {"output", "gradient"})) == (
        part == 0, part < 2, part == 2,
    )  # fmt: skip


def test_check_refuses_dropout() -> None:
    """No two calls drop the same: it would allow anything."""
    with pytest.raises(ValueError, match="dropout that is on in itself"):
        csp.check(csp.Stage(osa_with_dropout()), torch.randn(2, 8, 9, 9))
    with pytest.raises(ValueError, match="dropout that is on in 1,"):
        csp.check(nn.Sequential(nn.ReLU(), csp.DenseBlock(1, 8, 4, drop_rate=0.5)), torch.randn(2, 8, 9, 9))
    assert csp.check(csp.Stage(osa_with_dropout()).eval(), torch.randn(2, 8, 9, 9))


def osa_with_dropout() -> Graph:
    build = Builder(8)
    build.write([build.read(build.conv([build.read(0)], 8, 3, drop_rate=0.5))])
    return build.graph()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_check_of_what_is_zero_but_for_rounding(dtype: torch.dtype, native: None) -> None:
    """The gradient of a bias in front of another norm, and the mean of what a norm has centred."""
    build = Builder(16)
    value = build.conv([build.read(0, build.norm(16))], 16)
    build.write([build.read(value, build.norm(16), "relu")])
    verdict = csp.check(csp.Stage(build.graph()).to(dtype), torch.randn(2, 16, 6, 6).to(dtype))
    assert verdict, str(verdict)


def test_check_without_gradients_and_of_lists(native: None) -> None:
    x = torch.randn(2, 8, 6, 6)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert csp.check(csp.ConcatConv([8, 8], 8), [x, x])
    assert csp.check(csp.PartialTransition(0, 8, 8, 8), None, x)


def test_one_norm_fails_and_none_has_moved() -> None:
    """Norms over different numbers of pixels advance together or not at all."""
    stage, _ = pair()
    stage.last.register_buffer("running_mean", torch.zeros(9).double())
    before = {k: v.clone() for k, v in stage.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"running_mean: got torch.float64 \[9\], expected .* \[8\]"):
        stage(torch.randn(2, 20, 8, 8, dtype=torch.float64))
    assert all(torch.equal(v, before[k]) for k, v in stage.state_dict().items())


def test_vmap_in_evaluation() -> None:
    stage, naive = (m.eval() for m in pair())
    x = torch.randn(3, 2, 20, 8, 8, dtype=torch.float64)
    for ours, theirs in zip(torch.func.vmap(stage)(x), torch.func.vmap(naive)(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_torch_fx_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"csp.Stage: torch\.fx cannot record it"):
        torch.fx.symbolic_trace(nn.Sequential(pair()[0]))


@pytest.mark.parametrize("name", ["training", "forward", "conv..x", "graph"])
def test_names_that_modules_use(name: str) -> None:
    build = Builder(8)
    build.write([build.read(build.conv([build.read(0)], 8, name=name))])
    with pytest.raises(ValueError, match="name "):
        csp.Stage(build.graph())


def test_check_needs_tensors() -> None:
    with pytest.raises(TypeError, match="inputs: got none"):
        csp.check(pair()[0])
