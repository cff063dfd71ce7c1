"""Have Inductor's processes compile launches ahead, as if there were an H100; print how many did.

A script: it changes what torch and Triton say of this machine. Its arguments are the launches.
"""

from __future__ import annotations

import contextlib
import sys
import time
from concurrent.futures import wait


def main(texts: list[str]) -> None:
    import torch
    from torch._inductor.async_compile import AsyncCompile

    from moda_compile.kernels import recorded

    torch.cuda.is_available = lambda: True
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch._inductor.config.compile_threads = 2
    AsyncCompile.warm_pool()
    while not AsyncCompile.use_process_pool():
        time.sleep(0.1)
    for text in texts:
        recorded.compile_ahead(text, 0)
    made = wait(recorded._ahead.values(), timeout=200).done
    for future in made:
        future.result()
    print(len(made))


if __name__ == "__main__":
    main(sys.argv[1:])
