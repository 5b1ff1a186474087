"""What csp.fuse did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from csp_kernels.fusion.cut import Region
from csp_kernels.stage.graph import Conv


@dataclass(frozen=True)
class Row:
    """One fused module: its path in the model, its class, the stages that it runs as."""

    path: str
    kind: str
    regions: tuple[Region, ...]

    @property
    def convolutions(self) -> int:
        return sum(isinstance(node, Conv) for region in self.regions for node in region.graph.nodes)

    @property
    def flops(self) -> int:
        return sum(region.flops for region in self.regions)


@dataclass(frozen=True)
class Left:
    """What was left as it was, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Report:
    """fused: modules that run as stages; left: others with convolutions, and why; coverage: the part of the
    convolutions that run in stages. Prints as a table."""

    model: str
    fused: tuple[Row, ...]
    left: tuple[Left, ...]
    flops: int
    convolutions: int

    @property
    def coverage(self) -> float:
        return sum(row.convolutions for row in self.fused) / max(1, self.convolutions)

    def __str__(self) -> str:
        count = sum(row.convolutions for row in self.fused)
        lines = [f"{self.model}: {count} of {self.convolutions} convolutions in {len(self.fused)} fused modules"]
        rows = [["module", "class", "stages", "convolutions", "share of their FLOPs"]]
        for row in self.fused:
            share = f"{100 * row.flops / max(1, self.flops):.1f} %"
            rows.append([row.path or "(the model)", row.kind, str(len(row.regions)), str(row.convolutions), share])
        lines += _table(rows) if self.fused else []
        if self.left:
            lines += ["left as they were:", *_table([[left.path or "(the model)", left.reason] for left in self.left])]
        return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
