"""The table of docs/course.md: known mistakes planted, caught and named. python -m tools.course_figures"""

from exercises import harness
from exercises.cases import FUNCTIONS
from lora_ppo import ppo


def main() -> None:
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
    main()
