"""In the graph of a whole forward and backward: gather slots' gradients instead of adding them up.

Autograd's form (see `ops`) threads one accumulator through the layers' backwards, and each reads
and writes the gradient of every slot it reads. AOTAutograd's joint graph holds them all. There each
`depth_attention_backward` and `depth_merge_backward` becomes the operator that leaves the slots
out, and where a row of the accumulator is taken out, `depth_gather` computes it from the layers
that had added to it by then; another slot that is complete by then comes along. Whether a stack is
worth it says `kernels.gathers`. Of many layers every other gather begins the gradients of the slots
behind its own as well (`kernels.gathers_ahead`): it leaves their sums over the layers so far to the
next one, which reads the few that were missing then. One block of sums is alive at a time.

Why it is safe: a row starts at zero and is what those layers added; nothing else may touch the
accumulator, or the whole chain is left as it is. So is a chain of a form that is not known here:
this pass saves traffic and memory, never meaning.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from moda_compile import gathered, traced  # noqa: F401  (registers the operators)

_aten = torch.ops.aten
_own = torch.ops.moda_compile
_QUERY_BACKWARD = {
    _own.depth_attention_backward.default: _own.depth_attention_query_backward.default,
    _own.depth_merge_backward.default: _own.depth_merge_query_backward.default,
}
_CAST = torch.ops.prims.convert_element_type.default
_FUNCTIONAL = torch.ops.higher_order.auto_functionalized_v2
_TOKEN_MAJOR = [0, 1, 2, 4, 3, 5]  # [slot, side, B, T, Hk, d] of memory to [.., Hk, T, d] and back
_RECOMPUTED = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def run(graph: Graph) -> None:
    """Rewrite the chains of accumulators of a joint graph, in place."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for chain in list(_chains(graph)):
        sites = _sites(chain)
        if sites is not None and _worthwhile(chain) and _rewrite(graph, chain, sites, place):
            graph.eliminate_dead_code()
            graph.lint()


@dataclass(frozen=True, eq=False)
class _Reader:
    """A layer's backward that adds to an accumulator.

    after: the accumulator with what it added, None where nobody asks. call: the operator's
    arguments by name.
    """

    node: Node
    before: Node
    after: Node | None
    call: dict[str, Any]

    @property
    def slots(self) -> int:
        return len(self.call["depth_k"])


@dataclass(frozen=True, eq=False)
class _Site:
    """Where rows are taken out of an accumulator: the gradient of slot number `slot`'s key (side 0)
    or value (1), to which the first `readers` of the chain have added.
    """

    node: Node
    slot: int
    side: int
    readers: int


@dataclass(frozen=True, eq=False, kw_only=True)
class _Gather:
    """What one `depth_gather` does, in front of the first of its sites.

    slots: whose gradients it completes. sites: where these are used, in order. begun: slots whose
    sums it leaves to the next one. readers: what it reads for each of all these, numbers in the
    chain. goes_on: its slots' sums are begun by the gather before.
    """

    slots: tuple[int, ...]
    sites: tuple[_Site, ...]
    readers: dict[int, list[int]]
    begun: tuple[int, ...] = ()
    goes_on: bool = False


def _reader(node: Node) -> _Reader | None:
    if node.target is not _FUNCTIONAL or node.args[0] not in _QUERY_BACKWARD:
        return None
    if node.kwargs.get("_accumulator_base_index") is None:  # it reads no slots
        return None
    own = node.args[0]._schema  # type: ignore[union-attr]
    (before,) = cast(list[Node], node.kwargs["_all_bases"])
    call = {x.name: node.kwargs[x.name] for x in own.arguments if x.name != "accumulator"}
    after = next((user for user in node.users if user.args[1] == len(own.returns)), None)
    return _Reader(node=node, before=before, after=after, call=call)


def _chains(graph: Graph) -> Iterator[list[_Reader]]:
    """Readers in the order in which they add to one accumulator, that starts as zeros."""
    found = [reader for reader in map(_reader, graph.nodes) if reader is not None]
    by_input = {reader.before: reader for reader in found}
    for reader in found:
        if not _is_zeros(reader.before):
            continue
        chain = [reader]
        while (after := chain[-1].after) is not None and after in by_input:
            chain.append(by_input[after])
        yield chain


def _is_zeros(node: Node) -> bool:
    zeros = node.target in (_aten.zeros.default, _aten.new_zeros.default)
    zeros |= node.target is _aten.full.default and bool(node.args[1] == 0)
    return bool(zeros) and len(_users(node)) == 1


def _users(node: Node) -> list[Node]:
    """Who uses the tensor itself, not its symbolic strides, which the operator is called with."""
    return [x for x in node.users if x.target not in (_aten.sym_stride.int, _aten.sym_size.int)]


