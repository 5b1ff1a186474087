"""What a graph must be: errors that name the node."""

from __future__ import annotations

import math

from csp_kernels.stage.graph import Conv, Graph, MaxPool, Node, Read, Sum, Write
from csp_kernels.vocabulary import ACTIVATIONS


def check(graph: Graph) -> None:
    """Raises ValueError for a graph that no program can be made of; says which node, what it has and what was expected.

    Reads lie within values that exist already; what is read side by side, added or normalised together fits in size and
    channels; each channel of a norm normalises one channel of one value, and all channels are used; every value but the
    inputs is read.
    """
    _expect(bool(graph.inputs) and min(graph.inputs) > 0, "inputs", str(list(graph.inputs)), "channels of at least 1")
    _expect(bool(graph.outputs), "outputs", "none", "one or more")
    for i, (name, user) in enumerate(graph.users()):
        _check_reads(graph, name, user, min(len(graph.channels), graph.value(i)))
    _check_norms(graph, sizes(graph))
    used = {read.value for _, user in graph.users() for read in user.reads}
    for i in range(len(graph.nodes)):
        _expect(graph.value(i) in used, f"v{graph.value(i)}", "no reader", "a node or an output that reads it")
    _check_order(graph)


def _expect(condition: bool, where: str, got: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{where}: got {got}, expected {expected}")


def _check_reads(graph: Graph, name: str, user: Node | Write, values: int) -> None:
    _expect(bool(user.reads), name, "no reads", "one or more")
    for i, read in enumerate(user.reads):
        where = f"{name}, reads[{i}]"
        _expect(0 <= read.value < values, where, f"value {read.value}", f"one of 0 to {values - 1}, which exist there")
        channels = graph.channels[read.value]
        slices = f"channels [{read.start}, {read.stop})"
        _expect(0 <= read.start < read.stop <= channels, where, slices, f"some of the {channels} of v{read.value}")
        _check_activation(where, read.act, read.slope)
        if read.norm is not None:
            norms = len(graph.norms)
            _expect(0 <= read.norm < norms, where, f"norm {read.norm}", f"one of the graph's {norms}")
            width, end = graph.norms[read.norm], read.at + read.channels
            slices = f"[{read.at}, {end}) of norm {read.norm}"
            _expect(0 <= read.at < end <= width, where, slices, f"some of its {width}")
    if isinstance(user, Sum):
        _check_activation(name, user.act, user.slope)
        widths = sorted({read.channels for read in user.reads})
        _expect(len(widths) == 1, name, f"{len(user.reads)} reads of {widths} channels", "one or more of one width")
    elif isinstance(user, Conv):
        _check_conv(name, user)
    elif isinstance(user, MaxPool):
        _expect(len(user.reads) == 1, name, f"{len(user.reads)} reads", "one")
        _expect(user.stride in (1, 2), name, f"stride {user.stride}", "1 or 2")
        odd_or_halves = user.size % 2 == 1 or user.size == user.stride
        _expect(user.size > 0 and odd_or_halves, name, f"size {user.size}", "an odd number, or 2 with stride 2")
    else:
        _expect(isinstance(user.pool, bool), name, f"pool {user.pool!r}", "True or False")


def _check_activation(where: str, act: str, slope: float) -> None:
    _expect(act in ACTIVATIONS, where, f"activation {act!r}", f"one of {', '.join(ACTIVATIONS)}")
    _expect(math.isfinite(slope), where, f"slope {slope}", "a finite number")


def _check_conv(name: str, conv: Conv) -> None:
    _expect(conv.out_channels > 0, name, f"out_channels {conv.out_channels}", "at least 1")
    _expect(conv.kernel in (1, 3), name, f"kernel {conv.kernel}", "1 or 3")
    _expect(conv.stride in (1, 2), name, f"stride {conv.stride}", "1 or 2")
    _expect(conv.stride == 1 or not conv.pool, name, "pool and a stride", "one of them")
    shared = f"{conv.groups} groups of {conv.in_channels} -> {conv.out_channels} channels"
    fits = conv.groups > 0 and conv.in_channels % conv.groups == conv.out_channels % conv.groups == 0
    _expect(fits, name, shared, "groups that divide both")
    _expect(0 <= conv.drop_rate < 1, name, f"drop_rate {conv.drop_rate}", "0 <= drop_rate < 1")
    alone = conv.kernel == 1 and not conv.bias
    expected = "it in front of a 1x1 without bias alone, where it equals pooling behind it"
    _expect(alone or not conv.pool, name, "pool", expected)
    _expect(isinstance(conv.pool, bool), name, f"pool {conv.pool!r}", "True or False")


def sizes(graph: Graph) -> list[str]:
    """Height and width of every value, then of every output, as what was done to those of the inputs, which are alike.

    "f": floor(size / 2), by pooling; "c": ceil(size / 2), by stride 2. ValueError for reads side by side that differ.
    """
    found = [""] * len(graph.inputs)
    for name, user in graph.users():
        found.append(_size(name, user, found))
    return found


def _size(name: str, user: Node | Write, found: list[str]) -> str:
    read = [found[read.value] for read in user.reads]
    words = [" after ".join(["the inputs' size", *(_HALVES[half] for half in size)]) for size in read]
    differs = next((i for i, size in enumerate(read) if size != read[0]), 0)
    _expect(not differs, f"{name}, reads[{differs}]", words[differs], f"{words[0]}, as reads[0]")
    pool = isinstance(user, (Conv, Write)) and user.pool
    return read[0] + "f" * pool + "c" * (isinstance(user, (Conv, MaxPool)) and user.stride == 2)


_HALVES = {"f": "pooling", "c": "stride 2"}


def _check_norms(graph: Graph, sizes: list[str]) -> None:
    """Each channel of a norm normalises one channel of one value, and all of them as many pixels."""
    normalises: list[dict[int, tuple[int, int]]] = [{} for _ in graph.norms]
    for name, user in graph.users():
        for i, read in enumerate(user.reads):
            if read.norm is not None:
                _normalise(normalises[read.norm], read, f"{name}, reads[{i}]")
    for norm, (channels, found) in enumerate(zip(graph.norms, normalises, strict=True)):
        _expect(channels > 0, f"norm {norm}", f"{channels} channels", "at least 1")
        unused = sorted({*range(channels)} - {*found})
        _expect(not unused, f"norm {norm}", f"no reader of channels {unused}", "reads that use all of them")
        first, *others = dict.fromkeys(value for value, _ in found.values())
        other = next((value for value in others if sizes[value] != sizes[first]), first)
        _expect(other == first, f"norm {norm}", f"v{first} and v{other}, which differ in size", "values of one size")


def _normalise(found: dict[int, tuple[int, int]], read: Read, where: str) -> None:
    for k in range(read.channels):
        at, source = read.at + k, (read.value, read.start + k)
        before = found.setdefault(at, source)
        text = f"channel {at} of norm {read.norm} on channel {source[1]} of v{source[0]}"
        _expect(before == source, where, text, f"it on channel {before[1]} of v{before[0]} alone, as in another read")


def _check_order(graph: Graph) -> None:
    """Every convolution and norm is listed once, with a name of its own."""
    convs = {("conv", i) for i, node in enumerate(graph.nodes) if isinstance(node, Conv)}
    there = convs | {("norm", i) for i in range(len(graph.norms))}
    listed = [(item.kind, item.index) for item in graph.order]
    _expect(len(listed) == len(there) and {*listed} == there, "order", f"{listed}", f"{sorted(there)}, each once")
    names = [item.name for item in graph.order]
    double = sorted({name for name in names if names.count(name) > 1})
    _expect(not double and all(names), "order", f"names {double or 'that are empty'}", "a name for each, once")
