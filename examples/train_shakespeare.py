"""Trains one small GPT as it is and with Mixture-of-Depths Attention, and reports the difference.

    python examples/train_shakespeare.py            # about five minutes on two CPU cores
    python examples/train_shakespeare.py --quick    # seconds, to see that it runs

Each seed fixes the initial weights that the variants share and the batches they see, so the
losses are compared in pairs. Prints a table and a sentence made from its numbers, whichever way
they fall, and saves a picture: the loss curves, and where each layer's attention looks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Both before torch is imported: no log lines from the profiler; and threads that sleep while they
# wait for each other, as spinning ones get ten times slower where another program has a core.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from depth_mass import DepthMass, depth_mass
from figure import save_figure
from gpt import GPT, GPTConfig

HERE = Path(__file__).resolve().parent
HELD_OUT = "\nTWELFTH NIGHT; OR, WHAT YOU WILL\n"  # the last play of the file is for validation
VARIANTS = ("plain", "none", "projected")  # the latter two: MoDAConfig(ffn_kv=...)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        curve: (step, validation loss in nats per character), the last one final.
        step_ms: median time of a training step in milliseconds, compilation left out.
        compile_s: time of the first step in seconds, nearly all of it compilation.
        saved_mib: memory that a forward pass leaves allocated for its backward, in MiB.
        mass: where attention looks; None for the plain model.
        eager_difference: largest difference of the logits between the compiled model and the
            eager computation of :mod:`depth_mass`; None for the plain model.
    """

    variant: str
    seed: int
    curve: tuple[tuple[int, float], ...]
    parameters: int
    step_ms: float
    compile_s: float
    saved_mib: float
    mass: DepthMass | None
    eager_difference: float | None

    @property
    def loss(self) -> float:
        """Final validation loss in nats per character."""
        return self.curve[-1][1]


