"""Hypothesis strategies over random stacks and pairs.  Every draw shrinks towards the plain GPT."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from moda_compile.testing import masks
from moda_compile.testing.cases import Case
from moda_compile.testing.cores import NEAR_MISSES, ByHand
from moda_compile.testing.stack_config import UNEVEN, DType, PairConfig, StackConfig, Variant
from moda_compile.testing.stacks import RandomPair, RandomStack

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

#: What `stacks` may draw beside plain layers with a causal or no mask.
FEATURES = (
    "masks", "padding", "learned_bias", "by_hand", "module", "shapes", "windows", "sharing",
    "convolution", "passes", "checkpoint", "experts", "no_ffn", "norm_dtype", "value_dim",
)  # fmt: skip
#: What `cases` may draw beside that.
CASE_FEATURES = (*FEATURES, "near_miss", "pairs", "low_precision", "autocast", "lengths", "aot")

_BIAS: tuple[masks.Mask, ...] = ("bias", "bias_causal")


def stacks(
    *,
    max_layers: int = 5,
    general_masks: bool = False,
    dtype: DType = "float32",
    features: Collection[str] = (),
    near_miss: bool = False,
) -> SearchStrategy[RandomStack]:
    """Strategy over `RandomStack`: 1 to `max_layers` layers of any `StackConfig` kind.

    Args:
        max_layers: largest L drawn.
        general_masks: also draw masks that no `is_causal` flag can express.
        dtype: of the weights.
        features: names of `FEATURES` to draw from as well.
        near_miss: make one layer, or all of them, a near miss.

    Raises:
        ImportError: without Hypothesis (install the extra `moda-compile[testing]`).
    """
    from hypothesis import strategies as st

    wanted = set(features) | ({"masks"} if general_masks else set())

    @st.composite
    def draw_stack(draw: DrawFn) -> RandomStack:
        return RandomStack(_config(draw, max_layers, dtype, wanted, near_miss))

    return draw_stack()


def pairs(
    *, max_layers: int = 3, dtype: DType = "float32", features: Collection[str] = ()
) -> SearchStrategy[RandomPair]:
    """Strategy over `RandomPair`; the arguments are those of `stacks`.

    Raises:
        ImportError: without Hypothesis (install the extra `moda-compile[testing]`).
    """
    from hypothesis import strategies as st

    @st.composite
    def draw_pair(draw: DrawFn) -> RandomPair:
        return RandomPair(_pair(draw, max_layers, dtype, set(features)))

    return draw_pair()


def cases(
    *, max_layers: int = 4, features: Collection[str] = CASE_FEATURES
) -> SearchStrategy[Case]:
    """Strategy over `Case`: everything at once, each rarely.

    Raises:
        ImportError: without Hypothesis (install the extra `moda-compile[testing]`).
    """
    from hypothesis import strategies as st

    wanted = set(features)

    @st.composite
    def draw_case(draw: DrawFn) -> Case:
        def one_in(n: int, name: str) -> bool:
            return name in wanted and draw(st.integers(0, n - 1)) == n - 1

        dtype: DType = "bfloat16" if one_in(8, "low_precision") else "float32"
        backend: Any = "aot_eager" if one_in(4, "aot") else "eager"
        if one_in(8, "near_miss"):
            return Case(model=_config(draw, max_layers, "float32", wanted, True), backend=backend)
        if one_in(6, "pairs"):
            pair = _pair(draw, max(max_layers // 2, 1), dtype, wanted)
            return Case(model=pair, backend=backend)
        config = _config(draw, max_layers, dtype, wanted, False)
        # Elsewhere the FFN would not know whose keys to write: refused, with that reason.
        uniform = config.passes == 1 and not config.variants and config.ffn != "none"
        uniform = uniform and config.module != "length_first"
        settled = not config.ffn.startswith("moe")
        lengths: tuple[int, ...] = ()
        if one_in(6, "lengths"):
            lengths = tuple(draw(st.lists(st.sampled_from([4, 6, 9, 12]), min_size=2, max_size=3)))
        return Case(
            model=config,
            ffn_kv=draw(st.sampled_from(["none", "shared"] + ["projected"] * settled))
            if uniform
            else "none",
            backend=backend,
            autocast=dtype == "float32" and settled and one_in(6, "autocast"),
            lengths=lengths,
            evaluate=draw(st.booleans()),
        )

    return draw_case().filter(Case.answerable)


def _pair(draw: DrawFn, max_layers: int, dtype: DType, wanted: set[str]) -> PairConfig:
    from hypothesis import strategies as st

    join: Any = draw(st.sampled_from(["sum", "apart", "cross", "pool", "append"]))
    length = draw(st.sampled_from([4, 2, 6, 16]))
    common: dict[str, Any] = {
        "width": draw(st.sampled_from([16, 24])),
        "batch": draw(st.integers(1, 2)),
    }
    wanted = wanted - {"padding", "module"}  # a pair has no second input, and one width
    first = _config(draw, max_layers, dtype, wanted, False, **common, length=length)
    if join == "sum" or draw(st.booleans()):  # of one length: told apart by dataflow alone
        other = length
    else:
        other = draw(st.sampled_from([4, 5, 3, 16]))
    second = _config(draw, max_layers, dtype, wanted, False, **common, length=other)
    return PairConfig(first=first, second=second, join=join)


def _config(
    draw: DrawFn,
    max_layers: int,
    dtype: DType,
    wanted: set[str],
    near_miss: bool,
    **given: Any,
) -> StackConfig:
    from hypothesis import strategies as st

    def pick(*options: Any) -> Any:
        return draw(st.sampled_from(options))

    def feature(name: str) -> bool:
        """One in three, of what is wanted."""
        return name in wanted and pick(False, False, True)

    config: dict[str, Any] = {
        "layers": pick(*range(2, max_layers + 1), 1),
        "head_dim": pick(8, 16, 24),
        "kv_heads": draw(st.integers(1, 3)),
        "norm": pick("layer", "rms", "rms_functional"),
        "placement": pick("pre", "post", "branch"),
        "bias": draw(st.booleans()),
        "batch": draw(st.integers(1, 3)),
        "length": pick(5, 1, 2, 3, 7, 16, 17, 33),
        "seed": draw(st.integers(0, 9)),
        "dtype": dtype,
        **given,
    }
    module = not near_miss and feature("module")
    if module:
        config["module"] = pick("batch_first", "length_first")
        config["repeat"] = "enable_gqa"
    else:
        config.update(_attention(draw, pick, feature("by_hand") or near_miss))
        config.setdefault("width", pick(0, 0, 24, 40))
    config["mask"] = pick(*_masks(wanted, config))
    if feature("no_ffn"):
        config["ffn"] = "none"
    elif dtype == "float32" and feature("experts"):  # low precision flips the choice of experts
        config["ffn"] = pick("moe_dense", "moe_gather", "moe_sorted")
    else:
        config["ffn"] = pick("gelu", "swiglu", "fused_swiglu")
    if config["ffn"] != "none":
        config["order"] = pick("sequential", "sequential", "attention_first", "ffn_first")
    if near_miss:
        config["near_miss"] = pick(*NEAR_MISSES)
        config["near_miss_layer"] = pick(None, *range(config["layers"]))
        return StackConfig(**config)
    if feature("norm_dtype") and dtype != "float32":
        config["norm_dtype"] = "float32"
    if feature("value_dim") and not module and config["projection"] in UNEVEN:
        config["value_dim"] = pick(4, 12, 32)
    if feature("passes"):
        config["passes"] = 2
    config["checkpoint"] = feature("checkpoint")
    if not module:
        config["variants"] = _variants(draw, pick, feature, wanted, config)
    return StackConfig(**config)


def _attention(draw: DrawFn, pick: Any, by_hand: bool) -> dict[str, Any]:
    """How one layer's attention is written."""
    groups = pick(1, 2, 3, 4)
    projections = ["separate", "sizes", "grouped"]
    projections += ["chunk", "interleaved"] if groups == 1 else []
    repeats = ["repeat_interleave", "expand_before", "expand_after"]
    rotary = pick("none", "half", "pairs")
    config = {
        "groups": groups,
        "projection": pick(*projections),
        "rotary": rotary,
        "rotary_layout": pick("head", "token"),
        "qk_norm": pick("none", "head", "full"),
        "repeat": pick(*repeats) if by_hand and groups > 1 else pick("enable_gqa", *repeats),
        "scale": pick(None, 0.3),
    }
    if by_hand:
        config["core"] = ByHand(
            product=pick("matmul", "operator", "bmm", "baddbmm", "einsum", "einsum_token"),
            scaling=pick("scores", "divide", "query", "key", "both"),
            softmax=pick("functional", "method", "float32"),
            masking=pick("masked_fill", "where", "add"),
            hidden=pick("inf", "min", "large"),
            dropout=pick(False, True),
        )
    return config


