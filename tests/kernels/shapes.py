"""Sizes for kernel tests: those that find mistakes, and a strategy that draws others."""

from collections.abc import Callable

from hypothesis import strategies as st

# T tokens, E experts, K experts per token: one of each; E no power of two; K = E; more experts than rows; many tokens.
ROUTED = (
    {"T": 1, "E": 1, "K": 1},
    {"T": 1, "E": 7, "K": 3},
    {"T": 9, "E": 5, "K": 5},
    {"T": 33, "E": 12, "K": 2},
    {"T": 6, "E": 130, "K": 4},
    {"T": 70, "E": 3, "K": 1},
)


@st.composite
def routed(draw: Callable, tokens: int = 40, experts: int = 20, **widths: int) -> dict[str, int]:
    """T, E, K, and further sizes from 1 up to what `widths` says, mostly no multiples of anything."""
    shape = {"T": draw(st.integers(1, tokens)), "E": draw(st.integers(1, experts))}
    shape["K"] = draw(st.integers(1, shape["E"]))
    return shape | {name: draw(st.integers(1, most)) for name, most in widths.items()}
