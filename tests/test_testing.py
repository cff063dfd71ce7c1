"""The oracle against hand computations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda_compile.errors import InputError
from moda_compile.testing import (
    FFNSlots,
    RandomStack,
    Reader,
    ReferenceMode,
    StackConfig,
    moda_attention_reference,
    reference,
)

# float64 throughout unless a test says otherwise: sums of a few dozen terms of size 1, in another
# order, differ by some 1e-15; 1e-12 leaves room and is far below any wrong formula.
CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def no_slots(query: Tensor, kv_heads: int) -> Tensor:
    return query.new_empty(0, query.shape[0], kv_heads, *query.shape[2:])


# ------------------------------------------------------------------ moda_attention_reference


@pytest.mark.parametrize("kind", ["full", "causal", "bool", "additive"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_without_slots_it_is_sdpa(kind: str, scale: float | None) -> None:
    q, k, v = randn(2, 4, 7, 8), randn(2, 2, 7, 8, seed=1), randn(2, 2, 7, 8, seed=2)
    visible = (randn(2, 1, 7, 7, seed=3) > 0) | torch.eye(7, dtype=torch.bool)
    mask = {"bool": visible, "additive": randn(4, 7, 7, seed=4)}.get(kind)
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": kind == "causal", "scale": scale}
    depth = no_slots(q, 2)
    out, lse = moda_attention_reference(q, k, v, depth, depth, **options)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert lse.shape == (2, 4, 7)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("groups", [1, 3])
def test_slots_against_a_loop_over_tokens(slots: int, groups: int) -> None:
    batch, kv_heads, length, head_dim = 2, 2, 5, 4
    q = randn(batch, kv_heads * groups, length, head_dim)
    k, v = randn(batch, kv_heads, length, head_dim, seed=1), randn(batch, 2, 5, 4, seed=2)
    depth_k = randn(slots, batch, kv_heads, length, head_dim, seed=3)
    depth_v = randn(slots, batch, kv_heads, length, head_dim, seed=4)
    out, lse = moda_attention_reference(q, k, v, depth_k, depth_v, is_causal=True)
    for b in range(batch):
        for h in range(kv_heads * groups):
            j = h // groups
            for t in range(length):
                keys = [k[b, j, u] for u in range(t + 1)] + [x[b, j, t] for x in depth_k]
                values = [v[b, j, u] for u in range(t + 1)] + [x[b, j, t] for x in depth_v]
                weights = [math.exp(float(q[b, h, t] @ key) / math.sqrt(head_dim)) for key in keys]
                mean = sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
                torch.testing.assert_close(out[b, h, t], mean, **CLOSE)
                assert math.isclose(float(lse[b, h, t]), math.log(sum(weights)), rel_tol=1e-12)


def test_gradients() -> None:
    shapes = [(1, 2, 3, 4), (1, 1, 3, 4), (1, 1, 3, 4), (2, 1, 1, 3, 4), (2, 1, 1, 3, 4)]
    inputs = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(
        lambda *tensors: moda_attention_reference(*tensors, is_causal=True), inputs
    )


def test_a_row_that_sees_nothing_is_zero_and_its_gradients_are_finite() -> None:
    q, k, v = (randn(1, 1, 3, 4, seed=i).requires_grad_() for i in range(3))
    mask = torch.tensor([[True, True, True], [False, False, False], [True, False, True]])
    depth = no_slots(q, 1)
    out, lse = moda_attention_reference(q, k, v, depth, depth, attn_mask=mask)
    assert out[0, 0, 1].tolist() == [0.0] * 4
    assert lse[0, 0].isinf().tolist() == [False, True, False]
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_a_masked_row_still_sees_its_slots() -> None:
    q, k, v = (randn(1, 1, 2, 4, seed=i) for i in range(3))
    slot = randn(1, 1, 1, 2, 4, seed=3)
    mask = torch.zeros(2, 2, dtype=torch.bool)
    out, _ = moda_attention_reference(q, k, v, slot, slot, attn_mask=mask)
    torch.testing.assert_close(out, slot[0], **CLOSE)  # one visible key: weight 1


def test_lse_is_wide_and_out_is_in_the_inputs_dtype() -> None:
    q, k, v = (randn(1, 1, 3, 4, seed=i, dtype=torch.bfloat16) for i in range(3))
    out, lse = moda_attention_reference(q, k, v, k[None], v[None])
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": randn(1, 3, 3, 4)}, "multiple of 2"),
        ({"depth_k": randn(1, 1, 2, 5, 4)}, "depth_k: got shape"),
        ({"depth_v": randn(2, 1, 2, 3, 4)}, "depth_v: got"),
        ({"attn_mask": torch.ones(3, 3)}, "both is_causal=True and attn_mask"),
    ],
)
def test_wrong_arguments_raise(change: dict[str, Any], message: str) -> None:
    q, k, slot = randn(1, 4, 3, 4), randn(1, 2, 3, 4), randn(1, 1, 2, 3, 4)
    arguments: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": k,
        "depth_k": slot,
        "depth_v": slot,
        "is_causal": True,
    }
    with pytest.raises(InputError, match=message):
        moda_attention_reference(**(arguments | change))


# ------------------------------------------------------------------------------ ReferenceMode


def by_hand(stack: Any, ids: Tensor) -> Tensor:
    """A sequential pre-norm causal stack, G = 1, no rotation: written out, layer after layer."""
    x = stack.embedding(ids)
    heads = (stack.config.query_heads, stack.config.head_dim)
    slot_keys: list[Tensor] = []
    slot_values: list[Tensor] = []
    for block in stack.blocks:
        h = block.attention_norm(x)
        q, k, v = (
            linear(h).unflatten(-1, heads).transpose(1, 2)
            for linear in (block.attention.q, block.attention.k, block.attention.v)
        )
        shape = (0, *q.shape)
        depth_k = torch.stack(slot_keys) if slot_keys else q.new_empty(shape)
        depth_v = torch.stack(slot_values) if slot_values else q.new_empty(shape)
        out, _ = moda_attention_reference(q, k, v, depth_k, depth_v, is_causal=True)
        x = x + block.attention.out(out.transpose(1, 2).flatten(2))
        slot_keys.append(k)
        slot_values.append(v)
        h = block.ffn_norm(x)
        slot_keys.append(block.attention.k(h).unflatten(-1, heads).transpose(1, 2))
        slot_values.append(block.attention.v(h).unflatten(-1, heads).transpose(1, 2))
        x = x + block.ffn(h)
    return stack.head(stack.norm(x))


def test_a_stack_against_the_layers_written_out() -> None:
    stack = RandomStack(StackConfig(layers=3, kv_heads=2, bias=True, dtype="float64"))
    (ids,) = stack.config.inputs()
    got = reference(stack, ids, ffn_slots=stack.ffn_slots("shared", {}))
    torch.testing.assert_close(got, by_hand(stack, ids), **CLOSE)


def test_one_layer_is_the_plain_model() -> None:
    stack = RandomStack(StackConfig(layers=1, groups=2, rotary="half", dtype="float64"))
    (ids,) = stack.config.inputs()
    torch.testing.assert_close(reference(stack, ids), stack(ids), **CLOSE)


@pytest.mark.parametrize("repeat", ["repeat_interleave", "expand_before", "expand_after"])
@pytest.mark.parametrize("mask", ["tril_bool", "arange_bool", "batched_bool", "triu_additive"])
def test_equal_models_have_equal_oracles(repeat: Any, mask: Any) -> None:
    config = StackConfig(
        layers=3, kv_heads=2, groups=3, rotary="pairs", qk_norm="head", dtype="float64"
    )
    flag = RandomStack(config)
    other = RandomStack(replace(config, repeat=repeat, mask=mask, rotary_layout="token"))
    (ids,) = flag.config.inputs()
    torch.testing.assert_close(flag(ids), other(ids), **CLOSE)
    for slots in (None, "shared"):
        left, right = (
            reference(stack, ids, ffn_slots=stack.ffn_slots("shared", {}) if slots else None)
            for stack in (flag, other)
        )
        torch.testing.assert_close(left, right, **CLOSE)
        assert (left - flag(ids)).abs().max() > 1e-3  # and MoDA is another function


def test_parallel_blocks_give_slots_to_later_layers_only() -> None:
    first = RandomStack(StackConfig(layers=3, order="attention_first", dtype="float64"))
    second = RandomStack(StackConfig(layers=3, order="ffn_first", dtype="float64"))
    (ids,) = first.config.inputs()
    left, right = (reference(s, ids, ffn_slots=s.ffn_slots("shared", {})) for s in (first, second))
    torch.testing.assert_close(left, right, **CLOSE)


def test_packed_projections_are_read_right() -> None:
    """Every fused layout, its rows permuted from the separate one, computes the same MoDA."""
    common: dict[str, Any] = {"layers": 2, "kv_heads": 2, "bias": True, "dtype": "float64"}
    separate = RandomStack(StackConfig(**common))
    (ids,) = separate.config.inputs()
    expected = reference(separate, ids, ffn_slots=separate.ffn_slots("shared", {}))
    for projection in ("chunk", "interleaved", "sizes", "grouped"):
        packed = RandomStack(StackConfig(**common, projection=projection))
        state = separate.state_dict()
        for i in range(2):
            path = f"blocks.{i}.attention."
            for leaf in ("weight", "bias"):
                parts = [state.pop(f"{path}{name}.{leaf}") for name in "qkv"]
                if projection in ("interleaved", "grouped"):
                    parts = [part.unflatten(0, (2, 8)) for part in parts]
                    state[f"{path}qkv.{leaf}"] = torch.stack(parts, dim=1).flatten(0, 2)
                else:
                    state[f"{path}qkv.{leaf}"] = torch.cat(parts)
        packed.load_state_dict(state)
        got = reference(packed, ids, ffn_slots=packed.ffn_slots("shared", {}))
        torch.testing.assert_close(got, expected, **CLOSE)


def test_multi_head_attention_modules_are_seen() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double().eval()
    x = randn(2, 5, 16)
    mode = ReferenceMode()
    with mode:
        out = model(x)
    assert mode.attentions == 3
    assert (out - model(x)).abs().max() > 1e-3


def test_the_mode_is_reusable_and_leaves_no_hooks() -> None:
    stack = RandomStack(StackConfig(layers=2))
    (ids,) = stack.config.inputs()
    mode = ReferenceMode(stack, stack.ffn_slots("shared", {}))
    outputs = []
    for _ in range(2):
        with mode:
            outputs.append(stack(ids))
    assert torch.equal(*outputs)
    assert mode.attentions == 2
    assert not any(module._forward_pre_hooks for module in stack.modules())


def test_the_mode_refuses_what_it_cannot_answer() -> None:
    q, longer = randn(1, 2, 3, 4), randn(1, 2, 5, 4)
    with ReferenceMode(stacks=lambda *_: 0):
        with pytest.raises(InputError, match="3 queries and 5 keys"):
            F.scaled_dot_product_attention(q, longer, longer)
        F.scaled_dot_product_attention(q, q, q)
        with pytest.raises(InputError, match="slots are of another"):
            F.scaled_dot_product_attention(longer, longer, longer)
    with ReferenceMode(stacks=[None]):
        F.scaled_dot_product_attention(q, longer, longer)
        with pytest.raises(InputError, match="stacks names 1 calls"):
            F.scaled_dot_product_attention(q, q, q)
    with ReferenceMode():
        with pytest.raises(InputError, match="dropout_p=0.1"):
            F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
        four = randn(1, 4, 3, 4)
        with pytest.raises(InputError, match="set enable_gqa"):
            F.scaled_dot_product_attention(four, q, q)
        F.scaled_dot_product_attention(four, q[:, :1], q[:, :1])  # one head is broadcast
    slots = FFNSlots(modules=["1"], key_value=lambda layer, x: (x, x))
    with pytest.raises(InputError, match="expected the model"):
        ReferenceMode(ffn_slots=slots)
    with ReferenceMode(nn.Sequential(nn.Identity(), nn.Identity()), slots):
        F.scaled_dot_product_attention(q, q, q)
        with pytest.raises(InputError, match="attention 1 runs before 1"):
            F.scaled_dot_product_attention(q, q, q)
    with pytest.raises(InputError, match="no call of F.scaled_dot_product_attention"):
        reference(nn.Linear(2, 2), torch.zeros(1, 2))


# ------------------------------------------------------- stacks, readers and other functions


def slots_of(mode: ReferenceMode, stack: Any = 0) -> int:
    return len(mode.slots(99, stack))


def test_slots_are_shared_within_a_stack_only() -> None:
    """Two towers' calls in turn: each reads what its own tower wrote."""
    q = [randn(1, 2, 3, 4, seed=i) for i in range(4)]
    with ReferenceMode(stacks=["a", "b", "a", "b"]) as mode:
        out = [F.scaled_dot_product_attention(x, x, x) for x in q]
    for first, second in ((0, 2), (1, 3)):
        assert torch.equal(out[first], F.scaled_dot_product_attention(*[q[first]] * 3))
        slot = q[first][None]
        expected, _ = moda_attention_reference(*[q[second]] * 3, slot, slot)
        torch.testing.assert_close(out[second], expected, **CLOSE)
    assert (mode.attentions, slots_of(mode, "a"), slots_of(mode, "b")) == (4, 2, 2)


