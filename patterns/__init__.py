"""Rules that find attentions and feed-forward networks in a Dynamo graph, by dataflow alone.

A row never looks at the name of an attribute, a class or a file. To add a family: one file with a
``match`` function, one row here.
"""

if __name__ != "moda_compile.patterns":
    raise ImportError(f"import moda_compile.patterns, not {__name__!r}.")

from moda_compile.patterns import packed, sdpa, softmax
from moda_compile.patterns.row import Attention, Pattern, Refused

PATTERNS: tuple[Pattern, ...] = (
    Pattern(
        name="sdpa",
        accepts="F.scaled_dot_product_attention over one token sequence, causal or over all of it.",
        refuses="Dropout in training, masks that are not causal, cross-attention, KV caches.",
        match=sdpa.match,
    ),
    Pattern(
        name="softmax",
        accepts="Nothing yet.",
        refuses="softmax(q k^T) v written by hand: its mask and scale are not recognised yet.",
        match=softmax.match,
    ),
    Pattern(
        name="packed",
        accepts="Nothing yet.",
        refuses="F.multi_head_attention_forward and FlexAttention: their inside is one call.",
        match=packed.match,
    ),
)

__all__ = ["PATTERNS", "Attention", "Pattern", "Refused"]
