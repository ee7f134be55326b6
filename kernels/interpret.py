"""`jit`: Triton's compiler where there is a GPU; where there is none, Triton's interpreter, made exact.

What a kernel file uses in place of `triton.jit`. It decides once, for the whole process and its children:

    TRITON_INTERPRET set    1 interprets, 0 compiles (so ahead-of-time compilation works without a GPU)
    not set                 interprets where torch sees no GPU, and sets the variable

The interpreter of Triton 3.7.1 runs a kernel's operations with numpy, which knows neither bf16 nor fp8: it keeps their bits in
integers, and multiplies and adds those. Here, every conversion and every product goes through torch instead:

    conversions   as torch's, rounded to nearest even (toward zero on request). fp8: what is too large becomes 448 in e4m3fn,
                  infinite in e5m2, NaN in the kinds without infinity of AMD's gfx942. GPUs differ there: a kernel clamps first
    tl.dot        operands exactly as fp32, summed in fp32; of fp32 operands, the bits that TF32 has, unless the kernel says
                  input_precision="ieee": what would lose precision on a GPU loses it here
    tl.dot_scaled exactly the values that codes and scales (e8m0 as uint8, or e4m3) stand for, summed in fp32
    other arithmetic in bf16 or fp8 raises NotImplementedError: kernels do it in fp32

What the interpreter cannot show: what happens at the same time. It runs the programs of a grid one after another.
"""

import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

np = interpreter.np  # blocks are numpy's arrays
INTERPRET = os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1").lower() in (
    "1", "true", "yes", "on", "y",
)  # fmt: skip

# Floats that numpy doesn't have, and the unsigned integers that hold their bits.
PACKED = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
# In these numpy must not compute: it would add up bits.
ARITHMETIC = """
    fadd fmul fdiv frem fsub fma precise_divf minimumf minnumf maximumf maxnumf clampf cos sin exp exp2 log log2 erf sqrt rsqrt
    precise_sqrt floor ceil fcmpOLT fcmpOGT fcmpOLE fcmpOGE fcmpOEQ fcmpONE fcmpULT fcmpUGT fcmpULE fcmpUGE fcmpUEQ fcmpUNE
""".split()


def jit(function: Callable[..., Any], any_value: tuple[str, ...] = ()) -> Any:
    """`triton.jit`, or its interpreted twin. Launched the same way: `kernel[grid](...)`. any_value: integers of which Triton
    makes no other code where they are 1 or multiples of 16."""
    return InterpretedFunction(function) if INTERPRET else triton.jit(function, do_not_specialize=any_value)


def _values(handle: TensorHandle) -> torch.Tensor:
    """The values of a block, in a type that torch computes in."""
    data, packed = torch.from_numpy(np.array(handle.data)), PACKED.get(handle.dtype.scalar)
    return data if packed is None else data.view(packed)


def _handle(values: torch.Tensor, scalar: tl.dtype) -> TensorHandle:
    packed = PACKED.get(scalar)
    bits = values if packed is None else values.view(torch.uint16 if packed.itemsize == 2 else torch.uint8)
    return TensorHandle(bits.numpy(), scalar)


def _cast(builder: Any, source: TensorHandle, target: tl.dtype, rounding: Any = None) -> TensorHandle:
    """A conversion between any two types; `rounding` of floats: to nearest even unless it says toward zero."""
    scalar = target.scalar
    if scalar not in PACKED and source.dtype.scalar not in PACKED and rounding is None:
        return TensorHandle(source.data.astype(interpreter._get_np_dtype(scalar)), scalar)
    wanted = PACKED.get(scalar) or getattr(torch, interpreter._get_np_dtype(scalar).name)
    values = _values(source)
    if values.dtype is torch.float64 and wanted.itemsize < 4:
        # torch converts fp64 to small types through fp32: two roundings.
        raise NotImplementedError(f"{source.dtype.scalar} to {scalar}: convert to fp32 first")
    result = values.to(wanted)
    if rounding == interpreter._ir.ROUNDING_MODE.RTZ and wanted.itemsize < values.dtype.itemsize:
        away = result.to(values.dtype).abs() > values.abs()
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[wanted.itemsize]
        result = (result.view(integer) - away.to(integer)).view(wanted)  # one step toward zero, whatever the sign
    return _handle(result, scalar)