class Text:
    """Characters of the plays as token ids, and windows of them."""

    def __init__(self, path: Path, device: torch.device) -> None:
        text = path.read_text(encoding="utf-8")
        self.alphabet = sorted(set(text))
        index = {character: i for i, character in enumerate(self.alphabet)}
        tokens = torch.tensor([index[character] for character in text], device=device)
        split = text.index(HELD_OUT)
        self.train, self.held_out = tokens[:split], tokens[split:]

    @staticmethod
    def windows(tokens: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each [len(starts), length]."""
        offsets = starts.to(tokens.device)[:, None] + torch.arange(length, device=tokens.device)
        return tokens[offsets], tokens[offsets + 1]

    def batch(self, size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random windows of the training plays."""
        starts = torch.randint(self.train.numel() - length - 1, (size,), generator=generator)
        return self.windows(self.train, starts, length)

    def validation(self, size: int, length: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """The same ``count`` batches each time, spread evenly over the held-out play."""
        starts = torch.linspace(0, self.held_out.numel() - length - 2, size * count).long()
        return [self.windows(self.held_out, s, length) for s in starts.view(count, size)]


def build(variant: str, config: GPTConfig, seed: int, example: Tensor) -> nn.Module:
    """The GPT of this seed on ``example``'s device, compiled as it is or converted."""
    torch.manual_seed(seed)
    model = GPT(config).to(example.device)
    if variant == "plain":
        model.compile()
        return model
    import moda_compile

    options = {
        "none": moda_compile.MoDAConfig(ffn_kv="none"),
        "projected": moda_compile.MoDAConfig(ffn_kv="projected"),
    }
    return moda_compile.convert(model, options[variant], example_inputs=(example,))


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits in float32; on a GPU the model itself runs in bfloat16."""
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=tokens.device.type == "cuda"):
        return model(tokens).float()


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy in nats per character."""
    return F.cross_entropy(logits_of(model, batch[0]).flatten(0, 1), batch[1].flatten())


def validate(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Mean loss over ``batches``."""
    # Under torch.no_grad() the model would be compiled a second time: half a minute for nothing.
    return statistics.fmean(loss_of(model, batch).item() for batch in batches)


def saved_for_backward(forward: Callable[[], Tensor], device: torch.device) -> float:
    """MiB that ``forward`` leaves allocated while its result is alive.

    That is what autograd keeps for backward (the result itself is one number). On a GPU the
    caching allocator tells; on the CPU the profiler adds up all allocations and releases.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        loss = forward()
        held = torch.cuda.memory_allocated(device) - before
    else:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler:
            loss = forward()
        held = sum(event.self_cpu_memory_usage for event in profiler.events())
    del loss
    return held / 2**20


def train(variant: str, seed: int, text: Text, args: argparse.Namespace) -> Run:
    """Trains one variant from one seed."""
    device = torch.device(args.device)
    config = GPTConfig(
        vocab_size=len(text.alphabet),
        num_layers=args.layers,
        width=args.width,
        num_heads=args.width // 32,
        num_kv_heads=args.width // 64,
        ffn_width=args.width * 11 // 4,
    )
    generator = torch.Generator().manual_seed(seed)
    held_out = text.validation(args.batch, args.length, args.val_batches)
    model = build(variant, config, seed, held_out[0][0])
    # After the conversion, which may have added parameters.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, pct_start=0.1, cycle_momentum=False
    )
    curve: list[tuple[int, float]] = []
    times: list[float] = []
    bar = tqdm(range(1, args.steps + 1), desc=f"{variant:9} seed {seed}", mininterval=1.0)
    for step in bar:
        batch = text.batch(args.batch, args.length, generator)
        start = time.perf_counter()
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        train_loss = loss.item()  # waits for the GPU
        del loss
        times.append(time.perf_counter() - start)
        if step % max(1, args.steps // 8) == 0 or step == args.steps:
            curve.append((step, validate(model, held_out)))
            bar.set_postfix(train=f"{train_loss:.3f}", val=f"{curve[-1][1]:.3f}")

    mass, difference = None, None
    if variant != "plain":
        mass = depth_mass(model, GPT(config).to(device), held_out[0][0])
        difference = (logits_of(model, held_out[0][0]) - mass.logits).abs().max().item()
    return Run(
        variant=variant,
        seed=seed,
        curve=tuple(curve),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        step_ms=1e3 * statistics.median(times[1:] or times),
        compile_s=times[0],
        saved_mib=saved_for_backward(lambda: loss_of(model, batch), device),
        mass=mass,
        eager_difference=difference,
    )


def table(runs: list[Run]) -> str:
    """One row per variant: losses as mean and half the range over seeds, the rest as medians."""
    head = f"{'variant':10} {'val loss':>16} {'parameters':>11} {'step ms':>8} "
    lines = [head + f"{'saved MiB':>10} {'compile s':>10}"]
    for variant in dict.fromkeys(run.variant for run in runs):
        rows = [run for run in runs if run.variant == variant]
        losses = [run.loss for run in rows]
        lines.append(
            f"{variant:10} {statistics.fmean(losses):8.4f} ± {(max(losses) - min(losses)) / 2:.4f}"
            f" {rows[0].parameters:11,} {statistics.median(r.step_ms for r in rows):8.1f}"
            f" {statistics.median(r.saved_mib for r in rows):10.1f} {rows[0].compile_s:10.1f}"
        )
    return "\n".join(lines)


def finding(runs: list[Run], steps: int) -> str:
    """One sentence on whether depth helped, from the differences within each seed."""
    plain = {run.seed: run.loss for run in runs if run.variant == "plain"}
    parts = []
    for variant in dict.fromkeys(run.variant for run in runs if run.variant != "plain"):
        gaps = [r.loss - plain[r.seed] for r in runs if r.variant == variant and r.seed in plain]
        if not gaps:
            continue
        shown = ", ".join(f"{gap:+.4f}" for gap in gaps)
        if len(gaps) == 1:
            verdict = "one seed, so this says little"
        elif max(gaps) < 0:
            verdict = "lower on every seed"
        elif min(gaps) > 0:
            verdict = "higher on every seed"
        else:
            verdict = "the sign changes with the seed, so no difference is shown"
        parts.append(
            f"ffn_kv={variant!r} ended {statistics.fmean(gaps):+.4f} nats from plain"
            f" ({shown}: {verdict})"
        )
    if not parts:
        return "No pair of runs to compare."
    return f"After {steps} steps, " + " and ".join(parts) + "."


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--layers", type=int, default=8)
    add("--width", type=int, default=128, help="a multiple of 64")
    add("--steps", type=int, default=150)
    add("--seeds", type=int, default=2, help="number of seeds")
    add("--batch", type=int, default=8)
    add("--length", type=int, default=128)
    add("--val-batches", type=int, default=8)
    add("--lr", type=float, default=2e-3)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=HERE / "out" / "demo.png", help="where the picture goes")
    add("--quick", action="store_true", help="a few tiny steps, to see that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.layers, args.width, args.steps, args.seeds = 2, 64, 4, 1
        args.batch, args.length, args.val_batches = 2, 16, 1
    return args


def main(argv: list[str] | None = None) -> list[Run]:
    """Trains every variant on every seed, prints the comparison and saves the picture."""
    args = parse(argv)
    start = time.perf_counter()
    text = Text(HERE / "data" / "shakespeare.txt", torch.device(args.device))
    runs = [
        train(variant, seed, text, args) for variant in args.variants for seed in range(args.seeds)
    ]
    print(
        f"\n{args.layers} layers of width {args.width}, {args.steps} steps of {args.batch} x "
        f"{args.length} characters, {args.seeds} seed(s), {args.device}; validation on a play "
        "held out\n"
    )
    print(table(runs))
    for run in runs:
        if run.mass is not None and run.eager_difference is not None and run.seed == 0:
            depth = 1 - run.mass.mass[1:, 0].mean().item()
            print(
                f"{run.variant}: {depth:.1%} of the attention of layers 1 and up goes to depth; "
                f"compiled and eager logits differ by at most {run.eager_difference:.1e}"
            )
    print("\n" + finding(runs, args.steps))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_figure(
        args.out,
        {(run.variant, run.seed): run.curve for run in runs},
        {run.variant: run.mass for run in runs if run.mass is not None and run.seed == 0},
    )
    print(f"Picture: {args.out}. Took {time.perf_counter() - start:.0f} s.")
    return runs


if __name__ == "__main__":
    main()
