"""Exchanges of a step between ranks of one machine, on CPUs: through memory that they share.

    1. what the others shall get is copied into the outbox, memory that they have mapped too, and each is told where it lies
    2. who waits for an exchange hears that, copies from the others' outboxes into its result, and says so
    3. when all have said so, the room is free again

What they tell each other are messages of a few bytes over Unix sockets, which carry the descriptor of a new outbox too. So the
kernel of the system wakes who waits, puts memory in order, and tells at once of a rank that has ended. There are no threads: an
exchange makes way when it begins and when it is waited for. Gloo's own exchange copies as often, but through its threads, which
must find a core, and through the network's stack.

A socket has room for some 270 messages. Who finds none for a part hears the others until there is, so that two who tell each
other more than that don't wait for one another; that something was read is told later, for nobody waits to hear it. A channel
belongs to one thread: on CPUs, backward runs in the thread that asked for it.

An outbox grows when what lies in it has no room; then it is a new one, of at least twice the size. Nothing of it has a name, and
nothing is left of it when the processes are gone. Ranks on several machines, or that cannot reach each other, use what
torch.distributed has. Sums are in the order of ranks, so all give the same bits.
"""

import contextlib
import mmap
import os
import secrets
import select
import socket
import struct
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.kernels.symmetric import ALIGN
from moesaic.parallel import trace

# Kinds of messages: (LAID, exchange, place, bytes), (READ, exchange, 0, 0), (BOX, 0, 0, bytes).
LAID, READ, BOX = range(3)
MESSAGE, DESCRIPTOR = struct.Struct("=4q"), struct.Struct("i")
FIRST_BOX = 2**20  # bytes
SPIN = 1e-4  # seconds of asking again before a rank sleeps until it is woken, which takes as long
PAUSE = 10  # milliseconds that a rank sleeps at most before it looks again whether there is room for a message
Laid = tuple[Tensor, int, int]  # an outbox, and where in it


