"""What people do with a network after csp.fuse, or before it: it computes what the plain one does."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import calls, compare, image, pair, step
from networks import ConvNorm, Lists, Net
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import csp_kernels as csp

HERE = Path(__file__).resolve().parent
RAN_PLAIN = "runs as it was before"


@contextmanager
def silent() -> Iterator[None]:
    """Without the warnings that something runs as it was before."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="csp.fuse: ")
        yield


def same(ours: nn.Module, plain: nn.Module, x: Tensor, prefix: str = "") -> int:
    """In training and in inference the same outputs, gradients and state; how many stages ran in training."""
    count = 0
    for mode in (False, True):
        found: dict[str, Tensor] = {}
        expected = step(plain.train(mode), x)
        with silent():
            count = calls(lambda found=found, mode=mode: found.update(step(ours.train(mode), x)))  # type: ignore[misc]
        found = {name.replace(prefix, ""): t for name, t in found.items()}
        assert found.keys() == expected.keys()
        compare(found, expected)
    return count


def changed(change: Callable[[Any], Any], order: str) -> tuple[nn.Module, nn.Module]:
    """A Net and its fused copy after a change. order: of the change and csp.fuse, "then" with a call in between."""
    plain, ours, _ = pair(Net)
    x = image(3)
    if order == "change, fuse":
        csp.unfuse(ours)
    if order == "fuse, call, change":
        ours(x)
        plain(x)
    made = [change(m) for m in (plain, ours)]
    plain, ours = (m if new is None else new for m, new in zip((plain, ours), made, strict=True))
    if order == "change, fuse":
        csp.fuse(ours)
    return plain, ours


ORDERS = ("fuse, change", "fuse, call, change", "change, fuse")


def weight_norm(m: Net) -> None:
    for conv in (m.stage.first.conv, m.body.conv2):
        parametrizations.weight_norm(conv)


def spectral_norm(m: Net) -> None:
    torch.manual_seed(0)
    for conv in (m.stage.first.conv, m.body.conv2):
        parametrizations.spectral_norm(conv)  # it changes buffers whenever somebody reads the weight in training


def weight_norm_by_a_hook(m: Net) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(m.stage.first.conv)


def spectral_norm_by_a_hook(m: Net) -> None:
    torch.manual_seed(0)
    torch.nn.utils.spectral_norm(m.stage.first.conv)


def parametrized_and_back(m: Net) -> None:
    weight_norm(m)
    m(image(3))
    for conv in (m.stage.first.conv, m.body.conv2):
        parametrize.remove_parametrizations(conv, "weight")


def pruned(m: Net) -> None:
    prune.l1_unstructured(m.stage.first.conv, "weight", amount=0.3)
    prune.ln_structured(m.body.conv2, "weight", amount=0.5, n=2, dim=0)


def pruned_for_good(m: Net) -> None:
    pruned(m)
    m(image(3))
    prune.remove(m.stage.first.conv, "weight")
    prune.remove(m.body.conv2, "weight")


def sparse_norm(m: Net) -> None:
    prune.random_unstructured(m.stage.first.bn, "weight", amount=0.0)


def frozen_norms_of_torchvision(m: Net) -> None:
    kind = pytest.importorskip("torchvision").ops.FrozenBatchNorm2d
    for parent in [*m.modules()]:
        for name, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                frozen = kind(norm.num_features).double()
                frozen.load_state_dict(norm.state_dict())
                setattr(parent, name, frozen)


def half_frozen(m: Net) -> None:
    for i, p in enumerate(m.parameters()):
        p.requires_grad_(i % 2 == 0)


def frozen_backbone(m: Net) -> None:
    m.requires_grad_(False).head.requires_grad_(True)


def assigned(m: Net) -> None:
    m.load_state_dict(
        {name: t * 1.5 if t.is_floating_point() else t for name, t in m.state_dict().items()}, assign=True
    )


