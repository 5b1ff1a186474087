"""What csp.fuse did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from csp_kernels.fusion.cut import Region
from csp_kernels.fusion.memory import kept_as_a_stage
from csp_kernels.stage.graph import Conv


@dataclass(frozen=True)
class Row:
    """One fused module: its path in the model, its class, the stages that it runs as; halved: how often the images that
    it is given are, where that is known."""

    path: str
    kind: str
    regions: tuple[Region, ...]
    halved: int = 0

    @property
    def convolutions(self) -> int:
        return sum(isinstance(node, Conv) for region in self.regions for node in region.graph.nodes)

    @property
    def flops(self) -> int:
        return sum(region.flops for region in self.regions) >> 2 * self.halved

    @property
    def kept(self) -> float:
        """What its stages keep for backward, counted from sizes, as a part of what autograd kept of the same."""
        stages = sum(kept_as_a_stage(region.graph, *region.size) for region in self.regions)
        return stages / max(1, sum(region.kept for region in self.regions))


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
    convolutions: int

    @property
    def flops(self) -> int:
        """Of what is fused."""
        return sum(row.flops for row in self.fused)

    @property
    def coverage(self) -> float:
        return sum(row.convolutions for row in self.fused) / max(1, self.convolutions)

    def __str__(self) -> str:
        count = sum(row.convolutions for row in self.fused)
        lines = [f"{self.model}: {count} of {self.convolutions} convolutions in {len(self.fused)} fused modules"]
        rows = [["module", "class", "stages", "convolutions", "share of their FLOPs", "kept for backward"]]
        for row in self.fused:
            share, kept = f"{100 * row.flops / max(1, self.flops):.1f} %", f"{100 * row.kept:.0f} %"
            counts = [str(len(row.regions)), str(row.convolutions)]
            rows.append([row.path or "(the model)", row.kind, *counts, share, kept])
        if self.fused:
            lines += [
                *_table(rows),
                "  counted from sizes, FLOPs as if images were of one size where that is not known",
            ]
        if self.left:
            lines += ["left as they were:", *_table([[left.path or "(the model)", left.reason] for left in self.left])]
        return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
