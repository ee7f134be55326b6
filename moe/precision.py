"""Recipes of low precision: which numbers the products of a layer are made of, forward and backward.

A linear layer y = x W^T is three products, and each has two operands, quantized along what the product adds up:

    fprop    y  = x W^T        x: rows are tokens                 w: rows are outputs     adds up over inputs
    dgrad    dx = dy W         dy: rows are tokens                w: rows are inputs      adds up over outputs
    wgrad    dW = dy^T x       dy: rows are outputs               x: rows are inputs      adds up over tokens

A recipe, `recipes/precision/NAME.yaml`, says of each operand what it becomes (moesaic.kernels.quantize has the words), of each
product whether a random rotation joins its operands, and which layers stay high. What is not said stays as it is: fp32 or bf16,
as `compute` says. Always high: router, embeddings, head, norms, attention's own products, sums, weights and moments.

**Emulated**: the products multiply what hardware would, exactly, in fp32, on any device; moesaic.moe.low has them. **Native**, on
devices whose matrix units have these products: moesaic.moe.native. `Precision.native` decides, and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.hadamard import SIZES
from moesaic.kernels.quantize import BLOCKS, CLIPS, ELEMENTS, ROUNDINGS, SCALES, Format
from moesaic.kernels.scaled_formats import TARGETS_OF, name_of
from moesaic.kernels.tiles import known_tile, target_name
from moesaic.moe.config import require

LAYERS = ("attention", "dense", "experts")
SIGNS = ("none", "fixed", "step")
SOURCES = ("high", "fprop")
DISPATCHES = ("high", "fp8")
COMBINES = ("high", "bf16", "logfmt8", "logfmt10")


@dataclass
class OperandConfig:
    """One operand of a product.

    element   e4m3, e5m2, e2m1, int8 or int4 (null: not quantized here)
    block     rows x columns that share a scale; columns along what the product adds up
    scale     fp32, pow2, e8m0 or e4m3 (the last over a factor of the tensor)
    rule      how a scale follows from its block; see moesaic.kernels.quantize
    rounding  even, stochastic or eden
    source    of dgrad.w and wgrad.x. high: the tensor itself; fprop: what fprop made of it, which is kept packed and cast again,
              or with element=null used as it is
    """

    element: str | None = None
    block: str = "1x32"
    scale: str = "e8m0"
    rule: str = "rceil"
    rounding: str = "even"
    source: str = "high"


@dataclass
class FpropConfig:
    """The product of the forward pass, y = x w.

    rotation  columns that a Hadamard matrix mixes in both operands (0: none)
    signs     random ones before it: none, fixed, or drawn anew at each step
    """

    x: OperandConfig = field(default_factory=OperandConfig)
    w: OperandConfig = field(default_factory=OperandConfig)
    rotation: int = 0
    signs: str = "none"


@dataclass
class DgradConfig:
    """The gradient of the input, dx = dy w; knobs as of fprop."""

    dy: OperandConfig = field(default_factory=OperandConfig)
    w: OperandConfig = field(default_factory=OperandConfig)
    rotation: int = 0
    signs: str = "none"


@dataclass
class WgradConfig:
    """The gradient of the weight, dw = dy x; knobs as of fprop."""

    dy: OperandConfig = field(default_factory=OperandConfig)
    x: OperandConfig = field(default_factory=OperandConfig)
    rotation: int = 0
    signs: str = "none"


@dataclass
class PrecisionConfig:
    """What matrix products are made of.

    recipe        its name, for messages and results
    compute       the type of products that are not quantized and of what is between products; weights, gradients' sums and
                  optimizer are fp32. auto: bf16 on CUDA, fp32 on a CPU
    fprop, dgrad, wgrad   the products of quantized layers, see above
    layers        which are: attention (projections), dense (feed-forward layers and shared experts), experts (routed)
    high_first, high_last   blocks at the beginning and the end that stay high
    high_tail     share of the run's steps, at its end, in which everything is high
    dispatch      rows on their way to experts on other ranks. high: in the compute type; fp8: E4M3 with a power of two for each
                  128, 1 byte and 1/128 a value
    combine       and on their way back. high; bf16; logfmt8, logfmt10: logarithms of 8 or 10 bits (DeepSeek, arXiv 2505.09343)
    deosc_period  steps of a window after which weights that hop between two values of fprop's cast are put on one (0: never)
    deosc_ratio   ... where the cast moved so many times farther than the weight
    deosc_start   step at which the first window begins
    """

    recipe: str = "custom"
    compute: str = "auto"
    fprop: FpropConfig = field(default_factory=FpropConfig)
    dgrad: DgradConfig = field(default_factory=DgradConfig)
    wgrad: WgradConfig = field(default_factory=WgradConfig)
    layers: list[str] = field(default_factory=lambda: list(LAYERS))
    high_first: int = 0
    high_last: int = 0
    high_tail: float = 0.0
    dispatch: str = "high"
    combine: str = "high"
    deosc_period: int = 0
    deosc_ratio: float = 16.0
    deosc_start: int = 0

    def __post_init__(self) -> None:
        one_of = (("compute", ("auto", "fp32", "bf16")), ("dispatch", DISPATCHES), ("combine", COMBINES))
        for name, choices in one_of:
            value = getattr(self, name)
            require(value in choices, f"precision.{name}={value}: must be one of {', '.join(choices)}")
        for kind in self.layers:
            require(kind in LAYERS, f"precision.layers={self.layers}: must be some of {', '.join(LAYERS)}")
        for name in ("high_first", "high_last", "deosc_period", "deosc_start"):
            require(getattr(self, name) >= 0, f"precision.{name}={getattr(self, name)}: must not be negative")
        require(0 <= self.high_tail < 1, f"precision.high_tail={self.high_tail}: must lie in 0..1, and below 1")
        require(self.deosc_ratio > 1, f"precision.deosc_ratio={self.deosc_ratio}: must be above 1")
        for product in ("fprop", "dgrad", "wgrad"):
            self._check_product(product, getattr(self, product))
        w, rotation = self.fprop.w, self.fprop.rotation
        require(self.deosc_period == 0 or (w.element is not None and w.rounding == "even" and rotation == 0),
                f"precision.deosc_period={self.deosc_period}: needs a precision.fprop.w of rounding=even without "
                f"precision.fprop.rotation, has element={w.element}, rounding={w.rounding} and {rotation}")  # fmt: skip

    @property
    def quantized(self) -> bool:
        """Whether any product is."""
        return any(operand.element for product in PRODUCTS for _, operand in operands(getattr(self, product)))

    @property
    def chance(self) -> bool:
        """Whether any cast draws random numbers."""
        every = [operand for product in PRODUCTS for _, operand in operands(getattr(self, product))]
        return any(operand.element and operand.rounding != "even" for operand in every)

    def quantizes(self, kind: str) -> bool:
        """Whether products of `kind`, one of LAYERS, are quantized."""
        return self.quantized and kind in self.layers

    def _check_product(self, name: str, product: Any) -> None:
        knob = f"precision.{name}"
        require(product.rotation in (0, *SIZES),
                f"{knob}.rotation={product.rotation}: must be one of 0, {', '.join(map(str, SIZES))}")  # fmt: skip
        require(product.signs in SIGNS, f"{knob}.signs={product.signs}: must be one of {', '.join(SIGNS)}")
        require(product.signs == "none" or product.rotation > 0,
                f"{knob}.signs={product.signs}: needs a {knob}.rotation above 0")  # fmt: skip
        for side, operand in operands(product):
            _check_operand(f"{knob}.{side}", operand, name, side, product, self.fprop)


PRODUCTS = ("fprop", "dgrad", "wgrad")


def operands(product: Any) -> list[tuple[str, OperandConfig]]:
    return [(f.name, getattr(product, f.name)) for f in fields(product) if f.name in ("x", "w", "dy")]


def block_of(operand: OperandConfig) -> tuple[int, int]:
    rows, _, columns = operand.block.partition("x")
    return int(rows), int(columns)


def _check_operand(knob: str, o: OperandConfig, product: str, side: str, p: Any, fprop: FpropConfig) -> None:
    blocks = [f"{n}x{k}" for n, k in BLOCKS]
    for name, choices in (("block", blocks), ("scale", tuple(SCALES)), ("rounding", ROUNDINGS), ("source", SOURCES)):
        value = getattr(o, name)
        require(value in choices, f"{knob}.{name}={value}: must be one of {', '.join(choices)}")
    require(o.element is None or o.element in ELEMENTS,
            f"{knob}.element={o.element}: must be one of {', '.join(ELEMENTS)}, or null")  # fmt: skip
    from_fprop = (product, side) in (("dgrad", "w"), ("wgrad", "x"))
    require(o.source == "high" or from_fprop,
            f"{knob}.source={o.source}: must be high, for only dgrad.w and wgrad.x were operands of fprop")  # fmt: skip
    first = getattr(fprop, side, None) if from_fprop else None
    if o.source == "fprop":
        assert first is not None
        require(first.element is not None, f"{knob}.source=fprop: precision.fprop.{side} is not quantized")
        square = len(set(block_of(first))) == 1
        require(o.element is not None or (square and p.rotation == 0),
                f"{knob}.element=null with source=fprop: uses the cast of precision.fprop.{side} as it is, and needs a square "
                f"block and no rotation, not {first.block} and {p.rotation}; or an element, to cast again")  # fmt: skip
    elif from_fprop and fprop.rotation:  # this product's result is the gradient of the other operand of fprop
        name = "x" if side == "w" else "w"
        other = getattr(fprop, name)
        require(other.rule != "quest" or other.element is None,
                f"{knob}.source=high: must be fprop, for what precision.fprop.{name}.rule=quest clips is told in the space of "
                f"precision.fprop.rotation={fprop.rotation}")  # fmt: skip
    require(o.rule in SCALES[o.scale],
            f"{knob}.rule={o.rule}: must be one of {', '.join(SCALES[o.scale])} with {knob}.scale={o.scale}")  # fmt: skip
    if o.element is None:
        return
    require(o.scale != "e4m3" or o.element in ("e2m1", "int4"),
            f"{knob}.scale=e4m3: is for elements of 4 bits, not {o.element}")  # fmt: skip
    for name, value in (("rule", "four_six"), ("rule", "quest"), ("rounding", "eden")):
        require(getattr(o, name) != value or o.element == "e2m1",
                f"{knob}.{name}={value}: is for element=e2m1, not {o.element}")  # fmt: skip
    require(o.rule != "quest" or product == "fprop", f"{knob}.rule=quest: is for precision.fprop")
    require(o.rule not in ("four_six", "quest") or o.rounding == "even",
            f"{knob}.rounding={o.rounding}: must be even with {knob}.rule={o.rule}")  # fmt: skip
    require(o.rounding != "stochastic" or o.rule not in CLIPS,
            f"{knob}.rounding=stochastic: has a bias with {knob}.rule={o.rule}, which clips; shrink does not")  # fmt: skip
    if o.rounding == "eden":
        rows, columns = block_of(o)
        require(o.scale == "e4m3" and rows == 1,
                f"{knob}.rounding=eden: needs {knob}.scale=e4m3 and one row a block, not {o.scale} and {o.block}")  # fmt: skip
        require(p.rotation > 0 and p.rotation % columns == 0 and p.signs == "step",
                f"{knob}.rounding=eden: needs precision.{product}.signs=step and a rotation in whole blocks of {o.block}, not "
                f"{p.signs} and {p.rotation}")  # fmt: skip


def without_effect(config: PrecisionConfig, steps: int) -> list[str]:
    """A line for each knob that a run of so many steps is given for nothing."""
    found = []
    first = config.deosc_start + config.deosc_period
    if not config.quantized:
        plain = PrecisionConfig()
        knobs = [
            k for k in ("layers", "high_first", "high_last", "high_tail") if getattr(config, k) != getattr(plain, k)
        ]
        knobs += [f"{p}.rotation" for p in PRODUCTS if getattr(config, p).rotation]
        found += [
            f"precision.{knob}: does nothing, for precision={config.recipe} quantizes no product" for knob in knobs
        ]
    elif config.high_tail and tail_of(config, steps) >= steps:
        found.append(f"precision.high_tail={config.high_tail}: is no step of train.steps={steps}")
    if config.deosc_period and first > tail_of(config, steps):
        found.append(f"precision.deosc_start={config.deosc_start}: the first window of precision.deosc_period="
                     f"{config.deosc_period} does not end within what train.steps={steps} quantizes")  # fmt: skip
    return found


def tail_of(config: PrecisionConfig, steps: int) -> int:
    """The step, from 0, from which on everything is high."""
    return round((1 - config.high_tail) * steps)


def of_fp8_block(config: PrecisionConfig) -> bool:
    """Whether products are those of recipes/precision/fp8_block.yaml: E4M3 in 1x128, weights in 128x128 whose cast serves forward
    and backward, scales powers of two that never clip, no rotation."""

    def form(o: OperandConfig) -> tuple[object, ...]:
        return o.element, o.block, o.scale in ("pow2", "e8m0"), o.rule, o.rounding, o.source

    f, d, w = config.fprop, config.dgrad, config.wgrad
    tile = ("e4m3", "1x128", True, "rceil", "even")
    return (
        f.rotation == d.rotation == w.rotation == 0
        and all(form(o) == (*tile, "high") for o in (f.x, d.dy, w.dy))
        and form(w.x) == (*tile, "fprop")
        and form(f.w) == ("e4m3", "128x128", True, "rceil", "even", "high")
        and (d.w.element, d.w.source) == (None, "fprop")
    )


# ---------------------------------------------------------------- where products are native


def unit_formats(config: PrecisionConfig) -> list[str]:
    """What matrix units must multiply for the recipe, of moesaic.kernels.scaled_formats. Raises ValueError, with the knob, where
    none can: an operand that stays high, or two of different formats, or a block that a product cannot take."""
    names = []
    for product in PRODUCTS:
        found = {}
        for side, operand in operands(getattr(config, product)):
            knob = f"precision.{product}.{side}"
            if operand.element is None and operand.source == "fprop":
                operand = getattr(config.fprop, side)
            require(
                operand.element is not None,
                f"{knob}.element=null: no matrix unit multiplies it with numbers of 8 or 4 bits",
            )
            form = Format(str(operand.element), block_of(operand), operand.scale, operand.rule, operand.rounding)
            try:
                found[side] = name_of(form)
            except ValueError as error:
                raise ValueError(f"{knob}.{error}") from None
            rows = 128 if side == "w" and found[side] == "fp8" else 1
            require(form.block[0] == rows or (side == "w" and rows == 1),
                    f"{knob}.block={operand.block}: matrix units take {rows}x{form.block[1]}")  # fmt: skip
        one, other = found.values()
        require(
            one == other,
            f"precision.{product}: {' times '.join(found)} is {one} times {other}, which no matrix unit multiplies",
        )
        names.append(one)
    return list(dict.fromkeys(names))


def why_not_native(config: PrecisionConfig, device: torch.device) -> str | None:
    """Why the device has no products of the recipe, in one line; None where it has."""
    try:
        names = unit_formats(config)
    except ValueError as error:
        return str(error)
    if not known_tile(device):
        return f"precision={config.recipe}: no tiles are known for {device}"
    target = target_name(device)
    for name in names:
        if target not in TARGETS_OF[name]:
            has = ", ".join(TARGETS_OF[name])
            return f"precision={config.recipe}: {target} has no products of {name}, only {has}"
    return None


# ---------------------------------------------------------------- of a run


@dataclass(frozen=True)
class Operand:
    form: Format | None
    source: str


@dataclass(frozen=True)
class Product:
    rotation: int
    signs: str
    sides: dict[str, Operand]

    @property
    def run(self) -> int:
        """Columns that are quantized or rotated together: what is added up goes in whole runs."""
        return max([self.rotation, *(o.form.block[1] for o in self.sides.values() if o.form)], default=1) or 1


def compile_product(product: Any) -> Product:
    def form(o: OperandConfig) -> Format | None:
        return Format(o.element, block_of(o), o.scale, o.rule, o.rounding) if o.element else None

    return Product(product.rotation, product.signs, {s: Operand(form(o), o.source) for s, o in operands(product)})


class Precision:
    """The recipe of a model, and where the run, of `seed`, is: what its quantized layers share.

    `begin` tells the step, `tokens` whose they are that the next forward pass sees: chance depends on both and on nothing
    else, so that every layout draws the same.
    """

    def __init__(self, config: PrecisionConfig, seed: int = 0, backend: str = "torch") -> None:
        self.config, self.seed, self.backend = config, seed, backend
        self.chosen: dict[torch.device, bool] = {}  # what `native` found
        self.products = {name: compile_product(getattr(config, name)) for name in PRODUCTS}
        self.step, self.tail, self.high = 0, False, not config.quantized
        self.switch: Callable[[bool], None] = lambda tail: (
            None
        )  # told when the high tail of a run begins, or a run goes back
        self.ids_T: Tensor | None = None
        self.chance = config.chance
        # The last two casts of inputs, for others that read them: a shared expert has two before the routed ones cast, MLA's
        # queries two before its latent; each for its own stream. See moesaic.moe.low.
        self.casts: list[Any] = []
        self.signs: dict[Any, Tensor] = {}  # those of this step's rotations; all layers share them
        self.weights: dict[
            str, Any
        ] = {}  # moesaic.moe.low.Weight of each parameter that is cast, by its name in the model

    def native(self, device: torch.device) -> bool:
        """Whether products on the device are made by kernels (moesaic.moe.native), not emulated, as `model.experts_backend` says.
        triton: by kernels, which a CPU interprets; ValueError where the device has none such. auto: on a GPU that has them.
        torch, reference: emulated."""
        if device not in self.chosen:
            why = None if self.backend in ("torch", "reference") else why_not_native(self.config, device)
            require(
                self.backend != "triton" or why is None,
                f"model.experts_backend=triton: {why}; auto and torch emulate it",
            )
            self.chosen[device] = self.backend == "triton" or (
                self.backend == "auto" and device.type == "cuda" and why is None
            )
        return self.chosen[device]

    def told(self, device: torch.device) -> str:
        """How quantized products are made on the device, for the head of a run."""
        if self.native(device):
            return "by kernels" + ("" if device.type == "cuda" else ", interpreted")
        why = why_not_native(self.config, device) if self.backend == "auto" and device.type == "cuda" else None
        return f"emulated, as {why}" if why else "emulated"

    def begin(self, step: int, steps: int) -> None:
        """Step `step` of `steps`, from 0, begins."""
        self.step, self.casts, self.signs = step, [], {}
        tail = step >= tail_of(self.config, steps)
        self.high = tail or not self.config.quantized
        if tail != self.tail:
            self.tail = tail
            self.switch(tail)

    def tokens(self, first_sequence: int | None, sequences: int = 0, length: int = 0, device: Any = None) -> None:
        """The next forward pass is over `sequences` of `length` tokens from number `first_sequence` of the run's data on (None:
        over tokens without numbers, as in an evaluation)."""
        self.casts, self.ids_T = [], None
        if first_sequence is not None and self.chance and not self.high:
            first = first_sequence * length
            self.ids_T = torch.arange(first, first + sequences * length, device=device)

    def numbers(self, count: int, device: torch.device) -> Tensor:
        """int64 (count,), the numbers of the tokens of this forward pass."""
        return torch.arange(count, device=device) if self.ids_T is None else self.ids_T