# name -> what is done; stages that still run in training for each of ORDERS
CHANGES: dict[str, tuple[Callable[[Any], Any], tuple[int, int, int]]] = {
    "synchronised norms": (nn.SyncBatchNorm.convert_sync_batchnorm, (0, 0, 2)),
    "weight_norm": (weight_norm, (1, 2, 1)),
    "spectral_norm": (spectral_norm, (1, 2, 1)),
    "parametrized and back": (parametrized_and_back, (2, 1, 1)),
    "weight_norm by a hook": (weight_norm_by_a_hook, (1, 1, 2)),
    "spectral_norm by a hook": (spectral_norm_by_a_hook, (1, 1, 2)),
    "pruned": (pruned, (0, 0, 2)),
    "pruned for good": (pruned_for_good, (1, 1, 1)),
    "a norm with a hook": (sparse_norm, (1, 1, 2)),
    "frozen norms of torchvision": (frozen_norms_of_torchvision, (0, 0, 1)),
    "half of the parameters frozen": (half_frozen, (1, 1, 1)),
    "a frozen backbone": (frozen_backbone, (1, 1, 1)),
    "other parameters assigned": (assigned, (1, 1, 1)),
    "contiguous": (lambda m: m.to(memory_format=torch.contiguous_format), (1, 1, 1)),
    "channels_last": (lambda m: m.to(memory_format=torch.channels_last), (1, 1, 1)),
    "there and back": (lambda m: m.float().half().double(), (1, 1, 1)),
    "shared memory": (lambda m: m.share_memory(), (1, 1, 1)),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CHANGES)
def test_changed(name: str, order: str) -> None:
    change, stages = CHANGES[name]
    with silent():
        plain, ours = changed(change, order)
    ran = same(ours, plain, image(3))
    assert ran == stages[ORDERS.index(order)]
    copyable = not any(t.grad_fn for m in plain.modules() for t in vars(m).values() if isinstance(t, Tensor))
    if copyable and order == "fuse, call, change":
        same(copy.deepcopy(ours), copy.deepcopy(plain), image(3))  # PyTorch copies no weights that hooks have computed
    csp.unfuse(ours)
    assert not any(hasattr(type(m), "_csp_original") for m in ours.modules())
    ran = same(ours, plain, image(3))
    assert ran == 0


def test_the_reason_for_synchronised_norms() -> None:
    report = csp.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(Net()))
    assert "body.conv1: one convolution" in str(report)
    assert "a SyncBatchNorm follows, which is no stage's" in str(report)
    _, ours, _ = pair(Net)
    ours(image(3))
    nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    with pytest.warns(RuntimeWarning, match=f"a Functional {RAN_PLAIN}: bn1 is a SyncBatchNorm now"):
        ours(image(3))


def test_another_class() -> None:
    """Of a fused module itself, as parametrizations and fully_shard give one, and the old one again."""
    plain, ours, _ = pair(lambda: ConvNorm(16, 16))
    x = image(16)
    kind = type("Other", (ConvNorm,), {})
    for m in (plain, ours):
        m.__class__ = kind  # type: ignore[assignment]
    assert type(ours) is not kind and ours.__class__ is kind and isinstance(ours, kind)
    ran = same(ours, plain, x)
    assert ran == 1 and len(csp.fuse(ours).fused) == 1
    ours.__class__ = ConvNorm  # type: ignore[assignment]
    ran = same(ours, plain, x)
    assert ran == 1 and ours.__class__ is ConvNorm
    other = type("Doubled", (ConvNorm,), {"forward": lambda self, x: 2 * ConvNorm.forward(self, x)})
    for m in (plain, ours):
        m.__class__ = other  # type: ignore[assignment]
    ran = same(ours, plain, x)
    assert ran == 0 and type(ours) is other


