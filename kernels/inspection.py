"""What a compiled kernel's binary says: registers, spills, shared memory, instructions, occupancy, the share of the matrix unit.

Reads SASS, as nvdisasm prints it, and the assembly of AMD's compiler; nothing needs a GPU. Limits are those of NVIDIA's CUDA
programming guide (compute capabilities 9.0 and 10.0) and AMD's CDNA3 and CDNA4 instruction set documents; peak rates and
bandwidths are the makers' published ones for H100 SXM, B200 (of an HGX board of eight), MI300X and MI355X, without sparsity.
"""

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Target:
    """Limits of one processor (a multiprocessor, SM, or a compute unit, CU), and what the whole GPU can do at best.

    registers      32-bit registers of a lane's column, all warps of a scheduler together: at most this many, over the warps
    macs           16-bit multiply-adds a cycle of one processor's matrix units, with fp32 accumulation
    issue          cycles between two instructions that one scheduler issues for its warps
    """

    backend: str  # as Triton names it, with the two that follow
    arch: int | str
    lanes: int  # of a warp
    part: str
    matrix: str
    processors: int
    registers: int
    register_step: int
    warps: int  # that one of the four schedulers can hold
    blocks: int
    shared_block: int
    shared: int
    shared_reserved: int
    macs: int
    issue: int
    tflops: float  # bf16 and fp16, dense
    terabytes: float  # a second, from the GPU's memory


SCHEDULERS = 4  # of a processor, of every target here
KIB = 1024
TARGETS = {
    "sm_90a": Target(
        "cuda", 90, 32, "H100 SXM", "wgmma", 132, 512, 8, 16, 32, 227 * KIB, 228 * KIB, KIB, 2048, 1, 989.4, 3.35
    ),
    "sm_100a": Target(
        "cuda", 100, 32, "B200", "tcgen05", 148, 512, 8, 16, 32, 227 * KIB, 228 * KIB, KIB, 4096, 1, 2250.0, 8.0
    ),
    "gfx942": Target(
        "hip", "gfx942", 64, "MI300X", "MFMA", 304, 512, 8, 8, 16, 64 * KIB, 64 * KIB, 0, 1024, 4, 1307.4, 5.3
    ),
    "gfx950": Target(
        "hip", "gfx950", 64, "MI355X", "MFMA", 256, 512, 8, 8, 16, 160 * KIB, 160 * KIB, 0, 2048, 4, 2516.6, 8.0
    ),
}  # fmt: skip
TENSOR_MEMORY = 512  # columns of an SM's tensor memory, sm_100a


