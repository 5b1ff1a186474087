"""The table of measured winners by which "auto" chooses on a GPU: csp_kernels/winners.json, read once, when needed.

A row says how many times as fast as the plain reference the backends ran a class of calls on a family of devices:

    {"family": "sm_90", "operator": "dense_block", "dtype": "bfloat16", "mode": "training", "caller": "eager",
     "pixels": 7, "channels": 7, "native": 1.83, "triton": 1.41}

family    "sm_<compute capability>", on AMD the architecture's name.
operator  a function of csp_kernels.ops.
dtype     of the inputs; "tf32": float32 where torch.set_float32_matmul_precision allows TF32.
mode      "training": gradients are wanted; "inference": they are not.
caller    "compiled": the reference would be torch.compile's; "eager": it would run operation by operation.
pixels    the first input's N * H * W is at least 4 ** pixels and less than 4 ** (pixels + 1).
channels  the inputs have together at least 2 ** channels and less than 2 ** (channels + 1).
native, triton  only those that were clearly faster than the reference. A row with neither says: measured, but slower.

benchmarks/gpu_report.py writes it from what benchmarks/gpu_speed.py measured. Calls without a row are the reference's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csp_kernels._tracing import constant_when_traced

FILE = Path(__file__).with_name("winners.json")
BACKENDS = ("native", "triton")


class Kind(NamedTuple):
    """Calls that differ in the sizes of their inputs alone."""

    family: str
    operator: str
    dtype: str
    mode: str
    caller: str


Shape = tuple[int, int]  # class of pixels, class of channels
Table = dict[Kind, dict[Shape, tuple[str, ...]]]  # the backends that are faster than the reference, fastest first


@cache
def table() -> Table:
    """What FILE holds. Raises ValueError, with the fix, for a file that is not such a table."""
    made: Table = {}
    for row in _rows():
        try:
            kind = Kind(*(str(row[name]) for name in Kind._fields))
            shape = int(row["pixels"]), int(row["channels"])
            ratios = {name: float(row[name]) for name in BACKENDS if name in row}
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{FILE}: got the row {row}, expected one as benchmarks/gpu_report.py writes it"
            ) from error
        made.setdefault(kind, {})[shape] = tuple(sorted(ratios, key=lambda name: -ratios[name]))
    return made


def _rows() -> list[Any]:
    try:
        rows = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{FILE}: {error}; write it with benchmarks/gpu_report.py, or an empty one: []") from error
    if not isinstance(rows, list):
        raise ValueError(f"{FILE}: got {type(rows).__name__}, expected a list of rows")
    return rows


def write(rows: Sequence[Mapping[str, object]]) -> None:
    """Writes FILE, a line a row, sorted, so that a change shows as the lines that it changes."""
    names = (*Kind._fields, "pixels", "channels")
    lines = [json.dumps(row) for row in sorted(rows, key=lambda row: [str(row[name]).zfill(4) for name in names])]
    FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n", encoding="utf-8")
    table.cache_clear()


# --- the class of a call ---


@constant_when_traced
def family(device: torch.device) -> str:
    """Devices that are measured as one; "" of those that have no kernels, and where no GPU is (of fake tensors)."""
    return _family(device.index) if device.type == "cuda" else ""


@cache
def _family(index: int | None) -> str:
    if not torch.cuda.is_available():
        return ""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{10 * major + minor}"


@constant_when_traced  # torch.compile guards on the precision
def dtype_name(dtype: torch.dtype) -> str:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def shape_class(pixels: int, channels: int) -> Shape:
    """Of N * H * W pixels and the channels of all inputs together. By comparisons, which torch.compile can guard on
    where sizes are symbols: it compiles anew for another class, not for every size."""
    return _exponent(pixels, 4), _exponent(channels, 2)


def _exponent(number: int, base: int) -> int:
    found = 0
    while number >= base ** (found + 1):
        found += 1
    return found


# --- who wins ---


def faster(device: torch.device, operator: str, inputs: Sequence[Tensor], training: bool) -> tuple[str, ...]:
    """The backends that were measured to be faster than the reference at such calls, fastest first."""
    x = inputs[0]
    caller = "compiled" if torch.compiler.is_compiling() else "eager"
    kind = family(device), operator, dtype_name(x.dtype), "training" if training else "inference", caller
    if not _measured(*kind):
        return ()
    n, _, h, w = x.shape
    return _faster(kind, shape_class(n * h * w, sum(t.shape[1] for t in inputs)))


@constant_when_traced
def _measured(*kind: str) -> bool:
    return bool(kind[0]) and Kind(*kind) in table()


@constant_when_traced
def _faster(kind: tuple[str, ...], shape: Shape) -> tuple[str, ...]:
    return table()[Kind(*kind)].get(shape, ())


def summary(name: str) -> str:
    """What the table says of a family of devices, in words."""
    found = [backends for kind, shapes in table().items() if kind.family == name for backends in shapes.values()]
    if not found:
        return f"reference: nothing has been measured on {name} ({FILE.name} has no row of it)"
    won = sum(bool(backends) for backends in found)
    return f"on {name} native or triton for {won} of {len(found)} measured classes of calls, reference for all others"