def _operand(handle: TensorHandle, precision: Any) -> Any:
    """Exactly the values of a product's operand, as fp32 where they are shorter; of fp32, as many bits as `precision` keeps."""
    scalar = handle.dtype.scalar
    if not scalar.is_floating() or scalar == tl.float64:
        return handle.data
    values = _values(handle).float().numpy()
    if scalar == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
        bits = values.view(np.uint32)  # to nearest, 10 of the 23 bits stay; infinities and NaN as they are
        values = np.where(np.isfinite(values), ((bits + 0x1000) & 0xFFFFE000).view(np.float32), values)
    return values


def _dot(
    builder: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, imprecise: Any
) -> TensorHandle:
    product = np.matmul(_operand(a, precision), _operand(b, precision), dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _scaled(codes: TensorHandle, scale: TensorHandle | None, kind: Any) -> torch.Tensor:
    """Values (·, K), fp32, of codes with scales (·, K / group). 4-bit codes are two a byte, the first in the low bits."""
    if kind == interpreter._ir.ScaleDotElemTypeTY.E2M1:
        half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nibbles = torch.from_numpy(np.stack((codes.data & 15, codes.data >> 4), axis=-1)).flatten(-2)
        values = torch.cat((half, -half))[nibbles.long()]
    else:
        values = _values(codes).float()
    if scale is None:
        return values
    if scale.dtype.scalar == tl.uint8:
        scales = torch.from_numpy(np.array(scale.data)).view(torch.float8_e8m0fnu).float()
    else:
        scales = _values(scale).float()
    return values * scales.repeat_interleave(values.shape[-1] // scales.shape[-1], -1)


def _dot_scaled(
    builder: Any, a: TensorHandle, a_scale: TensorHandle | None, a_kind: Any, b: TensorHandle, b_scale: TensorHandle | None,
    b_kind: Any, fast: bool, a_k_pack: bool, b_k_pack: bool, d: TensorHandle,
) -> TensorHandle:  # fmt: skip
    if not (a_k_pack and b_k_pack):
        raise NotImplementedError("tl.dot_scaled of 4-bit codes that are packed along another dimension than K")
    across = TensorHandle(np.swapaxes(b.data, -1, -2), b.dtype.scalar)
    left, right = _scaled(a, a_scale, a_kind), _scaled(across, b_scale, b_kind)
    return TensorHandle(np.matmul(left.numpy(), right.mT.numpy()) + d.data, d.dtype.scalar)


def _named_formats(original: Callable[..., Any]) -> Callable[..., Any]:
    """`tl.dot_scaled` wants its formats as the compiler passes names; interpreted, they are strings."""

    def dot_scaled(semantic: Any, *arguments: Any) -> Any:
        return original(semantic, *(tl.constexpr(a) if isinstance(a, str) else a for a in arguments))

    return dot_scaled


def _refusing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def method(builder: Any, *arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, TensorHandle) and argument.dtype.scalar in PACKED:
                raise NotImplementedError(f"{name} in {argument.dtype.scalar}: convert to fp32 first")
        return original(builder, *arguments)

    return method


def _reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(operation: Any, values: Any) -> Any:
        for value in values if isinstance(values, tuple) else (values,):
            if value.dtype.scalar in PACKED:
                raise NotImplementedError(f"a reduction or scan in {value.dtype.scalar}: convert to fp32 first")
        return original(operation, values)

    return apply


def _interpret_library() -> None:
    """Triton's own functions (tl.sum, tl.sort, …) were made when triton was imported: maybe before anyone asked to interpret.

    And the language is patched once: the interpreter does it for every launch and every call of a function, which takes longer
    than many a kernel.
    """
    twins: dict[int, InterpretedFunction] = {}
    for module in (tl.standard, tl.random, tl.core, tl):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                twin = twins.setdefault(id(value), InterpretedFunction(value.fn))
                setattr(module, name, twin)
                if getattr(tl.tensor, name, None) is value:  # also a method, which must be a plain function
                    setattr(tl.tensor, name, lambda *a, twin=twin, **k: twin(*a, **k))
    interpreter._patch_lang(_sees_the_language)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    known = tl.dtype.to_ir  # to which Triton forgot to add AMD's fp8

    def to_ir(dtype: tl.dtype, builder: Any) -> Any:
        return (
            getattr(builder, f"get_{dtype}_ty")() if dtype in (tl.float8e4b8, tl.float8e5b16) else known(dtype, builder)
        )

    tl.dtype.to_ir = to_ir


core = tl.core  # next to `tl` among the globals of this module, where `_patch_lang` looks for what to patch


def _sees_the_language() -> None: ...


def _quietly(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(kernel: Any, *arguments: Any, **named: Any) -> Any:
        with np.errstate(all="ignore"):  # numpy warns of infinities, a GPU doesn't
            return original(kernel, *arguments, **named)

    return run


def _make_fast() -> None:
    """Without work whose result nobody sees: of every integer sum, difference and product Triton computes whether it overflows,
    for an assertion that only `debug` makes; with every value, it makes anew numpy's table of types, and its shape."""
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    types: dict[str, Any] = {}
    find = interpreter._get_np_dtype

    def numpy_type(kind: tl.dtype) -> Any:
        scalar = kind.scalar
        if scalar.name not in types:
            types[scalar.name] = find(scalar)
        return types[scalar.name]

    interpreter._get_np_dtype = numpy_type
    shapes: dict[Any, tuple[Any, tl.constexpr]] = {}  # of sizes

    def tensor(self: tl.tensor, handle: TensorHandle, kind: tl.dtype) -> None:
        sizes = tuple(kind.shape.values) if kind.is_block() else ()
        if sizes not in shapes:
            shapes[sizes] = (tl.tuple([tl.constexpr(n) for n in sizes]), tl.constexpr(math.prod(sizes)))
        self.shape, self.numel = shapes[sizes]
        self.handle, self.type, self.dtype = handle, kind, kind.scalar

    tl.tensor.__init__ = tensor
    blocks: dict[Any, dict[str, Any]] = {}
    make = tl.block_type.__init__

    def block(self: tl.block_type, scalar: tl.dtype, shape: Any) -> None:
        key = (scalar.name, *(getattr(n, "value", n) for n in shape))
        if key not in blocks:
            make(self, scalar, shape)
            blocks[key] = vars(self)
        self.__dict__ = blocks[key]

    tl.block_type.__init__ = block


def _make_exact() -> None:
    for name in "si_to_fp ui_to_fp fp_to_si fp_to_ui fp_ext fp_trunc fp_to_fp".split():
        setattr(InterpreterBuilder, f"create_{name}", _cast)
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.create_dot_scaled = _dot_scaled
    TritonSemantic.dot_scaled = _named_formats(TritonSemantic.dot_scaled)
    for name in ARITHMETIC:
        setattr(InterpreterBuilder, f"create_{name}", _refusing(name, getattr(InterpreterBuilder, f"create_{name}")))
    InterpretedFunction.run = _quietly(InterpretedFunction.run)
    interpreter.ReduceScanOpInterface.apply = _reduce(interpreter.ReduceScanOpInterface.apply)


if INTERPRET:
    _interpret_library()
    _make_exact()
    _make_fast()


def _rest() -> None:
    time.sleep(1e-4)  # another process, that this one waits for, may need the processor


def _nothing() -> None:
    pass


# Called by kernels that wait for another rank, once a poll.
pause = _rest if INTERPRET else jit(_nothing)
