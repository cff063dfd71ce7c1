"""DDP around a converted model: run by test_conditions.py, prints how many checks held.

Two processes of one thread over gloo. Each takes half of the batch; DDP averages the gradients,
which for a mean over the batch are those of the whole batch in one process.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parents[2]
WORLD = 2
IDS = torch.arange(36).view(4, 9) % 29


def loss_of(logits: Tensor) -> Tensor:
    return logits.square().mean()


def work(rank: int, store: str) -> None:
    """One process: two steps under DDP, checked against the oracle on the whole batch."""
    sys.path.insert(0, str(ROOT))
    import moda_compile
    from moda_compile import MoDAConfig
    from moda_compile.testing import reference
    from tests.models.checkpointed import WAYS, decoder

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=WORLD)
    half = IDS.chunk(WORLD)[rank]
    held = 0
    for ffn_kv in ("none", "projected"):
        config = MoDAConfig(ffn_kv=ffn_kv)
        alone = moda_compile.convert(decoder(), config, (IDS,), "eager")
        model = moda_compile.convert(decoder(WAYS["not reentrant"]), config, (IDS,), "aot_eager")
        state = alone.state_dict()
        for tensor in state.values():  # new weights are drawn in each process anew
            torch.distributed.broadcast(tensor, 0)
        model.load_state_dict(state)
        # Buckets of a few KB, so that gradients are reduced while backward goes on.
        parallel = DistributedDataParallel(model, bucket_cap_mb=0.01)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (parallel, alone)]
        for _ in range(2):
            loss_of(parallel(half)).backward()
            oracle = decoder()
            if ffn_kv == "none":
                weights = {n: t for n, t in alone.state_dict().items() if n != "moda_config"}
                oracle.load_state_dict(weights)
                want = loss_of(reference(oracle, IDS))
            loss = loss_of(alone(IDS))
            if ffn_kv == "none":
                torch.testing.assert_close(loss, want, rtol=0, atol=1e-10)
            loss.backward()
            for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
                # float64, order 1: rounding is 1e-16 a step.
                torch.testing.assert_close(
                    p.grad, q.grad, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
                )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            held += 1
    if rank == 0:
        print(f"{held} of 4")
    torch.distributed.destroy_process_group()


def main() -> None:
    """Start the processes and wait for them."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        torch.multiprocessing.spawn(work, (store,), WORLD)


if __name__ == "__main__":
    main()