def _sites(chain: Sequence[_Reader]) -> list[_Site] | None:
    """Where rows are taken out; None if anything else happens to the accumulator."""
    found: list[_Site] = []
    following = {reader.node for reader in chain}
    for count, reader in enumerate(chain, start=1):
        if reader.after is None:
            continue
        for user in _users(reader.after):
            if user in following:
                continue
            if user.target is not _aten.permute.default or user.args[1] != _TOKEN_MAJOR:
                return None
            for row in user.users:
                if not _is_select(row) or not all(map(_is_select, row.users)):
                    return None
                slot = cast(int, row.args[2])
                found += [
                    _Site(node=side, slot=slot, side=cast(int, side.args[2]), readers=count)
                    for side in row.users
                ]
    return found


def _is_select(node: Node) -> bool:
    return bool(node.target is _aten.select.int and node.args[1] == 0)


def _worthwhile(chain: Sequence[_Reader]) -> bool:
    """Whether the gathering kernel serves these, and holding on to q and do costs no memory."""
    from moda_compile import kernels

    q, group = traced.value(chain[0].call["q"]), _group(chain)
    if len({reader.call["scale"] for reader in chain}) > 1:
        return False
    if any(x.dtype != q.dtype for r in chain for x in map(traced.value, _rows(r))):
        return False
    what = {"device_type": q.device.type, "dtype": q.dtype, "head_dim": int(q.shape[3])}
    if not kernels.gathers(**what, group=group):
        return False
    # Of a query that is computed again for this backward, memory would have been freed: then q and
    # do, 2 G rows of a slot's, must not be more than the accumulator's 2.
    again = any(reader.call["q"].meta.get("recompute") in _RECOMPUTED for reader in chain)
    held, kept = group * q.dtype.itemsize, traced.value(chain[0].before).dtype.itemsize
    return not again or bool(held <= kept)