def _masks(wanted: set[str], config: dict[str, Any]) -> list[masks.Mask]:
    found: list[masks.Mask] = ["flag", "none", *masks.CAUSAL]
    if "masks" in wanted:
        found += [kind for kind in masks.GENERAL if kind not in _BIAS]
    if "learned_bias" in wanted:
        found += _BIAS
    if "padding" in wanted:
        found += masks.WITH_INPUT
    how = config.get("core")
    # By hand, a row that sees nothing is NaN where hidden scores are -inf; in nn.MultiheadAttention
    # they are.
    if config.get("module") or (isinstance(how, ByHand) and how.hidden == "inf"):
        found = [kind for kind in found if "left" not in kind]
    return found


def _variants(
    draw: DrawFn, pick: Any, feature: Any, wanted: set[str], config: dict[str, Any]
) -> tuple[Variant, ...]:
    """What other layers there are, beside the stack's own."""
    found = [Variant()]
    if feature("windows") and config["mask"] not in (*masks.WITH_INPUT, *_BIAS):
        plain = [k for k in _masks(wanted, config) if k not in (*masks.WITH_INPUT, *_BIAS)]
        found.append(Variant(mask=pick(*plain)))
    if feature("convolution"):
        found.append(Variant(mixer="convolution"))
    shapes = config["mask"] not in _BIAS and config["repeat"] != "expand_before"
    if shapes and feature("shapes"):
        # Projections that are cut in three, and SDPA's own grouping where there is no SDPA.
        uneven = "value_dim" in wanted and config["projection"] in UNEVEN
        ungrouped = config["projection"] in ("chunk", "interleaved")
        ungrouped = ungrouped or ("core" in config and config["repeat"] == "enable_gqa")
        found.append(
            Variant(
                head_dim=pick(None, 8, 16),
                value_dim=pick(None, 4) if uneven else None,
                kv_heads=pick(None, 1, 2, 3),
                groups=None if ungrouped else pick(None, 1, 2),
            )
        )
    elif config["repeat"] != "expand_before" and feature("sharing"):
        found.append(Variant(shares_kv=True))
    if len(found) == 1:
        return ()
    order = draw(_permutations(found[1:]))
    return (found[0], *order)


def _permutations(values: list[Variant]) -> Any:
    from hypothesis import strategies as st

    return st.permutations(values)