@pytest.mark.parametrize(
    ("dtype", "autocast", "bound"),
    [
        (torch.float32, False, 1e-5), (torch.bfloat16, False, 0.2), (torch.float16, False, 0.02),
        (torch.bfloat16, True, 0.2), (torch.float16, True, 0.02),
    ],
    ids=str,
)  # fmt: skip
def test_dtypes(dtype: torch.dtype, autocast: bool, bound: float) -> None:
    """model.to(dtype) after csp.fuse, or autocast: dtypes and errors of the plain network."""
    exact, ours, _ = pair(Net)
    plain = copy.deepcopy(exact)
    inner = torch.float32 if autocast else dtype
    for m in (plain, ours):
        m.to(inner)
    for mode in (True, False):
        expected = step(exact.train(mode), image(3))
        found: list[dict[str, Tensor]] = []
        for m in (plain, ours):
            with torch.autocast("cpu", dtype, enabled=autocast):
                m.train(mode)
                found.append({})
                ran = calls(lambda m=m, into=found[-1]: into.update(step(m, image(3).to(inner))))  # type: ignore[misc]
        assert ran == 1
        errors: list[float] = []
        for result in found:
            assert {n: t.dtype for n, t in result.items()} == {n: t.dtype for n, t in found[0].items()}
            off = {n: (t.double() - expected[n].double()).norm().item() for n, t in result.items()}
            size = {n: expected[n].double().norm().item() for n in result}
            errors.append(max(off[n] / (size[n] + 0.01 * max(size.values())) for n in result))
        # gradients are near the smallest numbers of float16 here: nobody scales the loss
        assert errors[1] < bound and errors[1] < (4 if dtype is torch.float16 else 2) * errors[0] + 1e-6


def test_swapped_weights() -> None:
    """A mode of PyTorch in which .to() and load_state_dict put other tensors into the same parameters; it wants no weak
    references to them, neither of the memory format that they had nor of what inference packed."""
    plain, ours, _ = pair(Net)
    with torch.no_grad():
        for _ in range(3):
            ours.eval()(image(3))
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for m in (plain, ours):
            m.float().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    ran = same(ours, plain, image(3))
    assert ran == 1
    assert all(p.is_contiguous() for p in csp.unfuse(ours).parameters())


def averaged(m: nn.Module) -> swa_utils.AveragedModel:
    x = image(3)
    made = swa_utils.AveragedModel(m, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(m.parameters(), 0.05)
    for _ in range(3):
        step(m, x, optimizer)
        made.update_parameters(m)
    swa_utils.update_bn([x, x * 2], made)  # statistics from nothing, momentum None
    return made


def test_averaged_weights() -> None:
    plain, ours, _ = pair(Net)
    expected, found = averaged(plain), averaged(ours)
    for name, t in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], t, rtol=1e-9, atol=1e-10)
    assert found.n_averaged == 3
    ran = same(found, expected, image(3))
    assert ran == 1
    ran = same(copy.deepcopy(found), copy.deepcopy(expected), image(3))
    assert ran == 1


