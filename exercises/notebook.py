"""The course as a notebook, made of README.md and ppo.py: python -m exercises.notebook writes notebook.ipynb.

A test holds the notebook to what is made here, so that the two can't differ.
"""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
START = """\
import os
import sys
import warnings
from pathlib import Path

# The notebook lies in the folder exercises/ of the repository, which it needs around it.
found = [p for p in (Path.cwd(), *Path.cwd().parents) if (p / "lora_ppo" / "ppo.py").is_file()]
if not found:
    raise SystemExit("Get the whole repository first, and open exercises/notebook.ipynb in it.")
os.chdir(found[0])
sys.path.insert(0, str(found[0]))
%matplotlib inline
warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars as text will do
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exercises import pictures
from exercises.notebook import check, compare
from exercises.toy import runs
from exercises.walk import walk"""
MARKS = re.compile(
    r"<!-- exercise: (?P<exercise>\w+) -->|!\[[^\]]*\]\(pictures/(?P<picture>\w+)\.png\)"
    r"|`python -m exercises toy (?P<toy>[^`]+)`(?=\n\n<details>)|<!-- (?P<own>walk|compare) -->"
)


def check(function: Callable) -> None:
    """Prints the verdict on a function of the course."""
    from rich.console import Console

    from exercises import harness, screen
    from exercises.cases import FUNCTIONS

    verdict = harness.check(next(f for f in FUNCTIONS if f.name == function.__name__), function)
    console = Console(highlight=False, width=screen.WIDTH)
    if verdict.passed:
        console.print(f"[green]{function.__name__} passes.[/green]")
    else:
        console.print(screen.explained(verdict))


def compare(space: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """A run of the toy with the library's functions, and one with those of `space` that are filled in."""
    from exercises.toy import Toy, run
    from lora_ppo.functions import FUNCTIONS, replaced, unfinished

    mine = {name: space[name] for name in FUNCTIONS if name in space and not unfinished(space[name])}
    with replaced(mine):
        own = run(Toy())
    return {"the library's": run(Toy()), f"with {len(mine)} of yours": own}


def build() -> dict[str, Any]:
    """The notebook, as nbformat has it."""
    import exercises.ppo as blanks

    text, cells = (FOLDER / "README.md").read_text(encoding="utf-8"), []

    def add(kind: str, source: str, **metadata: Any) -> None:
        if source.strip():
            cell = {"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": metadata}
            cell["source"] = source.strip("\n").splitlines(keepends=True)
            cells.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))

    add("code", START)
    place = 0
    for mark in MARKS.finditer(text):
        add("markdown", text[place : mark.start()].replace("\n---\n", "\n"))
        place = mark.end()
        if name := mark["exercise"]:
            source = inspect.getsource(getattr(blanks, name))
            add("code", f"{source}\n\ncheck({name})", tags=[f"exercise-{name}"])
        elif name := mark["picture"]:
            add("code", f"pictures.{name}()")
        elif mark["toy"]:
            add("code", f'pictures.curves(runs("{mark["toy"]}".split()))')
        else:
            add("code", "pictures.curves(compare(globals()))" if mark["own"] == "compare" else "walk();")
    add("markdown", text[place:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    language = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": language},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def text_of_notebook() -> str:
    return json.dumps(build(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (FOLDER / "notebook.ipynb").write_text(text_of_notebook(), encoding="utf-8")
