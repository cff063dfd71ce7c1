"""What Inductor fuses in a converted model's graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import metrics

import moda_compile
from moda_compile import MoDAConfig
from moda_compile.testing import RandomStack, StackConfig


def buffers(options: dict[str, int] | None = None) -> int:
    """How many buffers Inductor asks for in forward and backward, before it fuses."""
    metrics.reset()
    config = StackConfig(
        layers=2, kv_heads=2, groups=1, head_dim=8, norm="rms", ffn="swiglu", batch=2, length=9
    )
    model, inputs = RandomStack(config), config.inputs()
    call = moda_compile.convert(model, MoDAConfig(ffn_kv="projected"), inputs, options=options)
    with torch._inductor.config.patch(fx_graph_cache=False):
        call(*inputs).square().mean().backward()
    return metrics.ir_nodes_pre_fusion


def test_the_gradient_of_an_ffn_s_input_is_not_written_out() -> None:
    """The norm in front of it uses it twice; of one layer here, as the last writes no slot."""
    default = torch._inductor.config.realize_reads_threshold
    written_out = buffers({"realize_reads_threshold": default})  # what the user says counts
    assert buffers() == written_out - 1


def test_without_ffn_slots_inductor_is_let_alone(inductor_options: dict[str, Any]) -> None:
    config = StackConfig(layers=3, kv_heads=2, groups=1, head_dim=8, batch=2, length=9)
    model, inputs = RandomStack(config), config.inputs()
    moda_compile.convert(model, MoDAConfig(), inputs)(*inputs)
    assert set(inductor_options) == {"joint_custom_pre_pass"}