def test_a_state_dict_without_this_package(tmp_path: Path) -> None:
    """Trained fused, saved, loaded into the plain network by an interpreter that cannot import csp_kernels."""
    _, ours, _ = pair(Net)
    optimizer = torch.optim.AdamW(ours.parameters(), 1e-2)
    step(ours, image(3), optimizer)
    with torch.no_grad():
        expected = ours.eval()(image(3))
    torch.save({"model": ours.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    torch.save(ours, tmp_path / "model.pt")
    torch.save((image(3), expected), tmp_path / "expected.pt")
    script = (
        "import sys, torch; sys.modules['csp_kernels'] = None; sys.path.insert(0, sys.argv[1])\n"
        "from networks import Net\n"
        "x, y = torch.load(sys.argv[2] + '/expected.pt')\n"
        "kept = torch.load(sys.argv[2] + '/checkpoint.pt', weights_only=True)\n"
        "plain = Net().double().eval()\n"
        "plain.load_state_dict(kept['model'])\n"
        "whole = torch.load(sys.argv[2] + '/model.pt', weights_only=False)\n"
        "assert type(whole) is Net and not whole.training and not [n for n in vars(whole) if 'csp' in n]\n"
        "for m in (plain, whole):\n"
        "    torch.testing.assert_close(m(x), y, rtol=1e-9, atol=1e-10)\n"
        "print('loaded', len(kept['optimizer']['state']))"
    )
    command = [sys.executable, "-c", script, str(HERE), str(tmp_path)]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.stdout == f"loaded {len([*ours.parameters()])}\n", done.stderr
    again = torch.load(tmp_path / "model.pt", weights_only=False)  # here: plain too, and fused by one line
    assert type(again) is Net and len(csp.fuse(again).fused) == 1
    torch.testing.assert_close(again(image(3)), expected, rtol=1e-9, atol=1e-10)


def test_hooks_fire() -> None:
    """Of inner modules, which are called for them then; of fused modules and of weights, while stages run."""
    plain, ours, _ = pair(Net)
    x = image(3)
    seen: list[list[Any]] = [[], []]
    handles: list[Any] = []
    for m, log in zip((plain, ours), seen, strict=True):
        m(x)

        def note(name: str, log: list[Any] = log) -> Callable[..., None]:
            return lambda *given: log.append((name, given[-1] if isinstance(given[-1], Tensor) else given[-1][0]))

        m.stage.register_forward_hook(note("a fused module"))
        m.body.register_full_backward_hook(note("its gradient"))
        m.stage.first.conv.weight.register_hook(note("a weight's gradient"))
        handles += [
            m.stage.blocks[1].bn.register_forward_hook(note("an inner norm")),
            m.body.conv2.register_forward_pre_hook(note("in front of an inner convolution")),
            m.stage.first.register_full_backward_hook(note("an inner gradient")),
        ]
    for inner in (True, False):
        seen[0].clear()
        seen[1].clear()
        ran = same(ours, plain, x)
        assert ran == (0 if inner else 2)
        assert len(seen[0]) == 2 * (6 if inner else 3)
        for (name, t), (other, u) in zip(*seen, strict=True):
            assert name == other
            torch.testing.assert_close(u.detach(), t.detach(), rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        for handle in handles:
            handle.remove()


def called_with_other_parameters(m: nn.Module) -> dict[str, Tensor]:
    parameters = {n: (t.detach() * 1.1).requires_grad_() for n, t in m.named_parameters()}
    buffers = {n: t.clone() for n, t in m.named_buffers()}
    y = torch.func.functional_call(m, (parameters, buffers), (image(3),))
    y.square().sum().backward()
    found = {"output": y.detach()} | {f"{n} gradient": t.grad for n, t in parameters.items() if t.grad is not None}
    return found | buffers | {f"own {n}": t for n, t in m.state_dict().items()}


def test_functional_call() -> None:
    plain, ours, _ = pair(Net)
    expected = called_with_other_parameters(plain)
    found: dict[str, Tensor] = {}
    assert calls(lambda: found.update(called_with_other_parameters(ours))) == 1
    assert found.keys() == expected.keys()
    compare(found, expected)
    assert all(p.grad is None for p in ours.parameters())


def test_functional_derivatives() -> None:
    plain, ours, _ = pair(Net)
    found = []
    for m in (plain.eval(), ours.eval()):
        gradients = torch.func.grad(lambda p, m=m: torch.func.functional_call(m, p, (image(3),)).square().sum())
        found.append([*gradients(dict(m.named_parameters())).values(), torch.func.jacrev(m)(image(3))])
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.inner, x, use_reentrant=reentrant)
            return y

    plain, ours, _ = pair(Net)
    ran = same(Checkpointed(ours), Checkpointed(plain), image(3))
    assert ran == 2


def test_checkpoint_that_ends_with_a_stage() -> None:
    """PyTorch stops recomputing there: gradients are the same, running statistics advance once, not twice."""
    plain, ours, _ = pair(Lists)
    found = []
    for m in (plain, ours):
        leaf = image().requires_grad_()
        y = checkpoint(m, leaf, use_reentrant=False)
        y.square().sum().backward()
        gradients = {f"{n} gradient": p.grad for n, p in m.named_parameters()}
        found.append({"output": y.detach(), "input": leaf.grad} | gradients)
    compare(found[1], found[0])
    once = pair(Lists)[0]
    once(image())
    torch.testing.assert_close(ours.state_dict(), once.state_dict(), rtol=1e-9, atol=1e-10)


def test_accumulated_gradients() -> None:
    """Of three batches of other sizes, and those of a batch in parts."""
    found = []
    for m in pair(Net)[:2]:
        for size, batch in ((9, 2), (6, 3), (9, 1)):
            m(image(3, size)[:batch].repeat(2, 1, 1, 1)).square().sum().backward()
        found.append({f"{n} gradient": p.grad.clone() for n, p in m.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) == len([*Net().parameters()])
    compare(found[1], found[0])


def test_data_parallel() -> None:
    plain, ours, _ = pair(Net)
    ran = same(nn.DataParallel(ours), nn.DataParallel(plain), image(3))
    assert ran == 1


def test_made_without_memory() -> None:
    """Fused on the meta device, then given memory, or parameters."""
    plain = pair(Net)[0]
    for empty in (True, False):
        with torch.device("meta"):
            ours = Net()
            assert len(csp.fuse(ours).fused) == 1
        state = copy.deepcopy(plain.state_dict())
        if empty:
            ours.to_empty(device="cpu").double()
        ours.load_state_dict(state, assign=not empty)
        ran = same(ours, plain, image(3))
        assert ran == 1


# --- compilers and exporters ---


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.verify)])
def test_compiled(backend: str) -> None:
    """A whole network, in training too."""
    plain, ours, _ = pair(Net)
    ran = same(torch.compile(ours, backend=backend), plain, image(3), "_orig_mod.")
    assert ran == 0


