"""Draws the pictures of README.md with the library's functions: python -m exercises.pictures"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_ppo import ppo
from lora_ppo.report import running_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path(__file__).with_name("pictures")


def figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(made)
    return made


def clip(cliprange: float = 0.2) -> "Figure":
    """The policy loss of one token and its gradient by the ratio, for an advantage of +1 and of -1."""
    ratios = torch.linspace(0.3, 1.9, 400)
    made = figure(9, 3.4)
    for place, advantage in enumerate((1.0, -1.0)):
        new = ratios.log().requires_grad_()
        one = torch.ones(1, 1, dtype=torch.bool)
        losses = [
            ppo.policy_loss(x.view(1, 1), torch.zeros(1, 1), torch.full((1, 1), advantage), one, cliprange)[0]
            for x in new
        ]
        (slopes,) = torch.autograd.grad(sum(losses), new)
        axes = made.add_subplot(
            1, 2, place + 1, xlabel="ratio r = new / old probability", title=f"advantage {advantage:+g}"
        )
        axes.plot(ratios, [x.item() for x in losses], label="loss", color="tab:blue")
        axes.plot(ratios, slopes, "--", label="gradient by the new log-probability", color="tab:red")
        axes.axvspan(1 - cliprange, 1 + cliprange, color="0.92")
        axes.axvline(1.0, color="0.6", linewidth=0.8)
        axes.axhline(0.0, color="0.6", linewidth=0.8)
        axes.set_ylim((-1.8, 0.2) if advantage > 0 else (-0.2, 2.5))
        axes.legend(loc="lower left" if advantage > 0 else "upper left", fontsize=8)
    return made


def gae() -> "Figure":
    """The advantages of ten tokens whose score comes with the last, for four lambdas."""
    rewards = torch.zeros(1, 10)
    rewards[0, -1] = 1.0
    values = torch.tensor([[0.1, 0.1, 0.2, 0.2, 0.1, 0.3, 0.5, 0.5, 0.6, 0.7]])
    mask = torch.ones(1, 10, dtype=torch.bool)
    made = figure(9, 3.6)
    axes = made.add_subplot(
        xlabel="token", ylabel="advantage", title="The score 1 comes with the last token; gamma is 1"
    )
    tokens = torch.arange(1, 11)
    axes.plot(tokens, values[0], ":", color="0.5", label="value")
    for lam in (0.0, 0.5, 0.95, 1.0):
        advantages, _ = ppo.gae(rewards, values, mask, 1.0, lam)
        axes.plot(tokens, advantages[0], "o-", markersize=4, label=f"advantage, lambda {lam:g}")
    axes.set_xticks(tokens.tolist())
    axes.axhline(0.0, color="0.6", linewidth=0.8)
    axes.legend(fontsize=8)
    return made


def mask() -> "Figure":
    """Two answers, token by token: what the policy chose, environment text, padding."""
    rows = (
        [*((word, "policy") for word in ("Oslo", "is", "it", ".", "<end>")), *[("pad", "padding")] * 4],
        [
            *((word, "policy") for word in ("ls", "<end>")),
            *((word, "environment") for word in ("notes", ".txt", "2 files")),
            *((word, "policy") for word in ("two", "files", ".", "<end>")),
        ],
    )
    colours = {"policy": "#9ecae1", "environment": "#fdd0a2", "padding": "#e5e5e5"}
    made = figure(9, 2.2)
    axes = made.add_subplot(xlim=(-1.4, 9), ylim=(2.1, -0.35))
    axes.axis("off")
    for b, row in enumerate(rows):
        axes.text(-0.15, b + 0.4, f"answer {b}", ha="right", va="center", fontsize=9)
        for t, (word, kind) in enumerate(row):
            axes.add_patch(box(t, b, colours[kind]))
            axes.text(t + 0.48, b + 0.27, word, ha="center", va="center", fontsize=9)
            axes.text(t + 0.48, b + 0.6, str(kind == "policy"), ha="center", va="center", fontsize=8, color="0.35")
    for t, kind in enumerate(colours):
        axes.text(0.5 + 3 * t, -0.2, kind, ha="center", va="center", fontsize=9, backgroundcolor=colours[kind])
    return made


def curves(found: dict[str, list[dict[str, float]]]) -> "Figure":
    """Reward, KL and entropy of runs of the toy, by label; of long runs the mean of up to 20 steps."""
    made = figure(9, 2.8)
    for place, name in enumerate(("reward", "kl", "entropy")):
        axes = made.add_subplot(1, 3, place + 1, xlabel="step", title=name)
        for label, rows in found.items():
            axes.plot(running_mean([row[name] for row in rows], 20 if len(rows) > 100 else 1), label=label)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return made


def box(x: float, y: float, colour: str):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 0.96, 0.8, facecolor=colour, edgecolor="white")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for draw in (clip, gae, mask):
        draw().savefig(FOLDER / f"{draw.__name__}.png")