def test_a_reader_reads_and_does_not_write() -> None:
    q = [randn(1, 2, 3, 4, seed=i) for i in range(3)]
    with ReferenceMode(stacks=[0, Reader(), 0]) as mode:
        out = [F.scaled_dot_product_attention(q[i], q[0], q[0]) for i in range(3)]
    slot = q[0][None]
    for i in (1, 2):  # both read the first one's slot alone
        expected, _ = moda_attention_reference(q[i], q[0], q[0], slot, slot)
        torch.testing.assert_close(out[i], expected, **CLOSE)
    assert (mode.attentions, slots_of(mode)) == (3, 2)


def test_slots_of_repeated_heads_reach_layers_of_fewer() -> None:
    """One layer repeated its two KV heads for four query heads, the next for six."""
    kv = [randn(1, 2, 3, 4, seed=i) for i in range(2)]
    q = [randn(1, heads, 3, 4, seed=heads) for heads in (4, 6)]
    with ReferenceMode(stacks=lambda *_: 0):
        for query, x in zip(q, kv, strict=True):
            repeated = x.repeat_interleave(query.shape[1] // 2, dim=1)
            out = F.scaled_dot_product_attention(query, repeated, repeated)
        other = randn(1, 3, 3, 4)
        with pytest.raises(InputError, match="got 4 KV heads in a slot"):
            F.scaled_dot_product_attention(other, other, other)
    expected, _ = moda_attention_reference(q[1], kv[1], kv[1], kv[0][None], kv[0][None])
    torch.testing.assert_close(out, expected, **CLOSE)


def test_a_call_of_no_stack_is_the_original() -> None:
    q, memory = randn(1, 2, 3, 4), randn(1, 2, 5, 4, seed=1)
    with ReferenceMode(stacks=[0, None, 0]) as mode:
        F.scaled_dot_product_attention(q, q, q)
        out = F.scaled_dot_product_attention(q, memory, memory)
        F.scaled_dot_product_attention(q, q, q)
    assert torch.equal(out, F.scaled_dot_product_attention(q, memory, memory))
    assert (mode.attentions, mode.calls, slots_of(mode)) == (2, 3, 2)


def test_without_stacks_they_are_told_by_shape() -> None:
    """K and V of one shape share; between different lengths there is nothing to share."""
    q, wide, memory = randn(1, 2, 3, 4), randn(1, 2, 3, 6), randn(1, 2, 5, 4)
    with ReferenceMode() as mode:
        for x, y, z in (
            (q, q, q),
            (wide, wide, wide),
            (q, memory, memory),
            (q, q, wide),
            (q, q, q),
        ):
            F.scaled_dot_product_attention(x, y, z)
    assert (mode.attentions, mode.calls) == (4, 5)
    shapes = [(1, 2, 3, 4, 4), (1, 2, 3, 6, 6), (1, 2, 5, 4, 4), (1, 2, 3, 4, 6)]
    assert [slots_of(mode, shape) for shape in shapes] == [2, 1, 0, 1]


def test_a_dead_row_is_the_originals_without_slots_and_all_depth_with() -> None:
    q, slot = randn(1, 1, 3, 4), randn(1, 1, 3, 4, seed=1)
    mask = torch.tensor([[False] * 3, [True] * 3, [True] * 3])
    with ReferenceMode(stacks=lambda *_: 0):
        first = F.scaled_dot_product_attention(slot, slot, slot, attn_mask=mask)
        second = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert torch.equal(first, F.scaled_dot_product_attention(slot, slot, slot, attn_mask=mask))
    torch.testing.assert_close(second[:, :, 0], slot[:, :, 0], **CLOSE)
    assert (second[:, :, 1] - slot[:, :, 1]).abs().max() > 1e-3


def token_major_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A user's own function: `[B, T, H, d]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1).matmul(v).transpose(1, 2)


def from_token_major(attend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@torch.library.custom_op("moda_test::token_major", mutates_args=())
def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return token_major_attention(q, k, v).contiguous()


@pytest.mark.parametrize("kind", ["function", "custom_op", "packet", "overload"])
def test_other_attention_functions(kind: str) -> None:
    packet = torch.ops.moda_test.token_major
    key, call = {
        "function": (token_major_attention, lambda *x: token_major_attention(*x)),
        "custom_op": (operator, operator),
        "packet": (packet, packet),
        "overload": (packet.default, packet.default),
    }[kind]
    q = [randn(1, 3, 2, 4, seed=i) for i in range(2)]
    with ReferenceMode(functions={key: from_token_major}) as mode:
        out = [call(x, x, x) for x in q]
    assert mode.attentions == 2
    torch.testing.assert_close(out[0], token_major_attention(*[q[0]] * 3), rtol=0, atol=0)
    heads = [x.transpose(1, 2) for x in q]
    expected, _ = moda_attention_reference(*[heads[1]] * 3, heads[0][None], heads[0][None])
    torch.testing.assert_close(out[1].transpose(1, 2), expected, **CLOSE)
    assert token_major_attention.__name__ == "token_major_attention"  # and is itself again


def test_score_mod() -> None:
    q, slot = randn(1, 2, 3, 4), randn(1, 1, 2, 3, 4, seed=1)
    bias = randn(2, 3, 3, seed=2)
    by_mask, by_mod = (
        moda_attention_reference(q, q, q, slot, slot, **options)[0]
        for options in ({"attn_mask": bias}, {"score_mod": lambda scores: scores + bias})
    )
    torch.testing.assert_close(by_mod, by_mask, **CLOSE)
