"""The Triton kernels under Triton's interpreter, on the CPU. The interpreter is chosen when triton is imported, for the
whole process, so it gets one of its own: without TRITON_INTERPRET=1 in the environment each file here is one test that
runs pytest on that file with it. For single tests: TRITON_INTERPRET=1 pytest tests/kernels/test_mix.py -k pool"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # for what lies beside this file

import interpreted
import sampling

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class InterpretedFile(pytest.File):
    """Two tests: the cases of the file that are enough for each change, and the many."""

    def collect(self) -> Iterator[pytest.Item]:
        if sampling.enough(f"kernels/{self.path.name}"):
            yield InterpretedRun.from_parent(self, name="interpreted")
        many = InterpretedRun.from_parent(self, name="interpreted, the many")
        many.add_marker("verify")
        yield many


class InterpretedRun(pytest.Item):
    def runtest(self) -> None:
        if sys.platform != "linux" and importlib.util.find_spec("triton") is None:
            pytest.skip("triton has wheels for Linux only")
        select = "verify" if self.get_closest_marker("verify") else "not verify"
        with tempfile.NamedTemporaryFile() as log:
            status = interpreted.run([str(self.path), "-m", select, "--rootdir", str(self.config.rootpath)], log.name)
            if status == pytest.ExitCode.NO_TESTS_COLLECTED and select == "verify":
                pytest.skip("make test has run every case of this file")
            if status:
                pytest.fail(
                    f"TRITON_INTERPRET=1 pytest -m '{select}' {self.path}\n{log.read().decode()}", pytrace=False
                )


if not INTERPRETED:

    def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File | None:
        if module_path.name == "test_compile.py":  # has processes of its own, which do not interpret
            return None
        return InterpretedFile.from_parent(parent, path=module_path)


def exact_bfloat16() -> None:
    """The interpreter computes with the integers it keeps bfloat16 in: let it convert, round and multiply instead."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast_impl, fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    create_dot, binary_op = builder.create_dot, builder.binary_op

    def widen(a):
        return (np.ascontiguousarray(a).astype(np.uint32) << 16).view(np.float32)

    def narrow(a):
        return torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32)).bfloat16().view(torch.uint16).numpy()

    def is_bf16(x):
        return x.dtype.scalar == tl.bfloat16

    def cast(self, x, to):
        if is_bf16(x) and to.scalar != tl.bfloat16:
            return cast_impl(self, handle(widen(x.data), tl.float32), to)
        if to.scalar == tl.bfloat16 and not is_bf16(x):
            return handle(narrow(x.data), to.scalar)
        return cast_impl(self, x, to)

    def dot(self, a, b, *rest):
        a, b = (handle(widen(x.data), tl.float32) if is_bf16(x) else x for x in (a, b))
        return create_dot(self, a, b, *rest)

    def binary(self, a, b, op):
        if not is_bf16(a):
            return binary_op(self, a, b, op)
        out = op(widen(a.data), widen(b.data))
        return handle(out, tl.int1) if out.dtype == np.bool_ else handle(narrow(out), tl.bfloat16)

    def convert(self, x, to, rounding):
        return cast(self, x, to) if tl.bfloat16 in (x.dtype.scalar, to.scalar) else fp_to_fp(self, x, to, rounding)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot, builder.binary_op = cast, convert, dot, binary


if INTERPRETED and importlib.util.find_spec("triton") is not None:
    import triton

    @triton.jit
    def _probe():
        pass

    if type(_probe).__name__ != "InterpretedFunction":
        raise pytest.UsageError("triton was imported before TRITON_INTERPRET=1 was set: set it in the environment")
    exact_bfloat16()
    import guard

    guard.install()


class Buffers:
    """Images as views into larger buffers of NaN, which must stay NaN around them."""

    def __init__(self) -> None:
        self.all: list[tuple[Tensor, Tensor]] = []

    def put(self, x: Tensor, left: int = 3, right: int = 5) -> Tensor:
        """x [P, C] -> a copy of it, a view with other pixels before and after it and other channels on both sides."""
        buffer = x.new_full((x.shape[0] + 2, left + x.shape[1] + right), float("nan"))
        view = buffer[1:-1, left : left + x.shape[1]]
        view.copy_(x)
        self.all.append((buffer, view))
        return view

    def empty(self, pixels: int, channels: int, dtype: torch.dtype, left: int = 8, right: int = 8) -> Tensor:
        return self.put(torch.full((pixels, channels), float("nan"), dtype=dtype), left, right)

    def check(self) -> None:
        for buffer, view in self.all:
            view.fill_(float("nan"))
            assert buffer.isnan().all(), "written outside of its channels or pixels"


@pytest.fixture
def buffers() -> Iterator[Buffers]:
    buffers = Buffers()
    yield buffers
    buffers.check()


@pytest.fixture
def operators() -> Iterator[None]:
    """csp.ops and torch.ops.csp_kernels.stage* run by the launchers, on CPU tensors."""
    import csp_kernels as csp
    from csp_kernels.kernels import stage
    from csp_kernels.ops import _packed

    csp.use_backend("native")
    with (
        patch.object(_packed, "SHARES", False),
        torch.library._scoped_library("csp_kernels", "IMPL") as library,
    ):
        library.impl("stage", stage.forward, "CPU", allow_override=True)
        library.impl("stage_backward", stage.backward, "CPU", allow_override=True)
        yield
