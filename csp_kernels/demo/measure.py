"""What a training step keeps and needs: saved activation bytes and peak resident memory.

As a program (`python -m csp_kernels.demo.measure NETWORK KIND BATCH DTYPE`) it takes a few steps and prints its peak.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import AbstractContextManager

import torch
from torch import nn

from csp_kernels.analysis import saved_bytes

from .network import build

STEPS = 3


def precision(dtype: str) -> AbstractContextManager[object]:
    """Autocast to bfloat16, or nothing for float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def network_saved_bytes(network: str, kind: str, batch_size: int, dtype: str) -> int:
    """Saved activation bytes of one training step, inputs and parameters not counted."""
    model, images = build(network, kind, 0), torch.randn(batch_size, 1, 28, 28)
    with precision(dtype):
        return saved_bytes(lambda: model(images), [images, *model.parameters(), *model.buffers()])


def peak_resident_bytes() -> int:
    """Peak resident memory of this process. Linux counts a parent's peak in ru_maxrss, so VmHWM is read there."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_of(network: str, kind: str, batch_size: int, dtype: str) -> tuple[int, int]:
    """(peak, peak before the first step) resident bytes of a process of its own that takes a few steps."""
    command = [sys.executable, "-m", "csp_kernels.demo.measure", network, kind, str(batch_size), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {network!r}, {kind}, failed:\n{done.stderr}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["peak"], answer["start"]


def _steps(network: str, kind: str, batch_size: int, dtype: str) -> None:
    model = build(network, kind, 0)
    images, labels = torch.randn(batch_size, 1, 28, 28), torch.zeros(batch_size, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters())
    start = peak_resident_bytes()
    for _ in range(STEPS):
        optimizer.zero_grad()
        with precision(dtype):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    print(json.dumps({"peak": peak_resident_bytes(), "start": start}))


if __name__ == "__main__":
    _steps(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
