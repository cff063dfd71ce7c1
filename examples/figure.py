"""The picture of ``train_shakespeare.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, never a window
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from depth_mass import DepthMass

COLOURS = {"plain": "#555555", "none": "#0072b2", "projected": "#d55e00"}
LABELS = {
    "plain": "plain",
    "none": "depth: attention slots",
    "projected": "depth: attention + FFN slots",
}


def draw_curves(axes: Axes, curves: dict[tuple[str, int], tuple[tuple[int, float], ...]]) -> None:
    """Validation loss by step, one line per (variant, seed)."""
    seen = set()
    for (variant, _), curve in curves.items():
        label = None if variant in seen else LABELS[variant]
        seen.add(variant)
        steps, losses = zip(*curve, strict=True)
        axes.plot(steps, losses, color=COLOURS[variant], label=label, alpha=0.8, marker=".")
    axes.set(xlabel="step", ylabel="validation loss (nats per character)", title="Validation loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def draw_mass(axes: Axes, variant: str, found: DepthMass) -> None:
    """Heat map: rows are layers, columns the sequence and each depth slot."""
    axes.imshow(found.mass, norm=LogNorm(1e-3, 1), cmap="viridis", aspect="auto")
    for layer, row in enumerate(found.mass.tolist()):
        for column, share in enumerate(row):
            if share == share:  # not NaN: the layer can read this slot
                shade = "black" if share > 0.1 else "white"
                text = f"{100 * share:.0f}" if share > 0.095 else f"{100 * share:.1f}"
                axes.text(column, layer, text, ha="center", va="center", color=shade, fontsize=7)
    axes.set_xticks(range(1 + len(found.slots)), ["seq", *found.slots], fontsize=8)
    axes.set_yticks(range(len(found.mass)))
    axes.set(xlabel="sequence, then slots: a = attention, f = FFN of that layer", ylabel="layer")
    axes.set_title(f"% of attention, {LABELS[variant]}")


def save_figure(
    path: Path,
    curves: dict[tuple[str, int], tuple[tuple[int, float], ...]],
    masses: dict[str, DepthMass],
) -> None:
    """Saves curves and heat maps side by side as a PNG."""
    widths = [4.5] + [max(3.0, 1.5 + 0.42 * found.mass.shape[1]) for found in masses.values()]
    figure, panels = plt.subplots(
        1,
        len(widths),
        figsize=(sum(widths), 4.2),
        width_ratios=widths,
        squeeze=False,
        layout="constrained",
    )
    draw_curves(panels[0, 0], curves)
    for axes, (variant, found) in zip(panels[0, 1:], masses.items(), strict=True):
        draw_mass(axes, variant, found)
    figure.savefig(path, dpi=150)
    plt.close(figure)
