"""The networks: published parameters and FLOPs, other libraries' weights, one training step, both backends."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels import models
from csp_kernels.models.timm_keys import from_timm

pytestmark = pytest.mark.usefixtures("one_thread")  # small maps: more threads would only wait for each other

NETWORKS = sorted(name for name in models.__all__ if name.islower() and callable(getattr(models, name)))
SMALL = [name for name in NETWORKS if not name.endswith(("161", "169", "201"))]  # the rest is more of the same
FUSED = [name for name in SMALL if "csp" in name or "dense" in name or "pelee" in name]

# network, size, M weights and GFLOP as printed by the paper's authors (convolutions and pooling windows)
PUBLISHED = (
    ("resnet10", 256, "5.24", "2.273"),
    ("resnet50", 256, "22.73", "9.74"),
    ("csp_resnet50", 256, "21.57", "8.97"),
    ("resnext50", 256, "22.19", "10.11"),
    ("csp_resnext50", 256, "20.50", "7.93"),
    ("darknet53", 256, "41.57", "18.57"),
    ("csp_darknet53", 256, "27.61", "13.07"),
    ("peleenet", 224, "2.79", "1.017"),
)
# M parameters with norms and biases, GFLOP of the convolutions; torchvision's and darknet's configurations
COMPUTED = (
    ("densenet121", 224, "7.979", "5.668"),
    ("densenet169", 224, "14.149", "6.720"),
    ("densenet201", 224, "20.014", "8.583"),
    ("csp_resnet50", 256, "21.608", "8.967"),
    ("csp_resnext50", 256, "20.557", "7.929"),
    ("csp_darknet53", 256, "27.642", "13.067"),
)
# network, options, size, M weights and GFLOP of the paper, allowed differences; no configuration exists
# (part_ratio 0.25: the paper has only "3 % fewer FLOPs"; the weights are those of the same definition)
UNPUBLISHED: tuple[tuple[str, dict[str, Any], int, float, float, float, float], ...] = (
    ("csp_peleenet", {}, 224, 2.83, 0.888, 0.02, 0.02),
    ("csp_peleenet", {"part_ratio": 0.25}, 224, 3.214, 0.986, 0.01, 0.02),
    ("csp_resnet10", {}, 256, 2.73, 1.905, 0.30, 0.08),
)


def build(name: str, **options: Any) -> models.Network:
    return getattr(models, name)(**options)


def images(name: str, size: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    channels, size = (1, 28) if "digits" in name else (3, size)
    return torch.randn(batch, channels, size, size, dtype=dtype)


def costs(name: str, size: int, **options: Any) -> dict[str, int]:
    with torch.device("meta"):
        model = build(name, **options)
    return csp.analysis.profile(model, (2, 3, size, size)).total


def printed(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize(("name", "size", "weights", "flops"), PUBLISHED)
def test_published_numbers(name: str, size: int, weights: str, flops: str) -> None:
    """Equal to every printed digit."""
    total = costs(name, size)
    got = printed(total["weights"] / 1e6, weights), printed((total["flops"] + total["pool_flops"]) / 2e9, flops)
    assert got == (weights, flops)


@pytest.mark.parametrize(("name", "size", "params", "flops"), COMPUTED)
def test_numbers_of_the_configurations(name: str, size: int, params: str, flops: str) -> None:
    total = costs(name, size)
    assert (printed(total["params"] / 1e6, params), printed(total["flops"] / 2e9, flops)) == (params, flops)


@pytest.mark.parametrize(("name", "options", "size", "weights", "flops", "more", "work"), UNPUBLISHED)
def test_unpublished_networks_come_close(
    name: str, options: dict[str, Any], size: int, weights: float, flops: float, more: float, work: float
) -> None:
    total = costs(name, size, **options)
    got = total["weights"] / 1e6, (total["flops"] + total["pool_flops"]) / 2e9
    print(f"{name} {options}: {got[0]:.3f} M weights, paper {weights}; {got[1]:.3f} GFLOP, paper {flops}")
    assert got[0] == pytest.approx(weights, rel=more)
    assert got[1] == pytest.approx(flops, rel=work)


@pytest.mark.parametrize("depth", [121, 161, 169, 201])
def test_csp_densenet_costs_less_traffic(depth: int) -> None:
    plain, partial = costs(f"densenet{depth}", 224), costs(f"csp_densenet{depth}", 224)
    assert partial["flops"] < plain["flops"] and partial["cio"] < plain["cio"]
    assert partial["params"] < 1.07 * plain["params"]


@pytest.mark.parametrize(("name", "stages"), [("resnet50", 1), ("resnext50", 1), ("darknet53", 1), ("csp_resnet10", 1)])
def test_plain_stages_are_fused(name: str, stages: int) -> None:
    """As csp.fuse does it: by the class, which a pickle does not show; outputs are those of the plain modules."""
    model = build(name, num_classes=10).double().eval()
    assert len(csp.fuse(model).fused) == stages
    x = images(name, 64, 2, torch.float64)
    ours = model(x)
    assert_same(ours, csp.unfuse(model)(x))


@pytest.mark.parametrize("depth", [121, 161, 169, 201])
def test_torchvision_keys(depth: int) -> None:
    with torch.device("meta"):
        ours, theirs = build(f"densenet{depth}"), getattr(torchvision.models, f"densenet{depth}")()
    mine = {key: t.shape for key, t in ours.state_dict().items()}
    assert list(mine.items()) == [(key, t.shape) for key, t in theirs.state_dict().items()]


def scatter(model: nn.Module) -> None:
    """Norms as after some training."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.1)
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)


