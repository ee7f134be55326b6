"""What ranks find out about each other before a run: whether rows arrive as they left, products are right, clocks agree, and how
fast the links are. Every function is collective, and gives all ranks the same."""

import hashlib
import time
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Speed:
    """Between two ranks: bytes a second that each sends while it receives as many, and half of a small message's way there and
    back, in seconds."""

    ranks: tuple[int, int]
    bytes_s: float
    latency: float


def gather(value: T) -> list[T]:
    """What each rank gives, by rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def pairings(world: int) -> list[list[tuple[int, int]]]:
    """Rounds in which every rank meets at most one other; in all of them each meets each once (the circle method)."""
    seats: list[int | None] = [*range(world), *([None] if world % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        pairs = zip(seats[: len(seats) // 2], reversed(seats), strict=False)
        rounds.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def link_speeds(device: torch.device, size: int, repeats: int = 5) -> list[Speed]:
    """Of every pair of ranks, pairs of a round at the same time. `size`: bytes of a large message; the best of `repeats` counts,
    and of latencies the middle one of 4 * `repeats`. All by batches, even of one message: NCCL makes a communicator for each two
    ranks that send without (github.com/pytorch/pytorch/issues/152220)."""
    rank, mine = dist.get_rank(), []
    small, other = (torch.zeros(1, device=device) for _ in range(2))
    out = torch.zeros(size // 4, device=device)
    back = torch.zeros_like(out)
    for pairs in pairings(dist.get_world_size()):
        dist.barrier()
        for a, b in pairs:
            if rank not in (a, b):
                continue
            peer = b if rank == a else a
            ways, sent = [], []
            for _ in range(1 + 4 * repeats):
                began = time.perf_counter()
                ways_there = (dist.P2POp(dist.isend, small, peer), dist.P2POp(dist.irecv, other, peer))
                for way in ways_there if rank == a else ways_there[::-1]:
                    _do([way], device)
                ways.append((time.perf_counter() - began) / 2)
            for _ in range(1 + repeats):
                began = time.perf_counter()
                _do([dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, back, peer)], device)
                sent.append(time.perf_counter() - began)
            if rank == a:
                mine.append(Speed((a, b), 4 * out.numel() / min(sent[1:]), median(ways[1:])))
    return sorted((speed for part in gather(mine) for speed in part), key=lambda speed: speed.ranks)


def wrong_rows(device: torch.device, rows: int = 509, width: int = 64) -> list[str]:
    """A line for each pair of ranks between which rows of an uneven all-to-all, some of them none, did not come as they left."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def count(source: int, target: int) -> int:
        return (source * 131 + target * 17) % rows

    def content(source: int, target: int) -> torch.Tensor:
        n = count(source, target) * width
        mixed = (torch.arange(n) * 2_654_435_761 + source * 1_000_003 + target * 7_919) % 2_147_483_647
        return mixed.to(torch.int32).view(-1, width)

    sends, receives = [count(rank, r) for r in range(world)], [count(r, rank) for r in range(world)]
    out = torch.cat([content(rank, target) for target in range(world)]).to(device)
    back = torch.full((sum(receives), width), -1, dtype=torch.int32, device=device)
    dist.all_to_all_single(back, out, receives, sends)
    wrong = []
    for source, part in enumerate(back.cpu().split(receives)):
        bad = (part != content(source, rank)).any(dim=1).sum().item()
        if bad:
            wrong.append(f"from rank {source} to rank {rank} {bad} of {receives[source]} rows are not what was sent")
    return [line for lines in gather(wrong) for line in lines]


def wrong_products(device: torch.device, dtype: torch.dtype, kind: str, n: int, repeats: int) -> list[str]:
    """A line for each rank whose n x n matrix products are not right.

    Products of small whole numbers are known to the bit, in whatever order they are added: sums stay below 2^24, and each fits
    bf16 and tf32. Products of other numbers use all bits: a rank must get the same ones `repeats` times, and those that most
    ranks with the same `kind` of device get. Where two ranks are of a kind and differ, both are named. So is a device that gives
    an error.
    """
    wrong, digests, error = 0, Counter[str](), ""
    try:
        wrong, digests = _products(device, dtype, n, repeats)
    except RuntimeError as failure:  # what torch makes of an error of the device
        error = str(failure).partition("\n")[0]
    found = gather((kind, wrong, digests, error))
    lines = []
    for rank, (its_kind, bad, seen, failed) in enumerate(found):
        usual = Counter(d for k, _, others, _ in found if k == its_kind for d in others).most_common(2)
        tie = len(usual) > 1 and usual[0][1] == usual[1][1]
        if failed:
            lines.append(f"rank {rank} ({its_kind}): {failed}")
        elif bad:
            lines.append(f"rank {rank} ({its_kind}): {bad} values of a product of whole numbers are wrong")
        elif len(seen) > 1:
            lines.append(f"rank {rank} ({its_kind}): the same product came out in {len(seen)} ways")
        elif usual[0][0] not in seen or tie:
            lines.append(
                f"rank {rank} ({its_kind}): a product has other bits than on {'another rank' if tie else 'most ranks'}"
            )
    return lines


def _products(device: torch.device, dtype: torch.dtype, n: int, repeats: int) -> tuple[int, Counter[str]]:
    """Wrong values of the worst product of whole numbers, and how often each digest of the other product came."""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (n, n), generator=random) for _ in range(2))
    a[:, 512:] = 0  # 512 * 127^2 < 2^24
    right = (a[:, :512].double() @ b[:512].double()).to(dtype)
    x, y = (torch.randn(n, n, generator=random).to(device, dtype) for _ in range(2))
    wrong, digests = 0, Counter[str]()
    a, b = a.to(device, dtype), b.to(device, dtype)
    rounded = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (
        False  # sums of parts in bf16 would not be exact
    )
    try:
        for _ in range(repeats):
            wrong = max(wrong, int((torch.mm(a, b).cpu() != right).sum()))
            bits = torch.mm(x, y).cpu().view(torch.uint8).numpy().tobytes()
            digests[hashlib.blake2b(bits, digest_size=16).hexdigest()] += 1
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = rounded
    return wrong, digests


def clock_offsets(repeats: int = 10) -> list[tuple[float, float]]:
    """By rank: seconds by which its clock is ahead of rank 0's, and by how much that may be wrong: half of the quickest message's
    way there and back."""
    rank, offsets = dist.get_rank(), [(0.0, 0.0)]
    said = torch.zeros(1, dtype=torch.float64)
    for other in range(1, dist.get_world_size()):
        found = []
        for _ in range(repeats):
            if rank == 0:
                began = time.time()
                dist.send(said, other)
                dist.recv(said, other)
                ended = time.time()
                found.append(((ended - began) / 2, said.item() - (began + ended) / 2))
            elif rank == other:
                dist.recv(said, 0)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0)
        if rank == 0:
            doubt, offset = min(found)
            offsets.append((offset, doubt))
    return gather(offsets)[0]


def _do(work: list[dist.P2POp], device: torch.device) -> None:
    for request in dist.batch_isend_irecv(work):
        request.wait()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