class Channel:
    """The ranks of a group, connected. sockets: to each other one; names: their ranks in the run; patience: seconds."""

    def __init__(self, rank: int, sockets: dict[int, socket.socket], names: list[int], patience: float) -> None:
        self.rank, self.sockets, self.names = rank, sockets, names
        self.begun = 0
        self.box = torch.empty(0, dtype=torch.uint8)
        self.live: dict[int, tuple[int, int, set[int]]] = {}  # exchange -> (from, to, who has not read it yet)
        self.boxes: dict[int, Tensor] = {}  # the newest of each rank
        # Exchanges that this rank has read, of which another has not been told yet.
        self.untold: dict[int, deque[int]] = {w: deque() for w in sockets}
        self.laid: dict[tuple[int, int], Laid] = {}  # (rank, exchange) -> where, of what was heard and not read
        self.be_patient(patience)

    def be_patient(self, seconds: float) -> None:
        self.patience = seconds
        whole, fraction = divmod(seconds, 1)
        for other in self.sockets.values():
            other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(whole), int(1e6 * fraction)))

    def begin(self, parts: Sequence[Tensor]) -> int:
        """Lay down parts[w] for each other rank w; the same tensor for several is laid down once. The number of the exchange."""
        self.hear_all()
        self.tell_read()
        self.begun += 1
        different = {id(parts[w]): as_bytes(parts[w]) for w in self.sockets}
        at = first = self.room(max(1, sum(up(part.numel()) for part in different.values())))
        places = {}
        for key, part in different.items():
            self.box[at : at + part.numel()].copy_(part)
            places[key], at = at, at + up(part.numel())
        self.live[self.begun] = first, at, set(self.sockets)
        for w in self.sockets:
            self.say(w, LAID, self.begun, places[id(parts[w])], different[id(parts[w])].numel())
        return self.begun

    def came(self, number: int) -> dict[int, Tensor]:
        """Wait for the others' parts of an exchange: their bytes by rank, until `done` is called."""
        for w in self.sockets:
            while (w, number) not in self.laid:
                self.wait(w)
        laid = {w: self.laid.pop((w, number)) for w in self.sockets}
        return {w: box[place : place + size] for w, (box, place, size) in laid.items()}

    def done(self, number: int) -> None:
        """Their bytes have been read."""
        for numbers in self.untold.values():
            numbers.append(number)
        self.tell_read()

    def tell_read(self) -> None:
        """As far as there is room."""
        for w, numbers in self.untold.items():
            while numbers and self.send(w, READ, numbers[0]):
                numbers.popleft()

    def room(self, size: int) -> int:
        """Where in the outbox that many bytes are free; in a new one, if nowhere."""
        at = 0
        for start, stop, _ in sorted(self.live.values(), key=lambda region: region[0]):
            if start - at >= size:
                break
            at = max(at, stop)
        if at + size > self.box.numel():
            new = max(FIRST_BOX, 2 * self.box.numel(), 2 * size)
            fd = os.memfd_create("moesaic-outbox")
            try:
                os.ftruncate(fd, new)
                self.box, self.live, at = mapped(fd, new), {}, 0
                for w in self.sockets:
                    self.say(w, BOX, 0, 0, new, fd)
            finally:
                os.close(fd)
        return at

    def send(self, w: int, kind: int, number: int, place: int = 0, size: int = 0, fd: int | None = None) -> bool:
        """A message to rank w; whether there was room for it."""
        lent = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, DESCRIPTOR.pack(fd))]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # has ended: who waits for it will hear that
            try:
                self.sockets[w].sendmsg([MESSAGE.pack(kind, number, place, size)], lent, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
        return True

    def say(self, w: int, *message: Any) -> None:
        """`send`, when there is room. Raises TimeoutError if there is none for too long."""
        end = time.monotonic() + self.patience
        while not self.send(w, *message):
            if time.monotonic() > end:
                raise self.late(w)
            self.hear_all()
            room = select.poll()
            room.register(self.sockets[w], select.POLLOUT)
            room.poll(PAUSE)

    def hear_all(self) -> None:
        """Take what messages there are."""
        for w in self.sockets:
            while self.hear(w, socket.MSG_DONTWAIT):
                pass

    def late(self, w: int) -> TimeoutError:
        return TimeoutError(f"rank {self.names[w]} did not come to an exchange for {self.patience:g} s")

    def hear(self, w: int, flags: int = 0) -> bool:
        """Take a message of rank w, if there is one; without MSG_DONTWAIT, wait for it as long as the socket does."""
        try:
            message, lent, _, _ = self.sockets[w].recvmsg(MESSAGE.size, socket.CMSG_LEN(DESCRIPTOR.size), flags)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # it ended without reading all; what it has sent comes next
            return self.hear(w, flags)
        if not message:
            if flags:
                return False
            raise ConnectionError(f"rank {self.names[w]} has ended")
        kind, number, place, size = MESSAGE.unpack(message)
        if kind == BOX:
            (fd,) = DESCRIPTOR.unpack(lent[0][2])
            self.boxes[w] = mapped(fd, size)
            os.close(fd)
        elif kind == LAID:
            self.laid[w, number] = self.boxes[w], place, size
        elif number in self.live:  # else it lay in an older outbox
            missing = self.live[number][2]
            missing.discard(w)
            if not missing:
                del self.live[number]
        return True

    def wait(self, w: int) -> None:
        """Take a message of rank w. Raises ConnectionError if it has ended, TimeoutError if it says nothing for too long."""
        end = time.monotonic() + SPIN
        while time.monotonic() < end:
            if self.hear(w, socket.MSG_DONTWAIT):
                return
            os.sched_yield()
        if not self.hear(w):
            raise self.late(w)


def up(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def mapped(fd: int, size: int) -> Tensor:
    with torch.inference_mode(False):  # it outlives an evaluation in which it is made
        return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)


# ---------------------------------------------------------------- who can reach whom

_channels: "weakref.WeakKeyDictionary[dist.ProcessGroup, Channel | None]" = weakref.WeakKeyDictionary()


def channel_of(group: dist.ProcessGroup | None, tensor: Tensor) -> Channel | None:
    """That of the group, made at its first exchange, which is collective; None where there can't be one."""
    group = group or dist.distributed_c10d._get_default_group()
    if group not in _channels:
        usable = tensor.device.type == "cpu" and "gloo" in dist.get_backend(group) and hasattr(os, "memfd_create")
        _channels[group] = connect(group) if usable and group.size() > 1 else None
    return _channels[group] if tensor.device.type == "cpu" else None


def machine() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def connect(group: dist.ProcessGroup) -> Channel | None:
    """Collective. None, on all ranks, where they are on several machines or one of them cannot reach another."""
    rank, ranks = group.rank(), group.size()

    def exchange(value: Any) -> list[Any]:
        values: list[Any] = [None] * ranks
        dist.all_gather_object(values, value, group=group)
        return values

    # One of Linux's abstract names: in no folder, and gone with the socket. Others on the machine can see it, but not the word.
    name, word = f"\0moesaic-{secrets.token_hex(8)}", secrets.token_bytes(16)
    sockets: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        own = None
        with contextlib.suppress(OSError):  # a container may refuse any of these
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            listener.bind(name)
            listener.listen(ranks)
            os.close(os.memfd_create("moesaic-outbox"))
            own = machine(), name, word
        told = exchange(own)
        reached = all(told) and len({where for where, _, _ in told}) == 1
        try:
            for w in range(rank) if reached else ():
                sockets[w] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                sockets[w].connect(told[w][1])
                sockets[w].send(told[w][2] + rank.to_bytes(4))
        except OSError:
            reached = False
        if not all(exchange(reached)):
            for other in sockets.values():
                other.close()
            return None
        while len(sockets) < ranks - 1:
            other, _ = listener.accept()
            said = b""
            with contextlib.suppress(OSError):  # ours have said it by now
                said = other.recv(20, socket.MSG_DONTWAIT)
            if said[:16] == word:
                sockets[int.from_bytes(said[16:])] = other
            else:  # none of ours
                other.close()
    patience = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return Channel(rank, dict(sorted(sockets.items())), dist.get_process_group_ranks(group), patience)


# ---------------------------------------------------------------- the exchanges


class Pending(dist.Work):
    """An exchange that has begun. Its result is there after `wait`."""

    def __init__(self, finish: Callable[[], None]) -> None:
        super().__init__()
        self.finish: Callable[[], None] | None = finish
        self.future: torch.futures.Future[None] = torch.futures.Future()

    def wait(self, timeout: Any = None) -> bool:
        if self.finish:
            self.finish()
            self.finish = None
            self.future.set_result(None)
        return True

    def get_future(self) -> torch.futures.Future[None]:
        return self.future


@trace.noted
def all_to_all_single(
    output: Tensor, input: Tensor, output_split_sizes: list[int] | None = None, input_split_sizes: list[int] | None = None,
    group: dist.ProcessGroup | None = None, async_op: bool = False,
) -> Any:  # fmt: skip
    """torch.distributed's. Tensors are contiguous."""
    channel = channel_of(group, input)
    if channel is None:
        return dist.all_to_all_single(output, input, output_split_sizes, input_split_sizes, group, async_op)
    out, into = parts(input, input_split_sizes, channel), parts(output, output_split_sizes, channel)
    with operation("all_to_all_single", [output, input]):
        return begin(channel, out, into, async_op)


@trace.noted
def all_gather_single(
    output: Tensor, input: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> Any:
    """torch.distributed's, along dimension 0. Where there is no shared memory it is one exchange, instead of gloo's ring."""
    channel = channel_of(group, input)
    if channel is None:
        ranks = dist.get_world_size(group)
        repeated = input.repeat(ranks, *[1] * (input.dim() - 1))
        return dist.all_to_all_single(output, repeated, group=group, async_op=async_op)
    into = parts(output, None, channel)
    with operation("all_gather_single", [output, input]):
        return begin(channel, [input] * len(into), into, async_op)


@trace.noted
def reduce_scatter_single(output: Tensor, input: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """torch.distributed's sum along dimension 0, in the order of ranks. Gloo reduces all to all ranks: twice the bytes."""
    channel = channel_of(group, input)
    if channel is None:
        came = torch.empty_like(input)
        dist.all_to_all_single(came, input, group=group)
        add(output, came.chunk(dist.get_world_size(group)))
        return
    own = parts(input, None, channel)
    with operation("reduce_scatter_single", [output, input]):
        number = channel.begin(own)
        came_W = channel.came(number)
        add(
            output, [came_W[w].view(part.dtype).view(part.shape) if w in came_W else part for w, part in enumerate(own)]
        )
        channel.done(number)


def operation(name: str, tensors: list[Tensor]) -> AbstractContextManager[None]:
    """In torch's traces, the block is an operator of this name. It costs nothing where there is none."""
    of_torch: AbstractContextManager[None] = torch._C._profiler._RecordFunctionFast(f"shared_memory::{name}", tensors)
    return of_torch


def begin(channel: Channel, out: Sequence[Tensor], into: Sequence[Tensor], async_op: bool) -> Pending | None:
    number, own = channel.begin(out), channel.rank
    if into[own].data_ptr() != out[own].data_ptr():  # FSDP2 gathers into what holds this rank's part already
        into[own].copy_(out[own])

    def finish() -> None:
        for w, came in channel.came(number).items():
            as_bytes(into[w]).copy_(came)
        channel.done(number)

    if async_op:
        return Pending(finish)
    finish()
    return None


def parts(tensor: Tensor, sizes: list[int] | None, channel: Channel) -> Sequence[Tensor]:
    assert tensor.is_contiguous(), tensor.stride()
    return tensor.split(sizes) if sizes is not None else tensor.chunk(len(channel.names))


def add(output: Tensor, parts: Sequence[Tensor]) -> None:
    torch.add(parts[0], parts[1], out=output)
    for part in parts[2:]:
        output += part
