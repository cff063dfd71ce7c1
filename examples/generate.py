"""Generates text with SmolLM2-135M (30 layers), as it is and converted, and prints tokens a second.

    make generate ARGS="--prompt 'The old man and the'"   # installs the model's package, then runs
    python examples/generate.py --quick                     # a tiny random model, in seconds

The slots of a token are made when it is computed and never kept, so the KV cache is that of the
plain model: its size is printed for both. Reading depth changes the function that the weights were
trained for, so the converted model's text is worse until it is trained (convert_pretrained.py).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convert_pretrained import tiny_model, weights_file  # first: it sets what transformers reads

# isort: split
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import moda_compile


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What one variant made of the prompt: its text, tokens per second, bytes in the KV cache."""

    text: str
    rate: float
    cached: int


def load(quick: bool) -> tuple[Any, Callable[[str], Tensor], Callable[[Tensor], str]]:
    """The model in evaluation, text to token ids [1, T], and ids [T] to text."""
    if quick:
        torch.manual_seed(0)
        model: Any = tiny_model()
        model.generation_config.pad_token_id = 0
        return (
            model.eval(),
            lambda text: torch.tensor([list(text.encode("ascii"))]),
            lambda ids: bytes(ids.tolist()).decode("ascii"),
        )
    folder, name = weights_file().parent, weights_file().name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return (
        model.eval(),
        lambda text: torch.tensor([tokenizer(text).input_ids]),
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
    )


def generate(model: Any, ids: Tensor, decode: Callable[[Tensor], str], new: int) -> Generated:
    """Greedy, with a static cache; the first run compiles and does not count."""
    for _ in range(2):
        start = time.perf_counter()
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=new, min_new_tokens=new, cache_implementation="static",
            return_dict_in_generate=True,
        )  # fmt: skip
        if ids.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    layers = found.past_key_values.layers
    cached = sum(x.nbytes for layer in layers for x in (layer.keys, layer.values))
    return Generated(text=decode(found.sequences[0].cpu()), rate=new / seconds, cached=cached)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--prompt", default="The capital of France is")
    add("--new", type=int, default=48, help="tokens to generate")
    add("--ffn-kv", choices=("none", "projected", "shared"), default="none")
    add("--backend", default="inductor", help="what compiles the converted model")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="a tiny random model, to see that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.new, args.backend = 8, "eager"
    return args


def main(argv: list[str] | None = None) -> dict[str, Generated]:
    """Runs the example; returns what it prints."""
    args = parse(argv)
    model, encode, decode = load(args.quick)
    model.to(args.device)
    if args.device == "cuda":
        model.to(torch.bfloat16)
    ids = encode(args.prompt).to(args.device)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    # Without depth a converted model computes bit for bit what it did: the compiled baseline.
    variants = {
        "plain, eager": None,
        "without depth": moda_compile.MoDAConfig(depth=False),
        "with depth": moda_compile.MoDAConfig(ffn_kv=args.ffn_kv),
    }
    found: dict[str, Generated] = {}
    for name, config in tqdm(variants.items(), desc="compiling and generating"):
        if config is not None:
            moda_compile.convert(model, config, example_inputs=inputs, backend=args.backend)
        found[name] = generate(model, ids, decode, args.new)
        if config is not None:
            moda_compile.revert(model)
    print(f"{args.new} tokens behind {ids.shape[1]}, batch 1, on {args.device}:\n")
    for name, one in found.items():
        print(f"{name:14} {one.rate:8.1f} tokens/s   {one.cached / 1e6:.2f} MB in the KV cache")
    for name in ("without depth", "with depth"):
        print(f"\n--- {name}\n{found[name].text}")
    return found


if __name__ == "__main__":
    main()
