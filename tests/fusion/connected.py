"""One of two processes that train a network together: `python connected.py RANK FILE` prints what failed, as JSON."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from comparing import calls, image, pair
from networks import Net
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import csp_kernels as csp

BATCH = image(3).repeat(2, 1, 1, 1) * torch.linspace(0.5, 2, 4, dtype=torch.float64)[:, None, None, None]
STEPS = 2


def frozen(m: nn.Module) -> nn.Module:
    """In training, but for the norms: batches may be cut anywhere then."""
    m.train()
    for norm in m.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    return m


def train(m: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(m.parameters(), 0.1, foreach=False)
    for _ in range(STEPS):
        optimizer.zero_grad()
        m(x).square().mean().backward()
        optimizer.step()


def whole(t: Any) -> Tensor:
    full: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return full


def check(trained: nn.Module, ours: nn.Module, stages: int) -> None:
    """What both processes trained on their halves is what one has trained on all; so many stages ran in each step."""
    plain = frozen(pair(Net)[0])
    train(plain, BATCH)
    half = BATCH.chunk(2)[dist.get_rank()]
    ran = calls(lambda: train(frozen(trained), half))
    assert ran == STEPS * stages, f"{ran} stages ran in {STEPS} steps, expected {stages} in each"
    for (name, t), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        gradient = None if t.grad is None else whole(t.grad)
        for got, right in ((whole(t.detach()), expected), (gradient, expected.grad)):
            torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(ours.eval()(BATCH), plain.eval()(BATCH), rtol=1e-9, atol=1e-10)


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def ddp(first: bool, **options: Any) -> None:
    """Wrapped after csp.fuse (first) or before it."""
    ours = pair(Net)[0]
    if first:
        csp.fuse(ours)
    wrapped = DistributedDataParallel(ours, **options)
    if not first:
        assert [row.path for row in csp.fuse(wrapped).fused] == ["module"]
    with no_warnings():  # of gradients that are laid out otherwise than their bucket, for one
        check(wrapped, ours, 1)


def fsdp(order: str, apart: bool, stages: int = 2) -> None:
    """order: of csp.fuse and fully_shard. apart: the stages are sharded by themselves."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ours: Any = pair(Net)[0]

    def shard() -> None:
        for m in [ours.stage, ours.body] * apart:
            fully_shard(m, mesh=mesh)
        fully_shard(ours, mesh=mesh)

    if order == "fuse, shard":
        csp.fuse(ours)
        ours.to(memory_format=torch.contiguous_format)  # fully_shard takes no other weights
    shard()
    if order == "shard, call, fuse":
        frozen(ours)(BATCH).sum().backward()  # without backward its parameters would not be shards again
    if order != "fuse, shard":
        assert [row.path for row in csp.fuse(ours).fused] == ["body", "stage"]
    with no_warnings():
        check(ours, ours, stages)
    csp.unfuse(ours)
    assert type(ours.stage).__name__ == ("FSDPLists" if apart else "Lists")


def channels_last_weights_are_refused() -> None:
    ours = pair(Net)[1]
    try:
        fully_shard(ours, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    except NotImplementedError as error:
        assert "non-contiguous" in str(error)


def synchronised_norms() -> None:
    """PyTorch has them for GPUs alone; the report says why they are left, and inference is right."""
    sync = nn.SyncBatchNorm.convert_sync_batchnorm
    plain, ours = sync(pair(Net)[0]), sync(pair(Net)[0])
    report = str(csp.fuse(ours))
    assert "a SyncBatchNorm follows" in report and "Error" not in report, report
    for m in (plain, ours):
        try:
            m(BATCH)
        except ValueError as error:
            assert "expected input tensor to be on GPU" in str(error)
    torch.testing.assert_close(ours.eval()(BATCH), plain.eval()(BATCH), rtol=1e-9, atol=1e-10)


CASES: dict[str, Callable[[], None]] = {
    "ddp(fuse(model))": lambda: ddp(True),
    "ddp(fuse(model)), views of buckets": lambda: ddp(True, gradient_as_bucket_view=True),
    "fuse(ddp(model))": lambda: ddp(False),
    "fuse(ddp(model)), views of buckets": lambda: ddp(False, gradient_as_bucket_view=True),
    "fuse(ddp(model)), static graph": lambda: ddp(False, static_graph=True),
    "shard, fuse": lambda: fsdp("shard, fuse", False),
    "shard stages, fuse": lambda: fsdp("shard, fuse", True),
    "shard stages, call, fuse": lambda: fsdp("shard, call, fuse", True),
    "fuse, shard": lambda: fsdp("fuse, shard", False, 1),
    "fuse, shard stages": lambda: fsdp("fuse, shard", True),
    "channels_last weights": channels_last_weights_are_refused,
    "synchronised norms": synchronised_norms,
}


def main(rank: int, file: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=file.as_uri(), rank=rank, world_size=2, timeout=timedelta(seconds=60))
    failed: dict[str, str] = {}
    for name, case in CASES.items():
        try:
            case()
        except Exception:  # said by the test
            failed[name] = traceback.format_exc()
        dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(failed))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
