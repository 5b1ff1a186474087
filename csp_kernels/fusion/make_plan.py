"""From a module to what it runs instead: trace, cut, plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from csp_kernels.fusion.cut import Region, cut
from csp_kernels.fusion.leaves import is_conv, is_norm
from csp_kernels.fusion.plan import Plan, plan_of
from csp_kernels.fusion.symbols import Untraceable
from csp_kernels.fusion.trace import Channels, Several, Trace, trace


class Made(NamedTuple):
    """reasons: why other convolutions are in no region. spec: what it was traced with."""

    plan: Plan
    regions: list[Region]
    reasons: list[str]
    trace: Trace
    spec: tuple[Any, ...]


def make_plan(module: nn.Module, regions: bool = True, given: Any = None) -> str | Made:
    """The plan with its regions, what else there is to say, and the trace; or why there is none. given: what to trace
    it with; None: what it might take."""
    reasons = []
    for inputs in _guesses(module) if given is None else [given]:
        try:
            found = trace(module, inputs)
        except Untraceable as error:
            reasons.append(str(error))
            continue
        made, why = cut(found) if regions else ([], [])
        return Made(plan_of(module, found, made), made, why, found, inputs)
    return reasons[0] if reasons else "it has no convolution to begin with"


def _guesses(module: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Inputs that it might take: an image, or lists and several images whose channels add up."""
    first = _channels(module)
    if not first:
        return
    yield (Channels(first),)
    for count in (2, 3, 4, 5, 6):
        if first % count == 0:
            several = (Channels(first // count),) * count
            yield (Several(list, several),)
            yield several


def _channels(module: nn.Module) -> int:
    """Those that its first convolution or norm takes; 0: it has none."""
    for m in module.modules():
        if is_conv(m):
            return int(m.in_channels)  # type: ignore[arg-type]
        if is_norm(m):
            return int(m.num_features)  # type: ignore[arg-type]
    return 0
