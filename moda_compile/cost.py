"""What depth costs, as formulas: parameters, FLOPs, memory traffic and saved memory.

Source: arXiv 2603.15619 (its Table 1 compares the mechanisms).  Everything is a SymPy
expression in the symbols of this module, so a size may be a number or another expression.  One
FLOP is one multiplication or one addition.  Imports neither torch nor the rest of this package.

`python -m moda_compile.cost` prints the table of asymptotics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import sympy

FFNKV = Literal["none", "projected", "shared"]

#: Batch, tokens, width, layers, query heads per KV head, KV heads, head dim of keys and of values.
B, T, D, L, G, HK, HEAD_DIM, VALUE_DIM = sympy.symbols(
    "B T D L G Hk d dv", positive=True, integer=True
)
#: Bytes of one element of K or V, and of one element of the gradient accumulator.
ELEMENT, ACCUMULATOR = sympy.symbols("element accumulator", positive=True, integer=True)
#: Query heads Hq = G * Hk.
HQ = G * HK

#: K and V of one slot, in elements: [B, Hk, T, d] and [B, Hk, T, dv].
_SLOT = B * HK * T * (HEAD_DIM + VALUE_DIM)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One layer's or one model's depth, on top of what it does without.

    Attributes:
        parameters: new parameters.
        depth_flops_forward: scores and weighted sum over the slots.
        depth_flops_backward: recomputed scores, dp, dq, dk and dv.
        projection_flops_forward: the FFNs' K/V projections.
        projection_flops_backward: gradients of their input and weight.
        bytes_read_forward: slot keys and values, read by the attention.
        bytes_read_backward: slot keys and values again, and the gradient accumulator.
        bytes_written_backward: the gradient accumulator.
        saved_bytes: memory held from forward to backward: the FFN slots.  The attention's own keys
            and values are held anyway.
        accumulator_bytes: memory of the gradient accumulator in backward, K and V of every slot.
    """

    parameters: sympy.Expr
    depth_flops_forward: sympy.Expr
    depth_flops_backward: sympy.Expr
    projection_flops_forward: sympy.Expr
    projection_flops_backward: sympy.Expr
    bytes_read_forward: sympy.Expr
    bytes_read_backward: sympy.Expr
    bytes_written_backward: sympy.Expr
    saved_bytes: sympy.Expr
    accumulator_bytes: sympy.Expr

    @property
    def flops(self) -> sympy.Expr:
        """All FLOPs of one training step."""
        return (
            self.depth_flops_forward
            + self.depth_flops_backward
            + self.projection_flops_forward
            + self.projection_flops_backward
        )

    @property
    def bytes_moved(self) -> sympy.Expr:
        """All depth traffic of one training step."""
        return self.bytes_read_forward + self.bytes_read_backward + self.bytes_written_backward

    @property
    def memory_bytes(self) -> sympy.Expr:
        """Largest extra memory of one training step."""
        return self.saved_bytes + self.accumulator_bytes

    def evaluate(self, **sizes: Any) -> Cost:
        """The same with sizes put in, by symbol name: `evaluate(B=1, T=4096, L=36, Hk=8, ...)`.

        Args:
            sizes: any of B, T, D, L, G, Hk, d, dv, element, accumulator; numbers or SymPy
                expressions. dv is d where only that is given.

        Raises:
            ValueError: for a name that is none of these.
        """
        symbols = (B, T, D, L, G, HK, HEAD_DIM, VALUE_DIM, ELEMENT, ACCUMULATOR)
        by_name = {s.name: s for s in symbols}
        unknown = sorted(set(sizes) - set(by_name))
        if unknown:
            raise ValueError(f"sizes: got {unknown}, expected some of {sorted(by_name)}")
        if "d" in sizes:
            sizes = {"dv": sizes["d"], **sizes}
        values = {by_name[name]: sympy.sympify(value) for name, value in sizes.items()}
        return Cost(
            **{
                field.name: sympy.sympify(getattr(self, field.name)).subs(values, simultaneous=True)
                for field in fields(self)
            }
        )


def slots_read(layer: Any, ffn_kv: FFNKV) -> sympy.Expr:
    """Slots that `layer` (from 0) reads: one per earlier layer's attention, and one per FFN."""
    return sympy.sympify(layer) * _slots_per_layer(ffn_kv)


def layer_cost(slots: Any, *, writes: bool = True, ffn_kv: FFNKV = "none") -> Cost:
    """Cost of one layer that reads `slots` slots.

    Forward, per token, query head and slot: 2d for the score and 2dv for the weighted value.
    Backward: 2d each for the recomputed score, dq and dk, 2dv for dp and the value's gradient.
    Bytes: forward reads K and V of every slot; backward reads them again and reads, adds to and
    writes the slot's accumulator.  A layer that writes slots also clears its rows of the
    accumulator once and takes them out once.
    (Where gradients are gathered, see `passes.gather`, backward moves less and has no accumulator.
    Where dv is not d, the kernels' rows are as long as the longer of both; see `passes.lower`.)

    Args:
        slots: S, a number or an expression.
        writes: whether the layer writes slots (the last layer does not).
        ffn_kv: whether its FFN writes one, and from which weights; see `MoDAConfig.ffn_kv`.
    """
    slots = sympy.sympify(slots)
    written = sympy.Integer(_slots_per_layer(ffn_kv) if writes else 0)
    projected = sympy.Integer(1 if writes and ffn_kv != "none" else 0)
    matrix = D * HK * (HEAD_DIM + VALUE_DIM)  # key and value weight [Hk * d, D], [Hk * dv, D]
    return Cost(
        parameters=projected * matrix if ffn_kv == "projected" else sympy.Integer(0),
        depth_flops_forward=2 * B * T * HQ * slots * (HEAD_DIM + VALUE_DIM),
        depth_flops_backward=B * T * HQ * slots * (6 * HEAD_DIM + 4 * VALUE_DIM),
        projection_flops_forward=projected * 2 * B * T * matrix,
        projection_flops_backward=projected * 4 * B * T * matrix,
        bytes_read_forward=slots * _SLOT * ELEMENT,
        bytes_read_backward=slots * _SLOT * (ELEMENT + ACCUMULATOR) + written * _SLOT * ACCUMULATOR,
        bytes_written_backward=(slots + written) * _SLOT * ACCUMULATOR,
        saved_bytes=projected * _SLOT * ELEMENT,
        accumulator_bytes=written * _SLOT * ACCUMULATOR,
    )