@pytest.mark.parametrize("training", [False, True])
def test_torchvision_outputs(training: bool) -> None:
    theirs = torchvision.models.densenet121(num_classes=10).double()
    scatter(theirs)
    ours = build("densenet121", num_classes=10).double()
    ours.load_state_dict(theirs.state_dict())
    x = images("densenet121", 48, 4, torch.float64)
    assert_same(ours.train(training)(x), theirs.train(training)(x))
    assert_same(ours.features.norm5.running_var, theirs.features.norm5.running_var)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("csp_resnet50", "cspresnet50"), ("csp_resnext50", "cspresnext50"), ("csp_darknet53", "cspdarknet53")],
)
def test_timm_outputs(name: str, theirs: str) -> None:
    """timm's weights give timm's logits and maps."""
    other = timm.create_model(theirs, num_classes=10).double().eval()
    scatter(other)
    ours = build(name, num_classes=10, variant="timm").double().eval()
    ours.load_state_dict(from_timm(other.state_dict()))
    x = images(name, 64, 2, torch.float64)
    assert_same(ours(x), other(x))
    assert_same(ours.features(x)[-1], other.forward_features(x))


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


@pytest.mark.parametrize("name", SMALL)
def test_trains_and_evaluates(name: str) -> None:
    """One step changes every parameter; features are the pyramid they say."""
    csp.use_backend("reference")
    model, x = build(name, num_classes=7), images(name, 64)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = nn.functional.cross_entropy(model(x), torch.tensor([1, 5]))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    after = model.state_dict()
    unchanged = [key for key, value in before.items() if torch.equal(value, after[key])]
    assert not unchanged
    model.eval()
    with torch.no_grad():
        maps = model.features(x)
        assert [m.shape[1] for m in maps] == list(model.channels)
        assert [x.shape[2] // m.shape[2] for m in maps] == list(model.strides)
        assert model(x).shape == (2, 7)
        if "digits" not in name:
            assert model(images(name, 53)).isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_any_size_and_channels(name: str) -> None:
    with torch.device("meta"):
        model = build(name, in_channels=5).eval()
        classes = 10 if "digits" in name else 1000
        for height, width in ((33, 40), (224, 224), (95, 61)):
            assert model(torch.randn(1, 5, height, width)).shape == (1, classes)


@pytest.mark.parametrize("name", FUSED)
def test_native_equals_reference(name: str, native: None) -> None:
    """Logits, gradients and running statistics of a training step in float64 agree to rounding."""
    model = build(name, num_classes=7).double()
    x = images(name, 64, 2, torch.float64)
    results = []
    for backend in ("reference", "native"):
        torch.manual_seed(3)
        twin = copy.deepcopy(model)
        with csp.use_backend(backend):
            y = twin(x)
            nn.functional.cross_entropy(y, torch.tensor([1, 5])).backward()
            results.append((y, dict(twin.named_parameters()), dict(twin.named_buffers())))
    (expected, theirs, old), (y, mine, new) = results
    assert_same(y, expected)
    for key, p in theirs.items():
        a, b = mine[key].grad, p.grad
        assert a is not None and b is not None
        assert (a - b).norm() <= 1e-6 * b.norm() + 1e-9, key
    for key, value in old.items():
        torch.testing.assert_close(new[key], value, rtol=1e-9, atol=1e-9)


def test_the_choice_of_backend_reaches_every_dense_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """csp_peleenet runs four fused stages."""
    csp.use_backend("reference")
    calls: list[str] = []
    network = build("csp_peleenet").eval()
    stage = csp.layers.CSPDenseStage
    forward = stage.forward
    monkeypatch.setattr(stage, "forward", lambda self, x: calls.append(self.layer) or forward(self, x))
    network(images("csp_peleenet", 32))
    assert calls == ["two_way"] * 4


def test_part_ratio_and_fusion() -> None:
    csp.use_backend("reference")
    for fusion in ("csp", "first", "last"):
        for name in ("csp_densenet_digits", "csp_peleenet_digits"):
            model = build(name, part_ratio=0.25, fusion=fusion)
            assert model.features.stage1.part_channels == 8
            assert model(images(name, 28)).shape == (2, 10)


def test_digit_networks_are_small() -> None:
    for name in NETWORKS:
        if "digits" in name:
            assert sum(p.numel() for p in build(name).parameters()) < 500_000


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_classes: got 0"):
        build("peleenet_digits", num_classes=0)
    for name in ("csp_resnet50", "csp_darknet53"):
        with pytest.raises(ValueError, match="variant: got 'tim', expected one of darknet, timm"):
            build(name, variant="tim")


def test_mish_backbone() -> None:
    """YOLOv4's: every activation is Mish."""
    with torch.device("meta"):
        model = build("csp_darknet53", act="mish")
    assert not any(isinstance(m, nn.LeakyReLU) for m in model.modules())
    assert {m.act for m in model.modules() if isinstance(m, csp.ConcatConv)} == {"mish"}
