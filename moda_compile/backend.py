"""The torch.compile backend: rewrite the graph Dynamo made, then hand it on to a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch._inductor
from torch.fx import Graph, GraphModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moda_compile import fx, garbage, pipeline
from moda_compile.config import MoDAConfig
from moda_compile.errors import InputError, RewriteError
from moda_compile.passes import gather, unfold, visible
from moda_compile.plan import Plan

Compiler = Literal["inductor", "aot_eager", "eager"]
_DDP = "DDP's optimizer cuts the model into one graph per gradient bucket"
_DDP_FIX = "set torch._dynamo.config.optimize_ddp=False, or wrap DDP around a converted model."
_RESUMED = "torch_dynamo_resume_in"  # Dynamo's name for what follows a graph break


class Backend:
    """A backend for ``torch.compile`` that turns the attentions of each graph into MoDA.

    Args:
        config: the options. ``ffn_kv="projected"`` needs new parameters, which only
            :func:`moda_compile.convert` can add.
        compiler: what compiles the rewritten graph: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        strict: whether an attention that can't be rewritten is an error.
        attentions: how many attentions the whole stack has. Needed where graph breaks in front of
            or behind the stack are to be tolerated: with none given, a graph that begins or ends
            in a graph break is refused, as is one with a single attention, because then part of
            the stack may be elsewhere.

    Raises:
        InputError: for an unknown compiler.
        RewriteError: when called, for what can't be rewritten.
    """

    def __init__(
        self,
        config: MoDAConfig | None = None,
        *,
        compiler: Compiler = "inductor",
        strict: bool = True,
        attentions: int | None = None,
    ) -> None:
        if compiler not in get_args(Compiler):
            raise InputError(f"compiler: got {compiler!r}, expected one of {get_args(Compiler)}.")
        self.config = MoDAConfig() if config is None else config
        if not isinstance(self.config, MoDAConfig):
            raise InputError(f"config: got {type(config).__name__}, expected a MoDAConfig.")
        self.compiler, self.strict, self.attentions = compiler, strict, attentions

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Rewrite ``gm`` in place and compile it; ``mode`` and ``options`` go to Inductor."""
        try:
            plan = pipeline.transform(gm, self.config, strict=self.strict)
        except RewriteError as error:
            if _split_by_ddp():  # parameters are no Parameters there: the reason would mislead
                raise RewriteError(
                    f"{_DDP}, which depth KV can't cross.",
                    fix=_DDP_FIX,
                    block=error.block,
                    source=error.source,
                ) from error
            raise
        if plan.attentions and not plan.marks and plan.config.depth:
            self._check_whole(gm, plan)
        if self.compiler == "eager":
            _checkpoint_eagerly(gm)
            return gm.forward
        if self.compiler == "aot_eager":
            aot = torch._dynamo.lookup_backend("aot_eager")
            return aot(gm, list(example_inputs))
        return _inductor(gm, example_inputs, plan, mode, options)

    def _check_whole(self, gm: GraphModule, plan: Plan) -> None:
        """Without marks the graph does not say how long the stack is: take no risk."""
        if self.attentions is not None:
            pipeline.check_whole(plan, self.attentions)
            return
        why = _why_partial(gm, len(plan.attentions))
        if why is not None:
            node = plan.attentions[-1].node
            raise RewriteError(
                f"{why}, so part of the stack may be in another graph, which depth KV can't reach.",
                fix="use moda_compile.convert(model), or remove the graph break (fullgraph=True "
                "shows it), or state the length: Backend(config, attentions=...).",
                block=fx.module_path(node),
                source=fx.source_line(node),
            )


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """How a rewritten model is compiled.

    Attributes:
        backend: what compiles the rewritten graph.
        mode, options: Inductor's.
        dynamic: ``torch.compile``'s.

    Raises:
        InputError: for an unknown backend, mode or option, or Inductor's with another backend.
    """

    backend: Compiler = "inductor"
    mode: str | None = None
    options: dict[str, Any] | None = None
    dynamic: bool | None = None

    def __post_init__(self) -> None:
        if self.backend not in get_args(Compiler):
            raise InputError(
                f"backend: got {self.backend!r}, expected one of {get_args(Compiler)}."
            )
        for name, given, known in (
            ("mode", None if self.mode is None else [self.mode], torch._inductor.list_mode_options),
            ("options", self.options, torch._inductor.list_options),
        ):
            if given is None:
                continue
            if self.backend != "inductor":
                raise InputError(f"{name}: is Inductor's; got it for backend={self.backend!r}.")
            unknown = sorted(set(given) - set(known()))
            if unknown:
                raise InputError(
                    f"{name}: Inductor knows no {', '.join(unknown)}; see "
                    f"torch._inductor.{known.__name__}()."
                )

    def compile(
        self,
        function: Callable[..., Any],
        config: MoDAConfig,
        *,
        strict: bool,
        attentions: int | None,
    ) -> Callable[..., Any]:
        """``function``, to be traced, rewritten and compiled in its first call."""
        backend = Backend(config, compiler=self.backend, strict=strict, attentions=attentions)
        chosen = functools.partial(backend, mode=self.mode, options=self.options)
        return torch.compile(function, backend=chosen, dynamic=self.dynamic)


