"""Graphs: what is refused, with a message that names the place, and how they print, compare and hash."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from csp_kernels.stage.build import Builder, conv_norm, through_norm
from csp_kernels.stage.check import check
from csp_kernels.stage.dense_block import dense_block
from csp_kernels.stage.graph import Conv, Graph, MaxPool, Parameters, Read, Sum, Write


def residual() -> Graph:
    """x + relu(norm(conv(x))), and its lower half once more."""
    build = Builder(8)
    grown = conv_norm(build, [build.read(0)], 8, 3)
    total = build.sum([build.read(0), grown], "relu")
    build.write([build.read(total), build.read(total, start=4)])
    return build.graph()


def test_print() -> None:
    assert str(residual()) == (
        "v0 = input 0 [8]\n"
        "v1 = conv3x3[8->8](v0[0:8])\n"
        "v2 = relu(v0[0:8] + relu(norm0[0:8](v1[0:8])))\n"
        "output 0 = v2[0:8], v2[4:8]"
    )
    build = Builder(4, 2)
    reads = through_norm(build, [build.read(0), build.read(1)], "leaky_relu")
    z = build.conv([replace(read, slope=0.1) for read in reads], 6, pool=True, drop_rate=0.5)
    build.write([build.read(build.conv([build.read(z)], 4, 3, stride=2, groups=2, bias=True))], pool=True)
    assert str(build.graph()).splitlines()[2:] == [
        "v2 = conv1x1[6->6, pool, drop 0.5](leaky_relu 0.1(norm0[0:4](v0[0:4])), leaky_relu 0.1(norm0[4:6](v1[0:2])))",
        "v3 = conv3x3[6->4, stride 2, groups 2, bias](v2[0:6])",
        "output 0 = pool(v3[0:4])",
    ]


def test_equal_graphs_are_equal_and_hash_alike() -> None:
    assert len({dense_block(2, 8, 4, 16), dense_block(2, 8, 4, 16), dense_block(2, 8, 4, 12)}) == 2
    assert residual().channels == (8, 8, 8)


READ = Read(0, 0, 8)
BASE: dict[str, Any] = {
    "inputs": (8, 8),
    "nodes": (Conv((READ,), 6),),
    "norms": (6,),
    "outputs": (Write((Read(2, 0, 6, 0),)),),
    "order": (Parameters("conv", "conv", 0), Parameters("norm", "norm", 0)),
}


def read(**changes: Any) -> dict[str, Any]:
    return {"outputs": (Write((replace(Read(2, 0, 6, 0), **changes),)),)}


def conv(reads: tuple[Read, ...] = (READ,), **changes: Any) -> dict[str, Any]:
    return {"nodes": (Conv(reads, **{"out_channels": 6, **changes}),)}


def two(first: Read, second: Read) -> dict[str, Any]:
    return {"outputs": (Write((first, second)),)}


WRONG = [
    ({"inputs": ()}, "inputs: got [], expected channels of at least 1"),
    ({"inputs": (8, 0)}, "inputs: got [8, 0], expected channels of at least 1"),
    ({"outputs": ()}, "outputs: got none, expected one or more"),
    ({"outputs": (Write(()),)}, "output 0: got no reads, expected one or more"),
    (read(value=3), "output 0, reads[0]: got value 3, expected one of 0 to 2, which exist there"),
    (conv((Read(2, 0, 6),)), "v2, reads[0]: got value 2, expected one of 0 to 1, which exist there"),
    (read(stop=7), "output 0, reads[0]: got channels [0, 7), expected some of the 6 of v2"),
    (read(start=6), "output 0, reads[0]: got channels [6, 6), expected some of the 6 of v2"),
    (read(start=-1), "output 0, reads[0]: got channels [-1, 6), expected some of the 6 of v2"),
    (
        read(act="softplus"),
        "output 0, reads[0]: got activation 'softplus', expected one of identity, relu, leaky_relu, silu",
    ),
    (read(norm=1), "output 0, reads[0]: got norm 1, expected one of the graph's 1"),
    (read(at=1), "output 0, reads[0]: got [1, 7) of norm 0, expected some of its 6"),
    (conv(out_channels=0), "v2: got out_channels 0, expected at least 1"),
    (conv(kernel=5), "v2: got kernel 5, expected 1 or 3"),
    (conv(stride=2, pool=True), "v2: got pool and a stride, expected one of them"),
    ({"nodes": (MaxPool((READ, READ), 3),)}, "v2: got 2 reads, expected one"),
    ({"nodes": (MaxPool((READ,), 4),)}, "v2: got size 4, expected an odd number, or 2 with stride 2"),
    ({"nodes": (MaxPool((READ,), 2),)}, "v2: got size 2, expected an odd number, or 2 with stride 2"),
    ({"nodes": (MaxPool((READ,), 3, 3),)}, "v2: got stride 3, expected 1 or 2"),
    (conv(kernel=3, stride=3), "v2: got stride 3, expected 1 or 2"),
    (conv(groups=4), "v2: got 4 groups of 8 -> 6 channels, expected groups that divide both"),
    (conv(groups=0), "v2: got 0 groups of 8 -> 6 channels, expected groups that divide both"),
    (conv(drop_rate=1.0), "v2: got drop_rate 1.0, expected 0 <= drop_rate < 1"),
    (conv(kernel=3, pool=True), "v2: got pool, expected it in front of a 1x1 without bias alone"),
    (conv(bias=True, pool=True), "v2: got pool, expected it in front of a 1x1 without bias alone"),
    ({"nodes": (Sum(()),)}, "v2: got no reads, expected one or more"),
    ({"nodes": (Sum((READ, Read(1, 0, 7))),)}, "v2: got 2 reads of [7, 8] channels, expected one or more of one width"),
    ({"nodes": (Sum((READ, READ), "softplus"),)}, "v2: got activation 'softplus', expected one of"),
    (
        {**conv(pool=True), **two(Read(0, 0, 8), Read(2, 0, 6, 0))},
        "output 0, reads[1]: got the inputs' size after pooling, expected the inputs' size, as reads[0]",
    ),
    (
        {**conv(kernel=3, stride=2), **two(Read(2, 0, 6, 0), Read(1, 0, 8))},
        "output 0, reads[1]: got the inputs' size, expected the inputs' size after stride 2, as reads[0]",
    ),
    (read(norm=None), "norm 0: got no reader of channels [0, 1, 2, 3, 4, 5], expected reads that use all of them"),
    (read(stop=4), "norm 0: got no reader of channels [4, 5], expected reads that use all of them"),
    (
        two(Read(2, 0, 6, 0), Read(0, 2, 8, 0)),
        "output 0, reads[1]: got channel 0 of norm 0 on channel 2 of v0, expected it on channel 0 of v2 alone",
    ),
    (read(act="leaky_relu", slope=math.nan), "output 0, reads[0]: got slope nan, expected a finite number"),
    (conv(pool=2), "v2: got pool 2, expected True or False"),
    ({"outputs": (Write((Read(2, 0, 6, 0),), 2),)}, "output 0: got pool 2, expected True or False"),
    (
        {**conv(pool=True), "norms": (14,), "outputs": (Write((Read(2, 0, 6, 0),)), Write((Read(0, 0, 8, 0, 6),)))},
        "norm 0: got v2 and v0, which differ in size, expected values of one size",
    ),
    ({"norms": (6, 0)}, "norm 1: got 0 channels, expected at least 1"),
    ({"outputs": (Write((Read(0, 0, 6, 0),)),)}, "v2: got no reader, expected a node or an output that reads it"),
    ({"order": (BASE["order"][0],)}, "order: got [('conv', 0)], expected [('conv', 0), ('norm', 0)], each once"),
    ({"order": BASE["order"][:1] * 2}, "order: got [('conv', 0), ('conv', 0)], expected"),
    ({"order": tuple(replace(p, name="a") for p in BASE["order"])}, "order: got names ['a'], expected a name for each"),
    ({"order": tuple(replace(p, name="") for p in BASE["order"][:1]) + BASE["order"][1:]}, "order: got names"),
]


def test_the_base_is_right() -> None:
    check(Graph(**BASE))


@pytest.mark.parametrize("changes, message", WRONG, ids=[message[:60] for _, message in WRONG])
def test_wrong_graphs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        check(Graph(**{**BASE, **changes}))
    assert str(error.value).startswith(message)


def test_the_builder_names_what_is_wrong() -> None:
    build = Builder(8)
    with pytest.raises(ValueError, match="value: got 5, expected one of 0 to 0"):
        build.read(5)
    for wrong in (build.read(0), [0]):
        with pytest.raises(TypeError, match=r"reads: got .*, expected a sequence of what Builder\.read returns"):
            build.write(wrong)  # type: ignore[arg-type]


def test_a_norm_may_be_shared_by_reads_of_the_same_channels() -> None:
    check(Graph(**{**BASE, **two(Read(2, 0, 6, 0), Read(2, 3, 6, 0, 3, "relu"))}))
