"""Sort the attentions found into stacks, whose members share depth slots.

A stream is what queries follow one another in: attention j belongs to i's if its query depends on
i's output. Within a stream, slots are shared between attentions whose keys and values agree in
shape, dtype and device. Where the number of tokens changes (pooling, merged patches), they are
other tokens, and what comes behind shares nothing with what came before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from moda_compile import fx
from moda_compile.patterns import cache, streams, tokens
from moda_compile.patterns.row import Attention, LeftAlone, Refused
from moda_compile.plan import Bystander, Plan, Stack

_NO_STACK = Refused(
    "the attentions do not form one stack: this one's queries do not depend on all earlier ones.",
    "convert each stack (tower) as a module of its own.",
)

_REARRANGED = Refused(
    "tokens are rearranged between the attention before and this one (shifted windows, rows and "
    "columns, a gather): a slot would belong to another token.",
    "leave such a model as it is; depth KV needs one order of tokens throughout the stack.",
)


def run(gm: GraphModule, plan: Plan) -> None:
    """Fill in ``plan.stacks``; cross-attention goes from the attentions to the bystanders.

    Raises:
        RewriteError: for a KV cache that is not understood, for attentions that form no stacks, for
            rearranged tokens.
    """
    reached = streams.reach(gm.graph.nodes, plan.attentions)
    earlier = streams.Earlier()
    kept: list[Attention] = []
    bits: list[int] = []
    for number, found in enumerate(plan.attentions):
        attention = cache.resolve(gm, found)
        try:
            streams.check_self_attention(attention, earlier, reached)
        except LeftAlone as left:
            plan.bystanders.append(
                Bystander(node=attention.node, pattern=attention.pattern, reason=left.reason)
            )
        except Refused as refused:
            plan.refuse(attention.node, attention.pattern, refused)
        else:
            earlier.add(attention)
            kept.append(attention)
            bits.append(1 << number)
            _guard(attention)
    plan.attentions = kept
    followed = [reached[attention.query] for attention in kept]
    for stream, members in enumerate(_streams(plan, followed, bits)):
        for stage in _stages(plan, members):
            _refuse_rearranged(gm, plan, stage)
            plan.stacks += _stacks(plan, stream, stage)


def _guard(attention: Attention) -> None:
    length = fx.value(attention.key).shape[2]
    if isinstance(length, torch.SymInt) and attention.max_length is not None:
        # Comparing a symbolic length installs a guard: beyond it, the graph is traced anew.
        assert length <= attention.max_length


def _streams(plan: Plan, followed: list[int], bits: list[int]) -> list[list[int]]:
    """Numbers of the attentions of each stream that is one: each follows all earlier members.

    Args:
        followed: for each attention, bits of those that its query went through.
        bits: for each attention, its own bit.
    """
    found: list[_Stream] = []
    for number, attention in enumerate(plan.attentions):
        before = [stream for stream in found if followed[number] & stream.bits]
        if not before:
            found.append(_Stream(members=[number], bits=bits[number]))
            continue
        whole = len(before) == 1 and followed[number] & before[0].bits == before[0].bits
        if not whole:
            if not before[0].broken:
                plan.refuse(attention.node, attention.pattern, _NO_STACK)
            for stream in before:
                stream.broken = True
        before[0].members.append(number)
        before[0].bits |= bits[number]
    # Not strict: half a stack would be neither model, so nothing of it is rewritten.
    return [stream.members for stream in found if not stream.broken]


@dataclass(kw_only=True)
class _Stream:
    members: list[int]
    bits: int
    broken: bool = False


def _refuse_rearranged(gm: GraphModule, plan: Plan, members: list[int]) -> None:
    attentions = [plan.attentions[m] for m in members]
    wrong = tokens.rearranged(gm.graph.nodes, attentions)
    if wrong is not None:
        attention = attentions[wrong]
        plan.refuse(attention.node, attention.pattern, _REARRANGED, fatal=True)


def _stages(plan: Plan, members: list[int]) -> list[list[int]]:
    """The members of a stream between changes of the number of its tokens."""
    stages: list[list[int]] = []
    before: tuple[Any, ...] | None = None
    for number in members:
        query = fx.value(plan.attentions[number].query)
        size = (query.shape[0], query.shape[2])
        if before is None or not _agree(before, size):
            if before is not None and _same_tokens(before, size):
                attention = plan.attentions[number]
                plan.refuse(attention.node, attention.pattern, _REARRANGED, fatal=True)
            stages.append([])
        stages[-1].append(number)
        before = size
    return stages


def _same_tokens(before: tuple[Any, ...], size: tuple[Any, ...]) -> bool:
    """Whether (B, T) became other numbers of as many tokens, or of sequences as long: then tokens
    moved between batch and sequence, and a stack was not pooled but cut in two.
    """
    (b, t), (other, length) = (tuple(map(fx.hint, x)) for x in (before, size))
    return bool(t == length or b * t == other * length)


def _stacks(plan: Plan, stream: int, members: list[int]) -> list[Stack]:
    """The members of one stage by the shape, dtype and device of their keys and values."""
    groups: list[tuple[tuple[Any, ...], list[int]]] = []
    for number in members:
        attention = plan.attentions[number]
        key, value = fx.value(attention.slot_key), fx.value(attention.slot_value)
        own = (*key.shape, value.shape[3], fx.value(attention.node).dtype, key.device)
        group = next((numbers for kind, numbers in groups if _agree(kind, own)), None)
        if group is None:
            groups.append((own, [number]))
        else:
            group.append(number)
    return [Stack(stream=stream, members=tuple(numbers)) for _, numbers in groups]


def _agree(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return all(fx.equal(x, y) for x, y in zip(one, other, strict=True))
