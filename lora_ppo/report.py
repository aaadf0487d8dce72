"""The report of a training run: one HTML file with its plots inside it, and the same plots as PNG files."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_ppo.files import replace_file

# file name: (title, what the vertical axis shows, the log's key of each step, the log's key of each evaluation)
PLOTS = {
    "reward": ("Reward", "mean reward of a step", "reward", "eval_reward"),
    "accuracy": ("Held-out accuracy", "share of right answers", "accuracy", "eval_accuracy"),
    "kl": ("KL from the base model", "nats per answer", "kl", None),
    "length": ("Response length", "tokens per answer", "length", "eval_length"),
    "entropy": ("Entropy", "nats per token", "entropy", None),
    "value_loss": ("Value loss", "half the squared error", "value_loss", None),
}
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "img{max-width:100%}.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:1rem}"
    "table{border-collapse:collapse;width:100%}td,th{border:1px solid #ccc;padding:.4rem;text-align:left;"
    "vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere;width:33%}"
)


def draw(path: Path, lines: Sequence[dict[str, Any]], name: str, baseline: Sequence[dict[str, Any]] = ()) -> None:
    """One plot as PNG: what every step had in grey and its running mean, evaluations as points, with their interval.

    The `baseline`, another run's log lines, is dashed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    title, label, key, eval_key = PLOTS[name]
    figure = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=title, xlabel="step", ylabel=label)
    points = [(line["step"], line[key]) for line in lines if line["step"] > 0 and line.get(key) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color="0.75", linewidth=1, label="training")
        axes.plot(steps, running_mean(values), color="tab:blue", label="training, mean of up to 20 steps")
    found = [line for line in lines if eval_key and line.get(eval_key) is not None]
    if found:
        steps, values = [line["step"] for line in found], [line[eval_key] for line in found]
        bars = None
        if eval_key == "eval_accuracy":
            bars = [
                [max(0.0, v - line["eval_low"]) for v, line in zip(values, found, strict=True)],
                [max(0.0, line["eval_high"] - v) for v, line in zip(values, found, strict=True)],
            ]
            axes.set_ylim(0, 1.02)
        axes.errorbar(steps, values, yerr=bars, fmt="o-", color="tab:red", capsize=3, label="held out")
    other = [(line["step"], line[key]) for line in baseline if line["step"] > 0 and line.get(key) is not None]
    if other:
        steps, values = zip(*other, strict=True)
        axes.plot(steps, running_mean(values), "--", color="tab:green", label="baseline, training")
    other = [(line["step"], line[eval_key]) for line in baseline if eval_key and line.get(eval_key) is not None]
    if other:
        axes.plot(*zip(*other, strict=True), "s--", color="tab:olive", label="baseline, held out")
    if axes.lines or axes.containers:
        axes.legend()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.savefig(path)


def running_mean(values: Sequence[float], window: int = 20) -> list[float]:
    """The mean of each value and the up to window - 1 values before it."""
    parts = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def write_report(
    folder: Path,
    lines: Sequence[dict[str, Any]],
    answers: Sequence[tuple[str, list[str], list[str]]],
    result: str,
    baseline: Sequence[dict[str, Any]] = (),
) -> Path:
    """Writes report.html and plots/*.png to `folder`; returns the path of the first.

    `lines` are the run's log lines, `answers` (question, replies before training, replies after it), `baseline` the log
    lines of a run to compare with. Model text is shown as text, whatever it contains.
    """
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    images = []
    for name, (title, _, key, _) in PLOTS.items():
        if not any(line.get(key) is not None for line in lines):
            continue  # with GRPO there is no value loss
        draw(plots / f"{name}.png", lines, name, baseline)
        data = base64.b64encode((plots / f"{name}.png").read_bytes()).decode("ascii")
        images.append(f'<img alt="{title}" src="data:image/png;base64,{data}">')
    rows = [
        f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in (asked, join(before), join(after)))}</tr>"
        for asked, before, after in answers
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>Training report</title><style>{STYLE}</style></head><body><h1>Training report</h1>",
        f"<p>{html.escape(result)}</p>",
        f'<div class="plots">{"".join(images)}</div>',
        "<h2>Held-out questions, before and after</h2>",
        "<table><tr><th>Question</th><th>Base model</th><th>Trained</th></tr>",
        *rows,
        "</table></body></html>",
    ]
    path = folder / "report.html"
    replace_file(path, ("\n".join(page) + "\n").encode("utf-8", "backslashreplace"))
    return path


def join(replies: Sequence[str]) -> str:
    return "\n\n".join(replies)