def _group(chain: Sequence[_Reader]) -> int:
    """Query heads per key head."""
    q, key = (traced.value(x) for x in (chain[0].call["q"], chain[0].call["depth_k"][0]))
    return int(q.shape[1] // key.shape[1])


def _rows(reader: _Reader) -> tuple[Node, ...]:
    call = reader.call
    return call["q"], call["grad_out"], *call["depth_k"], *call["depth_v"]


def _rewrite(
    graph: Graph, chain: list[_Reader], sites: list[_Site], place: dict[Node, int]
) -> bool:
    """Gather this chain's gradients; False, and nothing changed, where they are not one stack's."""
    keys, values = (max((r.call[side] for r in chain), key=len) for side in ("depth_k", "depth_v"))
    if any(
        list(r.call[name]) != list(slots[: r.slots])
        for r in chain
        for name, slots in (("depth_k", keys), ("depth_v", values))
    ):
        return False
    readers: dict[int, list[int]] = {}
    for site in sites:
        own = [i for i in range(site.readers) if chain[i].slots > site.slot]
        if readers.setdefault(site.slot, own) != own:
            return False
    if not all(readers.values()):
        return False
    deltas = [_leave_slots_out(graph, reader) for reader in chain]
    sites = sorted(sites, key=lambda site: place[site.node])
    sums: Node | None = None
    for planned in _ahead(chain, _completed(chain, sites, readers, place), place):
        partials = sums if planned.goes_on else None
        sums = _gather(graph, chain, deltas, keys, values, planned, partials, place)
    return True


def _completed(
    chain: Sequence[_Reader],
    sites: Sequence[_Site],
    readers: dict[int, list[int]],
    place: dict[Node, int],
) -> list[_Gather]:
    """Which slots are gathered together: those that are complete where the first is used."""
    from moda_compile.kernels import GATHERED_SLOTS

    found: list[_Gather] = []
    done: set[int] = set()
    for first in sites:
        if first.slot in done:
            continue
        ready = [
            site.slot
            for site in sites
            if site.slot not in {*done, first.slot}
            and all(place[chain[i].node] < place[first.node] for i in readers[site.slot])
        ]
        together = [first.slot]
        for slot in dict.fromkeys(ready):
            chosen = [*together, slot]
            if len(chosen) <= GATHERED_SLOTS and _in_order([readers[s] for s in chosen]):
                together = chosen
        done.update(together)
        found.append(
            _Gather(
                slots=tuple(together),
                sites=tuple(site for site in sites if site.slot in together),
                readers={slot: readers[slot] for slot in together},
            )
        )
    return found


def _ahead(
    chain: Sequence[_Reader], gathers: Sequence[_Gather], place: dict[Node, int]
) -> list[_Gather]:
    """The same gathers, where it is worth it every other one with what the next reads again."""
    found: list[_Gather] = []
    for gather in gathers:
        pair = None
        if found and not found[-1].goes_on:
            pair = _begun(chain, found[-1], gather, place)
        if pair is None:
            found.append(gather)
        else:
            found[-1:] = pair
    return found


def _begun(
    chain: Sequence[_Reader], gather: _Gather, following: _Gather, place: dict[Node, int]
) -> list[_Gather] | None:
    """The first gather with the sums of the following one's slots over the readers that have run by
    then, and that one with those that are missing; None where that is not worth it.
    """
    from moda_compile import kernels

    here = place[gather.sites[0].node]
    ran, missing = (
        {
            slot: [i for i in following.readers[slot] if (place[chain[i].node] < here) == early]
            for slot in following.slots
        }
        for early in (True, False)
    )
    together = _in_order([*gather.readers.values(), *ran.values()])
    if together is None or not _in_order([*missing.values()]):
        return None
    both = set().union(*gather.readers.values()) & set().union(*ran.values())
    q = traced.value(chain[0].call["q"])
    if not kernels.gathers_ahead(
        device=q.device,
        dtype=q.dtype,
        head_dim=int(q.shape[3]),
        group=_group(chain),
        readers=len(both),
        slots=len(following.slots),
    ):
        return None
    return [
        replace(gather, begun=following.slots, readers=gather.readers | ran),
        replace(following, readers=missing, goes_on=True),
    ]


def _in_order(sets: Sequence[list[int]]) -> list[int] | None:
    """The members of nested sets, those of the smallest first; None if they are not nested."""
    order: list[int] = []
    for members in sorted(sets, key=len):
        if not set(order) <= set(members):
            return None
        order += [x for x in members if x not in order]
    return order


def _leave_slots_out(graph: Graph, reader: _Reader) -> Node:
    """Put the operator without an accumulator in the reader's place; its delta."""
    target = _QUERY_BACKWARD[reader.node.args[0]]  # type: ignore[index]
    with graph.inserting_before(reader.node):
        made = traced.call(graph, target, *reader.call.values(), like=reader.node)
        for user in list(reader.node.users):
            if user is not reader.after:
                user.replace_input_with(reader.node, made)
        last = len(traced.value(made)) - 1
        return traced.call(graph, operator.getitem, made, last, like=reader.node)


def _gather(
    graph: Graph,
    chain: Sequence[_Reader],
    deltas: Sequence[Node],
    keys: Sequence[Node],
    values: Sequence[Node],
    planned: _Gather,
    partials: Node | None,
    place: dict[Node, int],
) -> Node | None:
    """Compute the slots' gradients in front of the first of their sites, and use them there; the
    sums of those that it begins.

    What a gradient is then added to, if it is there by then, is where the kernel starts.
    """
    slots, sites = [*planned.slots, *planned.begun], planned.sites
    order = _in_order([planned.readers[slot] for slot in slots])
    assert order is not None
    taken = {user for site in sites for user in site.node.users}
    casts = {x.args[1] if x.target is _CAST else None for x in taken}
    # Rounded once, when written, where all that was done with the rows is to round them.
    rounded = len(casts) == 1 and casts != {None}
    dtype = next(iter(casts)) if rounded else traced.value(sites[0].node).dtype
    like = sites[0].node
    results = {site: list(site.node.users) if rounded else [site.node] for site in sites}
    starts: dict[tuple[int, int], Node] = {}
    for site, (result, *others) in results.items():
        added = None if others else _only_addition(result)
        if added is not None and place[added[1]] < place[like]:
            results[site] = [added[0]]
            starts[site.slot, site.side] = added[1]
    calls = [chain[i].call for i in order]
    arguments = (
        [call["grad_out"] for call in calls],
        [call["q"] for call in calls],
        [call["lse"] for call in calls],
        [deltas[i] for i in order],
        [keys[slot] for slot in slots],
        [values[slot] for slot in slots],
        [len(planned.readers[slot]) for slot in slots],
        calls[0]["scale"],
        dtype,
        [starts.get((slot, side)) for slot in planned.slots for side in (0, 1)],
        partials,
        len(planned.begun),
    )
    with graph.inserting_before(like):
        made = traced.call(graph, _own.depth_gather.default, *arguments, like=like)
        gradients = traced.call(graph, operator.getitem, made, 0, like=like)
        rows = {
            slot: traced.call(graph, _aten.select.int, gradients, 0, i, like=like)
            for i, slot in enumerate(planned.slots)
        }
        for site in sites:
            row = rows[site.slot]
            side = traced.call(graph, _aten.select.int, row, 0, site.side, like=like)
            for result in results[site]:
                result.replace_all_uses_with(side)
        if not planned.begun:
            return None
        return traced.call(graph, operator.getitem, made, 1, like=like)


def _only_addition(node: Node) -> tuple[Node, Node] | None:
    """Where the node is used once, in a sum with one other like it: the sum and the other."""
    (user, *others) = node.users
    if others or user.target is not _aten.add.Tensor or user.kwargs or len(user.args) != 2:
        return None
    (other, *rest) = [x for x in user.args if x is not node]
    if rest or not isinstance(other, Node):
        return None
    ours, theirs = traced.value(node), traced.value(other)
    if not isinstance(theirs, torch.Tensor):
        return None
    alike = (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    return (user, other) if alike else None
