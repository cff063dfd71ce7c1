"""Rules that find attentions and feed-forward networks in a Dynamo graph, by dataflow alone.

A row never looks at the name of an attribute, a class or a file. To add a family: one file with a
``match`` function, one row here. Users add theirs with :func:`moda_compile.register_pattern`; see
:mod:`moda_compile.patterns.row`.
"""

if __name__ != "moda_compile.patterns":
    raise ImportError(f"import moda_compile.patterns, not {__name__!r}.")

from moda_compile.patterns import by_hand, flex, opaque, packed, sdpa, varlen
from moda_compile.patterns.registry import Registration
from moda_compile.patterns.row import Attention, LeftAlone, Pattern, Refused, Step

# The last row goes by names, so everything that others understand has to come before it.
PATTERNS: tuple[Pattern, ...] = (
    Pattern(
        name="sdpa",
        accepts="F.scaled_dot_product_attention with any mask, over a KV cache or without one.",
        refuses="Dropout in training, a scale that is a tensor.",
        match=sdpa.match,
    ),
    Pattern(
        name="by hand",
        accepts="softmax(scale q k^T + mask) v written by hand: by matmul, @, bmm, einsum, baddbmm "
        "or products summed up, in any layout and precision, with any mask.",
        refuses="Dropout in training, scores or probabilities that are used otherwise, "
        "softcapping, attention sinks, sigmoid attention, a softmax over anything but the keys.",
        match=by_hand.match,
    ),
    Pattern(
        name="packed",
        accepts="F.multi_head_attention_forward, so nn.MultiheadAttention and nn.Transformer*, "
        "with any mask and padding.",
        refuses="Dropout in training, weights that are used, extra keys (bias_k, add_zero_attn), "
        "inputs without a batch dimension.",
        match=packed.match,
    ),
    Pattern(
        name="flex",
        accepts="FlexAttention with any score_mod and block_mask, through its lse.",
        refuses="An lse that the model uses itself, BACKEND='FLASH'.",
        match=flex.match,
    ),
    Pattern(
        name="varlen",
        accepts="torch.nn.attention.varlen.varlen_attn: sequences of different lengths in one row, "
        "causal, bidirectional or windowed.",
        refuses="A KV cache (seqused_k, block_table), an lse that the model uses itself.",
        match=varlen.match,
    ),
    Pattern(
        name="opaque",
        accepts="Nothing: these are calls whose inside is not in the graph.",
        refuses="Other operators with attention in their name.",
        match=opaque.match,
    ),
)

__all__ = ["PATTERNS", "Attention", "LeftAlone", "Pattern", "Refused", "Registration", "Step"]
