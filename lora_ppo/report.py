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
    "kl_coef": ("Price of KL", "kl_coef", "kl_coef", None),
}
# The same, of runs that are watched, because a model rewards them.
MORE_PLOTS = {
    "score": ("Score of the reward model", "mean score of a step", "score", "eval_reward"),
    "distinct_2": ("Different pairs of words", "share of all", None, "eval_distinct_2"),
    "facts": ("Facts kept", "share of replies", "states_fact", "eval_states_fact"),
    "frontier": ("Reward over distance", "held-out reward", None, "eval_kl"),
}
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "img{max-width:100%}.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:1rem}"
    "table{border-collapse:collapse;width:100%;table-layout:fixed}"
    "td,th{border:1px solid #ccc;padding:.4rem;text-align:left;vertical-align:top;"
    "white-space:pre-wrap;overflow-wrap:anywhere}"
)


def draw(path: Path, lines: Sequence[dict[str, Any]], name: str, baseline: Sequence[dict[str, Any]] = ()) -> None:
    """One plot as PNG: what every step had in grey and its running mean, evaluations as points, with their interval.

    The `baseline`, another run's log lines, is dashed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    title, label, key, eval_key = (PLOTS | MORE_PLOTS)[name]
    figure = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=title, xlabel="step", ylabel=label)
    points = [(line["step"], line[key]) for line in lines if line["step"] > 0 and key and line.get(key) is not None]
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
    other = [(line["step"], line[key]) for line in baseline if line["step"] > 0 and key and line.get(key) is not None]
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


def draw_frontier(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """The held-out reward over the square root of KL, evaluation by evaluation, as PNG.

    A reward model's score still rises where what it stands for has turned (Gao et al. 2022,
    https://arxiv.org/abs/2210.10760): the share of right answers, by the task's own rules, is drawn beside it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = [line for line in lines if None not in (line.get("eval_kl"), line.get("eval_accuracy"))]
    distance = [max(line["eval_kl"], 0.0) ** 0.5 for line in found]
    figure = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    title, label, *_ = MORE_PLOTS["frontier"]
    axes = figure.add_subplot(title=title, xlabel="square root of KL (nats per answer)", ylabel=label)
    axes.plot(distance, [line["eval_reward"] for line in found], "o-", color="tab:red", label="reward")
    right = axes.twinx()
    right.set(ylabel="share of right answers", ylim=(0, 1.02))
    right.plot(distance, [line["eval_accuracy"] for line in found], "s--", color="tab:blue", label="right answers")
    axes.legend(handles=[*axes.lines, *right.lines])
    axes.grid(alpha=0.3)
    figure.savefig(path)


def by_level(lines: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Rows of a table: each topic or level that was trained on, its steps, accuracy, score; then those held out."""
    levels: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if "level" in line and None not in (line.get("accuracy"), line.get("score")):  # a skipped step may lack them
            levels.setdefault(line["level"], []).append(line)
    rows = []
    for level, own in levels.items():
        score = sum(line["score"] for line in own) / len(own)
        rows.append((level, str(len(own)), f"{sum(line['accuracy'] for line in own) / len(own):.1%}", f"{score:+.2f}"))
    held_out = [line["eval_by_level"] for line in lines if line.get("eval_by_level")]
    for level in held_out[-1] if held_out else ():
        first, last = held_out[0].get(level, held_out[-1][level]), held_out[-1][level]
        accuracy, score = (
            f"{first[key]:{form}} to {last[key]:{form}}" for key, form in (("accuracy", ".0%"), ("reward", "+.2f"))
        )
        rows.append((level, "held out", accuracy, score))
    return rows


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
    watched = any(line.get("eval_kl") is not None for line in lines)
    for name, (title, _, key, eval_key) in (PLOTS | (MORE_PLOTS if watched else {})).items():
        if not any(line.get(key or eval_key) is not None for line in lines):
            continue  # with GRPO there is no value loss
        if name == "kl_coef" and len({line.get(key) for line in lines} - {None}) == 1:
            continue  # it is not steered
        if name == "reward" and any("score" in line for line in lines):
            continue  # of steps it is in other units than of evaluations: the score is drawn
        if name == "frontier":
            draw_frontier(plots / f"{name}.png", lines)
        else:
            draw(plots / f"{name}.png", lines, name, baseline)
        data = base64.b64encode((plots / f"{name}.png").read_bytes()).decode("ascii")
        images.append(f'<img alt="{title}" src="data:image/png;base64,{data}">')
    rows = [
        f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in (asked, join(before), join(after)))}</tr>"
        for asked, before, after in answers
    ]
    scored = any("score" in line for line in lines)  # by a reward model: its task has topics
    kind, score = ("Topic", "Score") if scored else ("Level", "Reward")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>Training report</title><style>{STYLE}</style></head><body><h1>Training report</h1>",
        f"<p>{html.escape(result)}</p>",
        f'<div class="plots">{"".join(images)}</div>',
        *table(f"By {kind.lower()}", (kind, "Steps", "Accuracy", score), by_level(lines)),
        "<h2>Held-out questions, before and after</h2>",
        "<table><tr><th>Question</th><th>Base model</th><th>Trained</th></tr>",
        *rows,
        "</table></body></html>",
    ]
    path = folder / "report.html"
    replace_file(path, ("\n".join(page) + "\n").encode("utf-8", "backslashreplace"))
    return path


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A heading and a table in HTML; nothing without rows."""
    if not rows:
        return []
    head = "".join(f"<th>{html.escape(text)}</th>" for text in headings)
    cells = ["".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows]
    return [
        f"<h2>{html.escape(title)}</h2>",
        f"<table><tr>{head}</tr>",
        *(f"<tr>{row}</tr>" for row in cells),
        "</table>",
    ]


def join(replies: Sequence[str]) -> str:
    return "\n\n".join(replies)
