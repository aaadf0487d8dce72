"""What `python -m exercises` prints: the six verdicts, and for those that fail the input, both results, the mistake."""

import json
import math
import os
import textwrap
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from exercises.harness import TITLES, Verdict, equal

WIDTH = 80


def text_of(value: Any) -> str:
    """A value of an input or a result, short: [[-0.5, 1.25]]."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, SimpleNamespace):
        return ", ".join(f"{name}={text_of(v)}" for name, v in vars(value).items())
    if isinstance(value, float):
        return f"{value + 0.0:.4g}"  # + 0.0 makes 0 of -0
    return "none" if value is None else str(value)


def as_json(verdicts: Sequence[Verdict]) -> str:
    """A list with an object for each exercise; a number that is not finite becomes a string."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return plain(value.tolist())
        if isinstance(value, SimpleNamespace):
            return plain(vars(value))
        if isinstance(value, dict):
            return {name: plain(v) for name, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    rows = [
        {
            "exercise": v.exercise,
            "name": v.name,
            "passed": v.passed,
            "input": plain(v.inputs),
            "expected": plain(v.expected),
            "got": plain(v.got),
            "mistake": v.mistake or None,
        }
        for v in verdicts
    ]
    return json.dumps(rows, indent=1, allow_nan=False)


def show(file: str, verdicts: Iterable[Verdict], console: Console | None = None) -> int:
    """Prints the verdicts as they come; returns the exit status."""
    console = console or Console(highlight=False)
    width = min(WIDTH, console.width)
    found = []
    for v in verdicts:
        if not found:
            console.print(Text(f"The PPO course: {os.path.relpath(file)}\n", "bold"))
        found.append(v)
        word, style = (
            ("passes", "green") if v.passed else ("not filled in yet", "dim") if v.blank else ("differs", "red")
        )
        console.print(Text.assemble(f"  {v.exercise}  {TITLES[v.exercise]:<26}", (word, style)))
    passed = sum(v.passed for v in found)
    bar = "█" * (5 * passed) + "░" * (5 * (len(found) - passed))
    console.print(Text.assemble("\n  ", (bar, "green"), f"  {passed} of {len(found)} pass"))
    for v in found:
        if not v.passed and not v.blank:
            console.print(explained(v, width))
    if todo := next((v for v in found if not v.passed), None):
        what = "fill in" if todo.blank else "mend"
        where = f"chapter {todo.exercise}, exercises/README.md"
        console.print(Text(f"\nNext to {what}: exercise {todo.exercise}, {todo.name} ({where})."))
    else:
        path = os.path.relpath(file)
        name = "exercises.ppo" if path == os.path.join("exercises", "ppo.py") else path
        console.print(Text(f"\nNow train with them:\n  python train.py --config configs/debug.yaml functions={name}"))
    return 0 if passed == len(found) else 1


def explained(v: Verdict, width: int = WIDTH) -> Text:
    """The input on which a function differs, what is expected and what it gives, and the mistake."""
    lines = Text(f"\nExercise {v.exercise}, {v.name}", "bold")
    if v.inputs:
        inputs = {labelled(name, value): value for name, value in v.inputs.items()}
        column = max(map(len, inputs)) + 2
        lines.append("\n  The smallest input on which it differs:\n", "not bold")
        for name, value in inputs.items():
            lines.append(wrapped(f"    {name.ljust(column)}", text_of(value), width), "not bold")
    if v.expected and v.got:
        for name, right in v.expected.items():
            mine = v.got[name]
            if equal(mine, right):
                lines.append(wrapped(f"  {name}: ", f"{text_of(right)}, as expected", width), "not bold dim")
            else:
                lines.append(f"  {name}\n", "not bold")
                lines.append(wrapped("    expected  ", text_of(right), width), "not bold green")
                lines.append(wrapped("    got       ", text_of(mine), width), "not bold red")
    elif v.expected:
        for name, right in v.expected.items():
            lines.append(wrapped(f"  {name}, expected: ", text_of(right), width), "not bold green")
    lines.append("\n" if not v.inputs else "")
    lines.append(wrapped("  Mistake: ", v.mistake, width).rstrip("\n"), "bold yellow")
    return lines


def labelled(name: str, value: Any) -> str:
    """The name of an input, with its dtype where that is half of what matters."""
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return f"{name} ({str(value.dtype)[6:]})" if half else name


def wrapped(head: str, text: str, width: int) -> str:
    """A paragraph that hangs from its head."""
    return textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * len(head)) + "\n"