@dataclass(frozen=True)
class Row:
    """What was found in one binary.

    registers      of a thread (AMD: vector registers of a lane, accumulation registers among them)
    spills         instructions that write registers to memory or read them back (AMD: registers so treated, and scalar ones that
                   move to lanes of vector registers, which is no memory, if the main loop moves any)
    shared         bytes of shared memory (AMD: LDS) of a block; limit: what a block can have on the target
    matrix         the matrix instructions used, with their shapes, and whether the kernel multiplies 16-bit operands (`product`)
    missing        the instruction that products of 8-bit operands, or of operands with scales, call for and don't use
    tma            loads and stores by the tensor memory accelerator
    wide, accesses of all accesses to global memory without it, those that move 16 bytes a thread
    occupancy      warps that registers, shared memory and tensor memory let a processor hold, of those that it can hold
    cycles, slots  of the main loop, once around, of one block: cycles that the matrix units are busy, and cycles that the
                   schedulers need to issue all instructions
    flags, polls   releases and acquires at system scope, by which devices tell each other what is done
    undrained      flags raised while another warp or wave of the block may still have stores on their way
    seconds        that the compiler took
    """

    target: str
    kernel: str = ""
    case: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    limit: int = 0
    matrix: str = ""
    product: bool = False
    missing: str = ""
    tma: int = 0
    wide: int = 0
    accesses: int = 0
    occupancy: float = 0.0
    cycles: float = 0.0
    slots: float = 0.0
    float_atomics: int = 0
    flags: int = 0
    polls: int = 0
    undrained: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def share(self) -> float | None:
        """Of the matrix unit's time, at most, in the main loop: its cycles over the longer of them and the issue slots."""
        return self.cycles / max(self.cycles, self.slots) if self.cycles else None

    def faults(self) -> list[str]:
        """Why the row fails, if it does."""
        if self.error:
            return [self.error]
        found = []
        if self.spills:
            found.append(f"{self.spills} register spills")
        if self.shared > self.limit:
            found.append(f"{self.shared} bytes of shared memory, the target has {self.limit}")
        if self.product and not self.matrix.startswith(TARGETS[self.target].matrix):
            found.append(f"no {TARGETS[self.target].matrix} instruction, but {self.matrix or 'none'}")
        if self.missing:
            found.append(f"no instruction {self.missing}")
        if self.float_atomics:
            found.append(f"{self.float_atomics} atomic operations on floats")
        if self.undrained:
            found.append(f"{self.undrained} flags raised before all stores are drained")
        return found

    def cells(self) -> list[str]:
        share = "" if self.share is None else f"{self.share:.0%} ({self.cycles:.0f} / {self.slots:.0f})"
        return [
            self.kernel, self.case, self.target, str(self.registers), str(self.spills),
            f"{self.shared / KIB:.1f} of {self.limit // KIB}", self.matrix or "none", str(self.tma),
            f"{self.wide} of {self.accesses}", f"{self.occupancy:.0%}", share,
        ]  # fmt: skip

    def line(self) -> str:
        state = "ok    " if not self.faults() else "FAILED"
        if self.error:
            return f"{state} {self.target:8} {self.kernel} [{self.case}] {self.error}"
        _, _, _, registers, spills, shared, matrix, tma, wide, occupancy, share = self.cells()
        return (
            f"{state} {self.target:8} {self.kernel} [{self.case}] {registers} registers, {spills} spills, {shared} KiB, "
            f"{matrix}, TMA {tma}, 16 bytes {wide}, occupancy {occupancy}, matrix share {share or 'none'}, "
            f"{f'{self.flags} flags, {self.polls} polls, ' if self.flags else ''}{self.seconds:.1f} s"
        )


HEADS = ["kernel", "case", "target", "registers", "spills", "shared KiB", "matrix instruction", "TMA", "16 bytes", "occupancy",
         "matrix share"]  # fmt: skip


def table(rows: Iterable[Row]) -> str:
    """A Markdown table of rows, those of a kernel and case together."""
    order = list(TARGETS)
    ordered = sorted(rows, key=lambda row: (row.kernel, row.case, order.index(row.target)))
    lines = [HEADS, ["---"] * len(HEADS)]
    lines += [[row.kernel, row.case, row.target, row.error] if row.error else row.cells() for row in ordered]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---------------------------------------------------------------- instructions and loops


class Code(NamedTuple):
    """A kernel's instructions in order, and where each label stands (the number of the instruction that follows)."""

    instructions: list[str]
    labels: dict[str, int]


def parse_sass(text: str) -> Code:
    """Of what `nvdisasm -c` prints for a binary with one kernel."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := re.match(r"(\.L_x_\d+):", line):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(match[1].strip("{} "))
    return Code(instructions, labels)


def parse_amdgcn(text: str) -> Code:
    """Of the assembly that AMD's compiler prints for one kernel."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for raw in text.splitlines():
        line = raw.split(";")[0].rstrip()
        if match := re.match(r"(\.LBB\d+_\d+):", line):
            labels[match[1]] = len(instructions)
        elif re.match(r"\s+[a-z]\w+(\s|$)", line):
            instructions.append(line.strip())
            if line.strip() == "s_endpgm" and ".Lfunc_end" in text.split(raw, 1)[1][:40]:
                break
    return Code(instructions, labels)