def model_cost(ffn_kv: FFNKV = "none") -> Cost:
    """Closed form over L layers: layer l reads the slots of layers < l; the last one writes none.

    Pairs of a layer and a slot that it reads: L (L - 1) / 2 with attention slots only, twice that
    with FFN slots.
    """
    layer = sympy.Symbol("layer", integer=True, nonnegative=True)
    reading = layer_cost(slots_read(layer, ffn_kv), writes=False, ffn_kv=ffn_kv)
    writing = layer_cost(0, writes=True, ffn_kv=ffn_kv)
    totals = {}
    for field in fields(Cost):
        read = sympy.summation(getattr(reading, field.name), (layer, 0, L - 1))
        totals[field.name] = sympy.factor(read + (L - 1) * getattr(writing, field.name))
    return Cost(**totals)


def _slots_per_layer(ffn_kv: FFNKV) -> int:
    if ffn_kv not in ("none", "projected", "shared"):
        raise ValueError(f"ffn_kv: got {ffn_kv!r}, expected 'none', 'projected' or 'shared'")
    return 1 if ffn_kv == "none" else 2


# ------------------------------------------------- the paper's Table 1, from the formulas above

ROWS = ("parameters", "decoding cache", "prefill cache", "decode FLOPs", "prefill FLOPs")


def _mechanisms() -> Mapping[str, Mapping[str, sympy.Expr]]:
    """Exact costs of the three depth mechanisms for one sequence, in T, L, D and G.

    The width is that of all query heads, D = Hq * d, so one slot's K or V has D / G elements.
    """
    layer = sympy.Symbol("layer", integer=True, nonnegative=True)
    # Depth dense: layer l projects the concatenated outputs of l + 1 earlier states back to D.
    dense = sympy.summation((layer + 1) * D**2, (layer, 0, L - 1))
    # Depth attention: every layer has projections for its depth query, key and value, and its
    # query attends to the l + 1 earlier states' keys and values: 2D for scores, 2D for values.
    own = L * (D**2 + 2 * D * D / G)
    attended = sympy.summation((layer + 1) * 4 * D, (layer, 0, L - 1))
    moda = model_cost("projected")

    def at(expression: sympy.Expr, tokens: Any) -> sympy.Expr:
        sizes = {HEAD_DIM: D / HQ, VALUE_DIM: D / HQ, B: 1, T: tokens}
        return sympy.expand(expression.subs(sizes, simultaneous=True))

    def row_by_row(*expressions: sympy.Expr) -> dict[str, sympy.Expr]:
        return dict(zip(ROWS, expressions, strict=True))

    flops = moda.depth_flops_forward + moda.projection_flops_forward
    kept = moda.accumulator_bytes / ACCUMULATOR  # as many elements as the slots themselves
    return {
        "depth dense": row_by_row(dense, L * D, T * L * D, 2 * dense, 2 * T * dense),
        "depth attention": row_by_row(
            own, 2 * L * D / G, 2 * T * L * D / G, 2 * own + attended, T * (2 * own + attended)
        ),
        "MoDA": row_by_row(
            at(moda.parameters, T), at(kept, 1), at(kept, T), at(flops, 1), at(flops, T)
        ),
    }


def leading_term(expression: sympy.Expr) -> sympy.Expr:
    """Asymptotic order: the highest power of L, then of T, D and G, without numeric factors."""
    terms = list(sympy.Add.make_args(sympy.expand(expression)))
    for symbol in (L, T, D, G):
        degrees = [sympy.degree(term * symbol**8, symbol) - 8 for term in terms]
        terms = [t for t, degree in zip(terms, degrees, strict=True) if degree == max(degrees)]
    (term,) = terms
    return term.as_coeff_Mul()[1]


def complexity_table() -> dict[str, dict[str, sympy.Expr]]:
    """Asymptotic cost of depth dense, depth attention and MoDA: `table[row][mechanism]`.

    Each entry is the `leading_term` of an exact formula.  Source: arXiv 2603.15619, Table 1.
    """
    costs = _mechanisms()
    return {row: {name: leading_term(cost[row]) for name, cost in costs.items()} for row in ROWS}


def format_table(table: Mapping[str, Mapping[str, sympy.Expr]]) -> str:
    """Markdown of `complexity_table()`, entries as `O(T L^2 D / G)`."""
    names = list(next(iter(table.values())))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(map(_big_o, table[row].values())) + " |" for row in table]
    return "\n".join(lines)


def _big_o(term: sympy.Expr) -> str:
    """`O(...)` of a single product of powers of T, L, D and G."""
    powers = term.as_powers_dict()
    over: list[str] = []
    under: list[str] = []
    for symbol in (T, L, D, G):
        power = powers.get(symbol, 0)
        text = symbol.name if abs(power) == 1 else f"{symbol.name}^{abs(power)}"
        if power:
            (over if power > 0 else under).append(text)
    return "O(" + " ".join(over) + "".join(f" / {text}" for text in under) + ")"


if __name__ == "__main__":
    print(format_table(complexity_table()))