@pytest.mark.parametrize("name", ["stage", "stage.first"])
def test_compiled_in_part(name: str) -> None:
    """A fused module, and one inside of it."""
    plain, ours, _ = pair(Net)
    for m in (plain, ours):
        m(image(3))
    ours.get_submodule(name).compile(backend="aot_eager")
    ran = same(ours, plain, image(3))
    assert ran == 1


def test_exported() -> None:
    plain, ours, _ = pair(Net)
    program = torch.export.export(ours.eval(), (image(3),))
    assert not any("csp_kernels" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(image(3)), plain.eval()(image(3)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.verify)])
def test_onnx(dynamo: bool, tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    plain, ours, _ = pair(Net)
    x, file = image(3).float(), str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(ours.float().eval(), (x,), file, dynamo=dynamo, verbose=False)
    assert {node.domain for node in onnx.load(file).graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), plain.float().eval()(x), rtol=1e-4, atol=1e-5)


# --- libraries ---


def timm_pair(name: str, **options: Any) -> tuple[Any, Any]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=10, **options).double()
    ours = copy.deepcopy(plain)
    assert csp.fuse(ours).coverage > 0.9
    return plain, ours


SMALL = "cs3darknet_focus_s"


@pytest.mark.parametrize("kind", ["features_only", "FeatureGetterNet", "FeatureHookNet", "FeatureGraphNet"])
def test_features_of_timm(kind: str) -> None:
    """Extractors made by timm before csp.fuse, and others that wrap a fused network."""
    plain, ours = timm_pair(SMALL, **({"features_only": True} if kind == "features_only" else {}))
    if kind != "features_only":
        wrap = {**vars(sys.modules["timm.models._features"]), **vars(sys.modules["timm.models._features_fx"])}[kind]
        plain, ours = (wrap(m, out_indices=(1, 2, 3)) for m in (plain, ours))
    ran = same(ours, plain, image(3, 48))
    stages = {"features_only": 1, "FeatureGetterNet": 3, "FeatureHookNet": 4, "FeatureGraphNet": 0}
    assert ran == stages[kind]  # the getter leaves the last stage out; torch.fx records what there was before csp.fuse


