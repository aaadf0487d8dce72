"""The figures of docs/course.md.

python -m tools.course_figures               known mistakes: planted, caught, named
python -m tools.course_figures learning      configs/debug.yaml with a policy loss of the wrong sign
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from exercises import harness
from exercises.cases import FUNCTIONS
from lora_ppo import ppo

ROOT = Path(__file__).resolve().parents[1]
WRONG = """
from exercises.solutions import *
from exercises.solutions import policy_loss as _right

def policy_loss(*arguments):
    loss, clip_fraction = _right(*arguments)
    return -loss, clip_fraction
"""


def learning() -> None:
    """Prints the held-out accuracy of the library's run and of one with the policy loss' sign turned round."""
    with tempfile.TemporaryDirectory() as folder:
        functions, run = Path(folder, "wrong.py"), Path(folder, "run")
        functions.write_text(WRONG, encoding="utf-8")
        settings = [f"functions={functions}", f"output_dir={run}"]
        subprocess.run([sys.executable, "train.py", "--config", "configs/debug.yaml", *settings], cwd=ROOT, check=True)
        for name, log in (("library", run / "library/train.log"), ("wrong sign", run / "train.log")):
            lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            shares = [100 * line["eval_accuracy"] for line in lines if "eval_accuracy" in line]
            print(f"{name}: from {shares[0]:.0f} % to {shares[-1]:.0f} %")


def table() -> None:
    print("| exercise | function | planted | caught | named | library passes |\n| --- | --- | --- | --- | --- | --- |")
    sums = [0, 0, 0]
    for function in FUNCTIONS:
        verdicts = [(m, harness.check(function, harness.made(function, m))) for m in function.mistakes]
        counts = (
            len(verdicts),
            sum(not v.passed for _, v in verdicts),
            sum(v.mistake == m.sentence for m, v in verdicts),
        )
        sums = [a + b for a, b in zip(sums, counts, strict=True)]
        right = harness.check(function, getattr(ppo, function.name)).passed
        cells = (function.exercise, f"`{function.name}`", *counts, "yes" if right else "NO")
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    print("| | all | " + " | ".join(map(str, sums)) + " | |")


if __name__ == "__main__":
    learning() if sys.argv[1:] == ["learning"] else table()
