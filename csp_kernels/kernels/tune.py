"""The choice among configurations of a kernel: the first, or with tuning on the fastest, remembered on disk.

Not triton.autotune: partial buffers depend on the tile, some kernels add to their output, the order of sums must not
change unasked, and the interpreter takes one configuration only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import statistics
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch

Tile = TypeVar("Tile")  # a frozen dataclass, a tuple of some, or None: its repr() names it
Timer = Callable[[Callable[[], object]], float]

ENVIRONMENT = "CSP_KERNELS_TUNE"
DIRECTORY = "CSP_KERNELS_CACHE"
KEPT = 3  # candidates that are timed, by the cost model's choice
SAMPLES = 9

_on = os.environ.get(ENVIRONMENT, "0") not in ("", "0")
_lock = threading.RLock()  # backward has threads of its own
_winners: dict[Path, dict[str, str]] = {}  # file -> "kernel key" -> repr of the tile


class tune:
    """Switch tuning on or off for the process; as a context manager it restores the previous choice on exit.

    The first call of a kernel for each class of shapes then times a few configurations and takes the fastest; results
    can differ in the last bits from those of another configuration. The environment variable CSP_KERNELS_TUNE=1
    switches it on, too. Winners are kept in $CSP_KERNELS_CACHE, ~/.cache/csp_kernels by default.
    """

    def __init__(self, on: bool = True) -> None:
        global _on
        self._previous, _on = _on, on

    def __enter__(self) -> tune:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _on
        _on = self._previous


def choose(
    kernel: str,
    key: tuple[object, ...],
    candidates: Sequence[Tile],
    run: Callable[[Tile], object],
    cost: Callable[[Tile], float] | None = None,
    timer: Timer | None = None,
) -> Tile:
    """The configuration to launch `kernel` with: the first candidate, or with tuning on the winner for `key`.

    key: whatever the choice depends on, of the same repr() in every process. run launches the kernel once; it is
    called many times, so it must write to scratch what it would otherwise add to. cost: a prediction, the lower the
    better, by which KEPT candidates are timed, and the first one always. timer: milliseconds of a call, by default
    CUDA events. While a CUDA graph is captured nothing is timed.
    """
    if not _on or len(candidates) == 1 or (timer is None and not torch.cuda.is_available()):
        return candidates[0]
    name = f"{kernel} {key!r}"
    with _lock:
        path = cache_file()
        known = _winners.get(path)
        if known is None:
            known = _winners[path] = _read(path)
        for tile in candidates:
            if repr(tile) == known.get(name):
                return tile
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return candidates[0]
        winner = _fastest(_pruned(candidates, cost), run, timer or milliseconds)
        known[name] = repr(winner)
        _write(path, known)
        return winner


def _pruned(candidates: Sequence[Tile], cost: Callable[[Tile], float] | None) -> list[Tile]:
    """At most KEPT and the first, which comes first."""
    order = sorted(candidates, key=cost) if cost else candidates
    return [candidates[0], *(tile for tile in order[:KEPT] if tile is not candidates[0])]


def _fastest(candidates: Sequence[Tile], run: Callable[[Tile], object], timer: Timer) -> Tile:
    """The first where none is faster or can run: its launch will say why."""
    times: list[float] = []
    for tile in candidates:
        try:
            times.append(timer(lambda tile=tile: run(tile)))  # type: ignore[misc]
        except _unfit() as error:  # too much shared memory or too many registers for this device
            warnings.warn(f"{tile} cannot run: {error}", RuntimeWarning, stacklevel=4)
            times.append(float("inf"))
    return candidates[times.index(min(times))]


@cache
def _unfit() -> tuple[type[Exception], ...]:
    try:
        from triton.runtime.errors import OutOfResources, PTXASError
    except ImportError:
        return ()
    return OutOfResources, PTXASError


def milliseconds(work: Callable[[], object]) -> float:
    """Median time of a call on the current stream."""
    work()  # compiles
    samples = []
    for _ in range(SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return statistics.median(samples)


# --- the file: {"kernel key": "repr of the tile"} ---


def cache_file() -> Path:
    """Of the current device, the installed Triton and these sources: with any other it is another file."""
    folder = os.environ.get(DIRECTORY) or Path.home() / ".cache" / "csp_kernels"
    return Path(folder) / _file_name(torch.cuda.current_device() if torch.cuda.is_available() else -1)


@cache
def _file_name(device: int) -> str:
    name = torch.cuda.get_device_name(device) if device >= 0 else "cpu"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "unknown"
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}-{triton}-{digest.hexdigest()[:16]}.json"


def _read(path: Path) -> dict[str, str]:
    """What the file holds; nothing if it is absent or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: tile for name, tile in found.items() if isinstance(tile, str)}


def _write(path: Path, winners: dict[str, str]) -> None:
    """Adds them to what other processes have written meanwhile. A reader sees the old file or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**_read(path), **winners}, indent=0, sort_keys=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=path.name, suffix=".new", delete=False
        ) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"tuned configurations are not kept: {error}", RuntimeWarning, stacklevel=3)
