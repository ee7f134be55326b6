"""Collectives of a rank, and what it did between them, as an execution trace of Chakra: what network simulators such as ASTRA-sim
replay (github.com/mlcommons/chakra, schema/protobuf/et_def.proto, 0.0.4; arXiv 2305.14516).

The file holds messages one after the other, each behind its length: GlobalMetadata, then a Node for each collective and for each
stretch of work between them. A stretch waits for the stretch before it and for the collectives that had ended when it began; a
collective for the stretch in which it was issued. So the graph has the order that was seen, and no time that was waited: a
simulator puts its own in.

torch's own execution trace beside it, which Chakra's tools read too, has every operator, but over gloo no collective that they
know as one.
"""

from collections.abc import Iterable

from moesaic.parallel.collectives import KERNEL, Event
from moesaic.parallel.trace import short

COMPUTE, COLLECTIVE = 4, 7  # NodeType
# CollectiveCommType, by how an operation's name begins; the longest name first.
TYPES = {"reduce_scatter": 7, "all_reduce": 0, "all_gather": 2, "all_to_all": 6, "broadcast": 5, "scatter": 4, "barrier": 9,
         "gather": 3, "reduce": 1}  # fmt: skip
Attribute = int | bool | str


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def number(field: int, n: int) -> bytes:
    return varint(field << 3) + varint(n)


def block(field: int, content: bytes | str) -> bytes:
    """A text, a message, or packed numbers."""
    content = content.encode() if isinstance(content, str) else content
    return varint(field << 3 | 2) + varint(len(content)) + content


def attribute(name: str, value: Attribute) -> bytes:
    if isinstance(value, bool):
        return block(1, name) + number(27, value)
    return block(1, name) + (number(9, value) if isinstance(value, int) else block(29, value))


def node(
    at: int, name: str, kind: int, waits_for: Iterable[int], began: float, us: float, attributes: dict[str, Attribute]
) -> bytes:
    """began, us: microseconds."""
    return (
        number(1, at) + block(2, name) + number(3, kind) + block(5, b"".join(map(varint, waits_for)))
        + number(6, max(0, round(began))) + number(7, max(0, round(us)))
        + b"".join(block(10, attribute(*item)) for item in attributes.items())
    )  # fmt: skip


def execution_trace(events: list[Event], rank: int, names: dict[str, str], began: float, ended: float) -> bytes:
    """Of a step from `began` to `ended`, seconds of the clock of the events. names: of groups. What fused kernels store has no
    time of its own, and is left out."""
    made = [block(1, "0.0.4") + block(2, attribute("rank", rank))]
    running: list[tuple[float, int]] = []  # (end, node) of collectives that no stretch waits for yet
    before: list[int] = []
    since = began

    def stretch(to: float, phase: str) -> int:
        nonlocal before, running
        over = [at for end, at in running if end <= since]
        running = [(end, at) for end, at in running if end > since]
        at = len(made)
        told: dict[str, Attribute] = {"is_cpu_op": False, "phase": phase}
        made.append(node(at, "compute", COMPUTE, before + over, 1e6 * (since - began), 1e6 * (to - since), told))
        before = [at]
        return at

    for e in sorted((e for e in events if e.operation != KERNEL), key=lambda e: e.began):
        issued = stretch(max(since, e.began), e.phase)
        at, kind = len(made), next(n for name, n in TYPES.items() if e.operation.startswith(name))
        told: dict[str, Attribute] = {
            "is_cpu_op": False, "comm_type": kind, "comm_size": e.buffer, "pg_name": names.get(e.group, e.group),
            "ranks": short(e.ranks),
            "layer": e.layer, "module": e.module, "phase": e.phase, "purpose": e.purpose, "operation": e.operation,
        }  # fmt: skip
        for hop in ("intra", "inter"):
            told |= {f"sent_{hop}": e.sent.get(hop, 0), f"received_{hop}": e.received.get(hop, 0)}
        title = " ".join(filter(None, (e.layer, e.module, e.purpose, e.operation)))
        made.append(node(at, title, COLLECTIVE, [issued], 1e6 * (e.began - began), 1e6 * (e.time - e.wait), told))
        end = e.began + e.time
        running.append((end, at))
        # A rank that does nothing else goes on at the end; one that does, at once.
        since = end if e.exposed >= 0.999 * e.time else max(since, e.began)
    stretch(max(since, ended), "optimizer")
    return b"".join(varint(len(message)) + message for message in made)