@pytest.mark.parametrize("name", ["resnet18", pytest.param("densenet121", marks=pytest.mark.verify)])
def test_checkpoints_of_timm(name: str) -> None:
    """set_grad_checkpointing calls the blocks of a layer one by one, or an attribute says so: plain layers run."""
    plain, ours = timm_pair(name)
    for m in (plain, ours):
        m.set_grad_checkpointing(True)
    ran = same(ours, plain, image(3, 64))  # the last norms see no single pixels
    assert ran == {"resnet18": 0, "densenet121": 3}[name]


def test_freezing_of_timm() -> None:
    """timm's freeze puts other classes of norms into the stages that it freezes; a new classifier changes no stage."""
    plain, ours = timm_pair(SMALL)
    for m in (plain, ours):
        sys.modules["timm.utils.model"].freeze(m, ["stages.0", "stages.1"])
        torch.manual_seed(1)
        m.reset_classifier(7)
        m.double()
    ran = same(ours, plain, image(3, 48))
    assert ran == 2
    for m in (plain, ours):
        sys.modules["timm.utils.model"].unfreeze(m, ["stages.0", "stages.1"])
    ran = same(ours, plain, image(3, 48))
    assert ran == 2  # the norms are others than before; csp.fuse finds them
    csp.unfuse(ours)
    csp.fuse(ours)
    ran = same(ours, plain, image(3, 48))
    assert ran == 1


@pytest.mark.verify
@pytest.mark.parametrize("first", ["csp.fuse", "ultralytics"])
def test_fuse_of_ultralytics(first: str, tmp_path: Path) -> None:
    """model.fuse() of ultralytics gives its convolutions forwards of their own: they stay, and compute the same."""
    if importlib.util.find_spec("ultralytics") is None:
        pytest.skip('ultralytics is not installed: pip install "csp_kernels[examples]"')
    script = """
import copy, sys, torch, warnings
import csp_kernels as csp
from comparing import calls
from ultralytics.nn.tasks import DetectionModel

torch.manual_seed(0)
plain = DetectionModel("yolov8n.yaml", verbose=False).double().eval()
for m in plain.modules():
    if isinstance(m, torch.nn.BatchNorm2d):
        torch.nn.init.uniform_(m.running_var, 0.5, 1.5)
        torch.nn.init.normal_(m.running_mean)
ours, x = copy.deepcopy(plain), torch.rand(1, 3, 64, 64, dtype=torch.float64)
with torch.no_grad():
    expected = plain(x)[0]
    if sys.argv[1] == "csp.fuse":
        csp.fuse(ours)
        assert calls(lambda: ours(x)) == 18
        torch.testing.assert_close(ours(x)[0], expected, rtol=1e-9, atol=1e-9)
    ours.fuse(verbose=False)
    if sys.argv[1] == "ultralytics":
        assert not csp.fuse(ours).fused
    warnings.simplefilter("ignore")
    assert calls(lambda: ours(x)) == 0
    torch.testing.assert_close(ours(x)[0], expected, rtol=1e-9, atol=1e-9)
    csp.unfuse(ours)
    torch.testing.assert_close(ours(x)[0], expected, rtol=1e-9, atol=1e-9)
print("same")
"""
    paths = [str(HERE), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script, first], text=True, capture_output=True, check=False, env=env)
    assert done.stdout.splitlines()[-1:] == ["same"], done.stdout + done.stderr


# --- several processes ---


@pytest.mark.verify
@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == "win32", reason="needs gloo")
def test_connected_processes(tmp_path: Path) -> None:
    """DistributedDataParallel and fully_shard, before csp.fuse and after it, on two processes: see connected.py."""
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(HERE / "connected.py")]
    pipes: Any = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": env}
    processes = [subprocess.Popen([*command, str(i), str(tmp_path / "meeting")], **pipes) for i in range(2)]
    try:
        for process in processes:
            printed, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            assert json.loads(printed.splitlines()[-1]) == {}, "\n".join(json.loads(printed.splitlines()[-1]).values())
    finally:
        for process in processes:
            process.kill()