def moda_compile(gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """``torch.compile(model, backend="moda_compile")``: attention slots only, through Inductor.

    The package's entry point in the group ``torch_dynamo_backends``.
    """
    return Backend()(gm, example_inputs, **kwargs)


def _why_partial(gm: GraphModule, count: int) -> str | None:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    if count == 1:
        return "this graph holds a single attention"
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        return f"this graph ends in a graph break ({reason.reason.splitlines()[0]})"
    try:
        name = InstructionTranslator.current_tx().f_code.co_name
    except AttributeError:  # called by hand, not by Dynamo
        name = ""
    if name.startswith(_RESUMED):
        return "this graph begins behind a graph break"
    return _DDP if _split_by_ddp() else None


def in_ddp() -> bool:
    """Whether a DistributedDataParallel around a model is running it."""
    if not torch.distributed.is_available():
        return False
    return DistributedDataParallel._get_active_ddp_module() is not None


def _split_by_ddp() -> bool:
    return torch._dynamo.config.optimize_ddp in (True, "ddp_optimizer") and in_ddp()


def _checkpoint_eagerly(gm: GraphModule) -> None:
    """Have checkpoints draw the same random numbers again when they recompute.

    The higher-order operator leaves that to AOTAutograd's partitioner, which does not run here.
    """
    for graph in (gm, *(inner for _, inner in fx.subgraphs(gm))):
        for node in graph.graph.nodes:
            if node.target is torch.ops.higher_order.tag_activation_checkpoint:
                node.target = _checkpoint
        graph.recompile()


def _checkpoint(body: GraphModule, *args: Any, **options: Any) -> Any:
    context_fn = body.meta.get("_checkpoint_context_fn")
    if context_fn is not None:
        options["context_fn"] = context_fn
    return checkpoint(body, *args, **{**options, "use_reentrant": False})


def _inductor(
    gm: GraphModule,
    inputs: Sequence[Any],
    plan: Plan,
    mode: str | None,
    options: dict[str, Any] | None,
) -> Callable[..., Any]:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    if any(slot.ffn is not None for slot in plan.slots):
        # An FFN's input has two more readers, the slot's key and value. The sum of their gradients
        # is used twice by a norm's backward; of more terms than this Inductor first writes it out,
        # in float32. As many as a plain model may have, and these two.
        most = torch._inductor.config.realize_reads_threshold
        patches.setdefault("realize_reads_threshold", most + 2)
    own = patches.get("joint_custom_pre_pass", torch._inductor.config.joint_custom_pre_pass)
    patches["joint_custom_pre_pass"] = _graph_pass(gather.run, own)
    if any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs):
        from moda_compile.kernels import recorded

        recorded.start_processes()
    # Donated buffers let backward overwrite what forward saved, and forbid retain_graph=True.
    with garbage.only_young(), torch._functorch.config.patch(donated_buffer=False):
        return compile_fx(gm, list(inputs), _unfold_and_compile, patches)  # type: ignore[return-value]


def _unfold_and_compile(gm: GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    """What Inductor does for a graph of forward or backward, after `visible` and `unfold`.

    Before all of Inductor's own passes: behind them it would look again at what every node that
    follows one of the changed makes, a tenth of a compilation.
    """
    from torch._inductor.compile_fx import compile_fx_inner

    with garbage.only_young():  # backward is compiled in its first call
        visible.run(gm.graph)
        unfold.run(gm.graph)
        gm.recompile()
        return compile_fx_inner(gm, inputs, **options)


@functools.cache
def source_hash() -> str:
    """A hash over this library's source files."""
    from torch._inductor.custom_graph_pass import get_hash_for_files

    root = Path(__file__).resolve().parent
    beside = [root / name for name in ("kernels", "patterns")]
    folders = [root, *(f if f.is_dir() else root.parent / f.name for f in beside)]
    files = sorted({str(p) for folder in folders for p in folder.rglob("*.py")})
    return get_hash_for_files(tuple(files)).hex()


def _graph_pass(run: Callable[[Graph], None], own: Any) -> Any:
    """A pass over Inductor's graphs, whose identity is this library's source.

    An operator's backward formula is not in the key of AOTAutograd's cache, so without it an
    upgrade of the library could hit an entry that holds the old gradient. Passes of the user's
    (``own``) run behind it, and count, as before.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class GraphPass(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            run(graph)
            for custom in own if isinstance(own, (list, tuple)) else [own]:
                if custom is not None:
                    custom(graph)

        def uuid(self) -> Any:
            passes = own if isinstance(own, (list, tuple)) else [own]
            ids = [p.uuid() if hasattr(p, "uuid") else None for p in passes if p is not None]
            return None if None in ids else (source_hash(), *map(str, ids))

    return GraphPass()
