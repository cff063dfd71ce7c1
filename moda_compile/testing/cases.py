"""What the property tests and the soak run are made of: a model, options, and what must hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import moda_compile
from moda_compile.backend import Compiler
from moda_compile.config import FFNKV, MoDAConfig
from moda_compile.errors import RewriteError
from moda_compile.testing.blocks import CHOSEN, FeedForward
from moda_compile.testing.check import Budget, check_conversion
from moda_compile.testing.reference import ReferenceMode
from moda_compile.testing.shrink import ShortRepr
from moda_compile.testing.stack_config import PairConfig, StackConfig
from moda_compile.testing.stacks import RandomPair, RandomStack

#: Near misses that are no self-attention, so a stack may hold them beside attentions; the others
#: are refused wherever they are.
NO_ATTENTION = frozenset({"linear"})


@dataclass(frozen=True, kw_only=True, repr=False)
class Case(ShortRepr):
    """One example; its repr is runnable, `Case(...).check()` runs it.

    Attributes:
        model: the stack, or the pair of stacks.
        ffn_kv: see `MoDAConfig`.
        backend: what compiles it.
        autocast: train under bf16 autocast.
        lengths: further lengths for which the same converted model runs.
        evaluate: in evaluation mode.
    """

    model: StackConfig | PairConfig = StackConfig()
    ffn_kv: FFNKV = "none"
    backend: Compiler = "eager"
    autocast: bool = False
    lengths: tuple[int, ...] = ()
    evaluate: bool = False

    def build(self) -> RandomStack | RandomPair:
        """The model."""
        config = self.model
        model = RandomStack(config) if isinstance(config, StackConfig) else RandomPair(config)
        return model.train(not self.evaluate)

    def models(self) -> list[StackConfig | PairConfig]:
        """The model's options with each length in turn, for `inputs()`."""
        if isinstance(self.model, PairConfig):
            return [self.model]
        return [self.model, *(replace(self.model, length=n) for n in self.lengths)]

    def check(self) -> None:
        """Raise AssertionError unless the conversion is right, or rightly refused."""
        model = self.build()
        if isinstance(self.model, StackConfig) and self.model.near_miss is not None:
            never_rewritten(model, self.model, self.backend)
            return
        if self.autocast or self.model.dtype != "float32":
            self._compare(model, torch.bfloat16 if self.autocast else None, Budget(condition=1.0))
            return
        try:
            self._compare(model, None, None)
        except AssertionError:
            # About one random stack in a hundred is so ill-conditioned that float32 leaves no digit
            # of some gradient. float64 tells that from a wrong rewrite, by eight decades.
            self._compare(model, None, Budget(condition=40.0))
            self._compare(model.double(), None, None)

    def _compare(
        self,
        model: RandomStack | RandomPair,
        autocast: torch.dtype | None,
        budget: Budget | None,
    ) -> None:
        passes = [config.inputs() for config in self.models()]
        if next(model.parameters()).dtype == torch.float64:
            passes = [tuple(x.double() if x.is_floating_point() else x for x in p) for p in passes]
        check_conversion(
            model,
            passes[0],
            MoDAConfig(ffn_kv=self.ffn_kv),
            backend=self.backend,
            more=passes[1:],
            compilations=2 if self.lengths else None,
            autocast=autocast,
            explain=False,
            budget=budget,
        )

    def answerable(self) -> bool:
        """Whether there is one right answer: no token's choice of experts hangs on rounding, and
        some attention reads another's slot (two attentions of two stacks are refused). Of one
        token, a softmax over the queries is one over the keys.
        """
        config = self.model
        if isinstance(config, StackConfig) and config.near_miss == "queries" and config.length == 1:
            return False
        model = self.build()
        places = [getattr(p, "stack", p) for p in model.oracle("none", {})["stacks"]]
        known = [place for place in places if place is not None]
        if len(known) > 1 and len(set(known)) == len(known):
            return False
        routed = [m for m in model.modules() if isinstance(m, FeedForward) and m.kind[:3] == "moe"]
        if not routed:
            return True
        gaps: list[float] = []

        def margin(module: FeedForward, args: tuple[Tensor, ...]) -> None:
            scores = module.router(args[0]).sort(dim=-1, descending=True).values
            gaps.append((scores[..., CHOSEN - 1] - scores[..., CHOSEN]).min().item())

        model.double()
        for module in model.modules():
            if isinstance(module, RandomStack):
                module.checkpoint = False
        parameters: dict[str, Tensor] = {}
        told: dict[str, Any] = model.oracle("none", parameters)
        if self.ffn_kv == "shared":
            told = model.oracle("shared", parameters)
        elif self.ffn_kv == "projected":
            return False  # its new weights are not drawn yet
        for module in routed:
            module.register_forward_pre_hook(margin)
        for config in self.models():
            with torch.no_grad(), ReferenceMode(model, **told):
                model(*config.inputs())
        return min(gaps) > 1e-3

    def kinds(self) -> Iterator[str]:
        """What is special about it, for a histogram."""
        yield from self.model.kinds()
        yield f"backend: {self.backend}"
        yield f"ffn_kv: {self.ffn_kv}"
        yield f"dtype: {'bfloat16 autocast' if self.autocast else self.model.dtype}"
        if self.lengths:
            yield "several lengths"
        yield "evaluation" if self.evaluate else "training"


def never_rewritten(
    model: RandomStack | RandomPair, config: StackConfig, backend: Compiler
) -> None:
    """A near miss is refused, or if it is no attention, left as it is; the model is never touched.

    Raises:
        AssertionError: if it is rewritten, or refused where the rest could be converted.
    """
    inputs = config.inputs()
    alone = all(config.layer(i).near_miss is not None for i in range(config.layers))
    if not alone and config.near_miss in NO_ATTENTION:
        check_conversion(model, inputs, backend=backend, explain=False)
        return
    before, state = model(*inputs), {k: v.clone() for k, v in model.state_dict().items()}
    torch._dynamo.reset()
    try:
        moda_compile.convert(model, MoDAConfig(), example_inputs=inputs, backend=backend)
    except RewriteError:
        pass
    else:
        raise AssertionError(f"near miss {config.near_miss!r} was converted, expected RewriteError")
    after = model.state_dict()
    if list(after) != list(state) or not all(torch.equal(after[k], state[k]) for k in state):
        raise AssertionError("the refused model's state has changed")
    # NaN is what some near misses make of a row or column that is masked out.
    if not torch.allclose(model(*inputs), before, rtol=0.0, atol=0.0, equal_nan=True):
        raise AssertionError("the refused model computes something else")