def parse_ptx(text: str) -> Code:
    """Of PTX with one kernel."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for raw in text.splitlines():
        line = raw.split("//")[0].strip()
        if match := re.match(r"(\$L\w+):", line):
            labels[match[1]] = len(instructions)
        elif line.endswith(";") and not line.startswith("."):
            instructions.append(line.replace("\t", " "))
    return Code(instructions, labels)


def jump(instruction: str) -> tuple[str | None, bool]:
    """(the label it may go to, whether it may also go on to the next instruction)."""
    # A predicate stands before the instruction, or, as a uniform one, between it and the label.
    if match := re.match(r"(@!?U?P\w+ )?BRA(?:\.\S+)? ([^`]*)`\((\.L_x_\d+)\)", instruction):
        return match[3], bool(match[1] or match[2])
    if match := re.match(r"s_(c?)branch\S* (\.LBB\d+_\d+)", instruction):
        return match[2], bool(match[1])
    if match := re.match(r"(@!?%p\w+ )?bra(?:\.uni)?\s+(\$L\w+);", instruction):
        return match[2], bool(match[1])
    return None, re.match(r"(EXIT|RET|s_endpgm|ret;)", instruction) is None


def loops(code: Code) -> list[set[int]]:
    """Natural loops: for each target of a jump back, the numbers of the instructions that are run on the way around.

    A jump is one back if its target stands on every path from the first instruction to it. Blocks that the compiler moved out of
    the way, such as the waiting for a barrier, jump back into the middle of a loop; they are no loops, but part of one.
    """
    count = len(code.instructions)
    jumps = [jump(instruction) for instruction in code.instructions]
    starts = {0} | {code.labels[label] for label, _ in jumps if label in code.labels}
    starts |= {i + 1 for i, (label, goes_on) in enumerate(jumps) if label or not goes_on}
    begins = sorted(start for start in starts if start < count)
    block_of = {begin: b for b, begin in enumerate(begins)}
    ends = [*begins[1:], count]
    after: list[list[int]] = []
    for end in ends:
        label, goes_on = jumps[end - 1]
        onward = [code.labels[label]] if label in code.labels else []
        onward += [end] if goes_on else []
        after.append([block_of[start] for start in onward if start in block_of])
    before: list[list[int]] = [[] for _ in begins]
    for b, targets in enumerate(after):
        for t in targets:
            before[t].append(b)
    # Bit d of dominators[b]: d stands on every path from the first block to b.
    everything = (1 << len(begins)) - 1
    dominators = [1] + [everything] * (len(begins) - 1)
    changed = True
    while changed:
        changed = False
        for b in range(1, len(begins)):
            common = functools.reduce(int.__and__, (dominators[p] for p in before[b]), everything) | 1 << b
            changed |= common != dominators[b]
            dominators[b] = common
    bodies: dict[int, set[int]] = {}
    for b, targets in enumerate(after):
        for head in targets:
            if dominators[b] >> head & 1:
                body = bodies.setdefault(head, {head})
                todo = [b]
                while todo:
                    block = todo.pop()
                    if block not in body:
                        body.add(block)
                        todo += before[block]
    return [{i for block in body for i in range(begins[block], ends[block])} for body in bodies.values()]


# ---------------------------------------------------------------- matrix instructions

# Of 16-bit operands a matrix unit does `macs` a cycle; of others, this many times that.
_SPEED = {
    "16": 1.0, "8": 2.0, "4": 4.0, "tf32": 0.5, "fp32 on gfx942": 1 / 8, "fp32 on gfx950": 1 / 16,
}  # fmt: skip


def matrix_instruction(instruction: str, target: str, tensor_macs: float = 0.0) -> tuple[str, float, int] | None:
    """(name with its shape, cycles of all four matrix units together, threads' warps that one of it serves), or None.

    `tensor_macs`: multiply-adds of one tcgen05 instruction, whose shape is in a register.
    """
    macs_a_cycle = TARGETS[target].macs
    if match := re.search(r"\b([HQI]G?MMA)\.(\d+)x(\d+)x(\d+)\.(\S+)", instruction):  # of a warp group
        m, n, k = (int(match[i]) for i in (2, 3, 4))
        kind = "8" if match[1] in ("QGMMA", "IGMMA") else "tf32" if "TF32" in match[5] else "16"
        return f"wgmma {m}x{n}x{k}", m * n * k / macs_a_cycle / _SPEED[kind], 4
    if match := re.search(r"\b[HIQ]MMA\.(?:\w+\.)*?(\d+)\.(\S+)", instruction):  # of a warp: 16816 is 16x8x16
        shape = {"1688": (16, 8, 8), "1684": (16, 8, 4), "16816": (16, 8, 16), "16832": (16, 8, 32)}.get(match[1])
        if shape is None:
            return None
        kind = "8" if shape[2] == 32 else "tf32" if "TF32" in match[2] else "16"
        name = f"mma {'x'.join(map(str, shape))}"
        return name, shape[0] * shape[1] * shape[2] / macs_a_cycle / _SPEED[kind], 1
    if match := re.search(r"\bUTC([A-Z]+MMA)\b", instruction):  # of a block
        return f"tcgen05 {match[1]}", tensor_macs / macs_a_cycle / _SPEED["16" if match[1] == "HMMA" else "8"], 0
    if match := re.match(r"v_s?mfma\w*?_f32_(\d+)x(\d+)x(\d+)(?:_\d+b)?_(\w+)", instruction):
        m, n, k = (int(match[i]) for i in (1, 2, 3))
        kinds = match[4]
        narrow = ("4" if "cbsz:4" in instruction else "8") if "8" in kinds else None
        kind = narrow or ("16" if "f16" in kinds else "tf32" if kinds == "xf32" else f"fp32 on {target}")
        scaled = " scaled" if "_scale_" in instruction else ""
        return f"MFMA {m}x{n}x{k} {kinds}{scaled}", m * n * k / macs_a_cycle / _SPEED[kind], 1
    return None


_TENSOR_DOT = re.compile(
    r"ttng\.tc_gen5_mma\w* .*?: !ttg\.memdesc<(\d+)x(\d+)x(\w+)[^>]*>.*?!ttg\.memdesc<(\d+)x(\d+)x"
)


def tensor_macs(ttgir: str) -> float:
    """Multiply-adds of one tcgen05 instruction: the mean over the kernel's products, of which each has M to 128 rows, N to 256
    columns and 32 bytes of depth."""
    macs = instructions = 0.0
    for match in _TENSOR_DOT.finditer(ttgir):
        m, k, kind, _, n = int(match[1]), int(match[2]), match[3], match[4], int(match[5])
        depth = 32 if "8" in kind else 8 if kind == "f32" else 16
        macs += m * n * k
        instructions += max(1, m // 128) * max(1, n // 256) * max(1, k // depth)
    return macs / instructions if instructions else 0.0


def main_loop(code: Code, target: str, warps: int, macs: float) -> tuple[float, float]:
    """(cycles, slots) of `Row`: of the innermost loop that keeps the matrix units busy longest.

    A loop's instructions are counted once each, also those of a branch not taken: where work is skipped, slots are too many.
    Not seen: waiting for memory or a result, bank conflicts, what other blocks on the same processor do meanwhile, and, on AMD,
    instructions of different kinds that different warps issue in the same cycle.
    """

    def busy(body: Iterable[int]) -> float:
        total = 0.0
        for i in body:
            if found := matrix_instruction(code.instructions[i], target, macs):
                _, cycles, served = found
                total += cycles * (warps / served if served else 1)
        return total

    body = busiest_loop(code, busy)
    return busy(body), len(body) * TARGETS[target].issue * warps / SCHEDULERS


def busiest_loop(code: Code, busy: Callable[[Iterable[int]], float]) -> frozenset[int]:
    """Of the innermost loops with work, the instructions of the busiest; of none where there is no work."""
    with_work = [body for body in loops(code) if busy(body)]
    innermost = [body for body in with_work if not any(other < body for other in with_work)]
    return frozenset(max(innermost, key=busy)) if innermost else frozenset()


def moves_lanes(code: Code) -> bool:
    """Whether a loop with matrix instructions moves scalar registers to or from lanes of vector registers."""
    work = [body for body in loops(code) if any("mfma" in code.instructions[i] for i in body)]
    innermost = [body for body in work if not any(other < body for other in work)]
    return any(re.match(r"v_(read|write)lane_b32", code.instructions[i]) for body in innermost for i in body)


# ---------------------------------------------------------------- one binary


def read(asm: Any, metadata: Any, target: str) -> Row:
    """The row of one kernel that `triton.compile` made: `asm` has its stages by name, `metadata` its numbers."""
    if TARGETS[target].backend == "cuda":
        sass, usage = _disassembled(asm["cubin"])
        code = parse_sass(sass)
        found = nvidia_figures(code, usage)
    else:
        code = parse_amdgcn(asm["amdgcn"])
        found = amd_figures(code, asm["amdgcn"])
    amd = TARGETS[target].backend == "hip"
    found |= system_flags(code if amd else parse_ptx(asm["ptx"]), amd)
    macs = tensor_macs(asm["ttgir"])
    names = {name[0] for i in code.instructions if (name := matrix_instruction(i, target, macs))}
    cycles, slots = main_loop(code, target, metadata.num_warps, macs)
    return Row(
        target=target,
        shared=metadata.shared,
        limit=TARGETS[target].shared_block,
        # The target's own first: an old instruction beside it does no harm.
        matrix=", ".join(sorted(names, key=lambda name: (not name.startswith(TARGETS[target].matrix), name))),
        product=multiplies_narrow(asm["ttir"]),
        missing=missing_instruction(asm["ttir"], asm["amdgcn" if amd else "ptx"], target),
        float_atomics=max(len(float_atomics(text)) for text in (asm["ttir"], "\n".join(code.instructions))),
        occupancy=occupancy(
            target, found["registers"], metadata.shared, metadata.num_warps, getattr(metadata, "tmem_size", 0) or 0
        ),
        cycles=cycles,
        slots=slots,
        **found,
    )


_STORED, _WRITTEN_BACK, _WAITED, _MET = range(
    4
)  # how far the stores of all warps are, on the worst way to an instruction


def system_flags(code: Code, amd: bool) -> dict[str, int]:
    """flags, polls and undrained of `Row`, from PTX or AMD's assembly.

    A release speaks for what its own warp stored, and on NVIDIA, where it is cumulative, for what others had stored before a
    barrier that it comes after. On AMD for its own wave alone: each wave must write back and wait, between its last store and the
    barrier.
    """
    guard = r"(@!?%p\d+ )?"
    kinds = []
    for i in code.instructions:
        if re.match(guard + r"st\.global|(global|buffer|flat)_store_", i):
            kinds.append("store")
        elif re.match(r"bar\.sync|barrier\.sync|s_barrier", i):
            kinds.append("meet")
        elif re.match(guard + r"atom\.global\.sys\.release|global_atomic_swap .*sc1", i):
            kinds.append("flag")
        elif re.match(guard + r"atom\.global\.sys\.acquire|buffer_inv sc0 sc1", i):
            kinds.append("poll")
        else:
            waits = i.startswith("s_waitcnt") and "vmcnt(0)" in i
            kinds.append("write back" if i.startswith("buffer_wbl2 sc0 sc1") else "wait" if waits else "")
    steps = {
        "store": lambda state: _STORED,
        "write back": lambda state: max(state, _WRITTEN_BACK),
        "wait": lambda state: _WAITED if state == _WRITTEN_BACK else state,
        "meet": lambda state: _MET if state >= _WAITED or not amd else state,
    }
    worst = {0: _MET}
    work = [0]
    while work:
        at = work.pop()
        after = steps.get(kinds[at], lambda state: state)(worst[at])
        label, goes_on = jump(code.instructions[at])
        for following in ([code.labels[label]] if label in code.labels else []) + ([at + 1] if goes_on else []):
            if following < len(kinds) and after < worst.get(following, _MET + 1):
                worst[following] = after
                work.append(following)
    undrained = sum(kind == "flag" and worst.get(at, _MET) < _MET for at, kind in enumerate(kinds))
    return {"flags": kinds.count("flag"), "polls": kinds.count("poll"), "undrained": undrained}


def nvidia_figures(code: Code, usage: str) -> dict[str, Any]:
    """Figures of `Row` from SASS, and from what `cuobjdump -res-usage` prints."""
    operations = [re.sub(r"^@!?U?P\w+ ", "", i).split(" ")[0] for i in code.instructions]
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    accesses = [o for o in operations if re.match(r"(LDG|STG|LDGSTS|LD|ST)(\.|$)", o)]
    return {
        "registers": int(registers[1]),
        "spills": sum(re.match(r"(STL|LDL)(\.|$)", o) is not None for o in operations),
        "tma": sum(o.startswith(("UTMALDG", "UTMASTG")) for o in operations),
        "wide": sum(".128" in o for o in accesses),
        "accesses": len(accesses),
    }


def amd_figures(code: Code, assembly: str) -> dict[str, Any]:
    """Figures of `Row` from the assembly of AMD's compiler and the notes at its end."""

    def noted(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert match, name
        return int(match[1])

    accesses = [i for i in code.instructions if re.match(r"(global|buffer|flat)_(load|store)_", i)]
    scratch = sum(i.startswith("scratch_") for i in code.instructions)
    return {
        "registers": noted("vgpr_count"),
        "spills": max(
            noted("vgpr_spill_count") + noted("sgpr_spill_count") * moves_lanes(code),
            scratch,
            noted("private_segment_fixed_size"),
        ),
        "tma": 0,
        "wide": sum(re.match(r"\w+?_dwordx4\b", i) is not None for i in accesses),
        "accesses": len(accesses),
    }


def occupancy(target: str, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> float:
    """Warps that a processor holds at once, of those it can hold, if there are blocks enough."""
    limits = TARGETS[target]
    step = limits.register_step
    by_registers = limits.registers // max(step, -(-registers // step) * step)
    if limits.backend == "cuda":  # 64 K registers; a warp takes them in steps of 256
        by_registers = 64 * KIB // (32 * max(step, -(-registers // step) * step)) // SCHEDULERS
    a_block = -(-warps // SCHEDULERS)  # warps of a block on each scheduler
    blocks = min(by_registers, limits.warps) // a_block
    if shared or limits.shared_reserved:
        blocks = min(blocks, limits.shared // (shared + limits.shared_reserved))
    if tensor_columns:
        blocks = min(blocks, TENSOR_MEMORY // tensor_columns)
    return min(blocks, limits.blocks) * warps / (limits.warps * SCHEDULERS)


def multiplies_narrow(ttir: str) -> bool:
    """Whether the kernel has a product (`tl.dot`, `tl.dot_scaled`) of operands of at most 16 bits."""
    return re.search(r"tt\.dot(_scaled)? .*: (tensor<\d+x\d+x(bf16|f16|f8\w+|i8)>)", ttir) is not None


# In PTX or AMD's assembly: products of fp8 operands, and of operands with scales where the hardware has such.
_FP8 = {
    "sm_90a": r"wgmma\.mma_async\S*k32\.f32\.e[45]m[23]", "sm_100a": r"tcgen05\.mma\S*kind::f8f6f4",
    "gfx942": r"v_mfma_f32_\w*[fb][pf]8_", "gfx950": r"v_mfma_\w*f8",
}  # fmt: skip
_SCALED = {"sm_100a": r"tcgen05\.mma\S*block_scale", "gfx950": r"v_mfma_scale_"}


def missing_instruction(ttir: str, assembly: str, target: str) -> str:
    """The pattern of the instruction that the products of `ttir` call for, if it isn't in the assembly; else nothing."""
    wanted = [_FP8[target]] if re.search(r"tt\.dot .*: tensor<\d+x\d+xf8", ttir) else []
    wanted += [_SCALED[target]] if "tt.dot_scaled" in ttir and target in _SCALED else []
    return ", ".join(pattern for pattern in wanted if not re.search(pattern, assembly))


_FLOAT_ATOMICS = re.compile(
    r"tt\.atomic_rmw fadd|tt\.descriptor_reduce add"  # Triton's IR
    r"|\b(?:ATOMG?|REDG?|ATOMS)\.\S*(?:F16|F32|F64|BF16|FADD)"  # SASS
    r"|\b(?:global|buffer|flat|ds)_(?:atomic_)?(?:pk_)?add_(?:rtn_)?(?:f16|bf16|f32|f64)"  # AMD
)


def float_atomics(text: str) -> list[str]:
    """Where TTIR, SASS or AMD assembly adds floats atomically: in an order, and so with a sum, that may change."""
    return _FLOAT_ATOMICS.findall(text)


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """(SASS, resource usage) of a binary, by the tools that ship with Triton."""
    from triton import knobs

    def run(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return run(knobs.nvidia.nvdisasm.path, "-c", file.name), run(
            knobs.nvidia.cuobjdump.path, "-res-usage", file.name
        )
