"""What bfloat16 is worth on this CPU: an answer, a PPO step and the memory of a real model, in it and in float32.

    python tools/bench/precision.py                          SmolLM2 (`make smollm2`), on two threads
    python tools/bench/precision.py --model FOLDER --repeats 9

Each precision has processes of its own, which run by turns; times are medians over all of them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lora_ppo.generate import generate  # noqa: E402
from tools.bench.measure import MB, Arm, memory_in_use, peak_above, race, trim  # noqa: E402
from tools.bench.setup import Bench  # noqa: E402
from tools.bench.speed import Work  # noqa: E402

DTYPES = ("float32", "bfloat16")
ANSWER_TOKENS = 64


def measure(model: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Seconds of each answer and step, and MB, in this process."""
    with tempfile.TemporaryDirectory() as place:
        bench = Bench([model], "cpu", dtype, repeats, Path(place))
        policy = bench.policy(model, max_new_tokens=ANSWER_TOKENS)
        trim()
        loaded = memory_in_use() / MB
        policy.stop_ids = [-1]  # no token ends an answer
        work = Work(bench, policy)
        prompt = work.prompt[: bench.question_tokens]
        answer = Arm("answer", lambda _: generate(policy, prompt, 1.0), work.reset, len)
        step = Arm("step", lambda _: work.step(), work.reset)
        for _ in range(3):  # the first of them are recorded and proven, not played
            answer.run(None)
        race([answer, step], repeats)
        if {*answer.results} != {ANSWER_TOKENS}:
            raise RuntimeError(f"expected answers of {ANSWER_TOKENS} tokens, found {answer.results}")
        work.reset()
        peak = peak_above(lambda: work.step())
        return {"answer": answer.seconds, "step": step.seconds, "loaded MB": loaded, "peak MB": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as model_name takes it [smollm2]")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs in each process [5]")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each precision [2]")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process [2]")
    parser.add_argument("--here", choices=DTYPES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        import torch

        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.model, options.here, options.repeats)))
        return
    found: dict[str, list[dict[str, Any]]] = {dtype: [] for dtype in DTYPES}
    for number in range(options.rounds):
        for dtype in DTYPES if number % 2 else reversed(DTYPES):
            command = [sys.executable, __file__, *sys.argv[1:], "--here", dtype]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
            found[dtype].append(json.loads(done.stdout.splitlines()[-1]))
    print(
        "| | seconds an answer | seconds a PPO step | MB loaded | MB more in a step |\n| --- | --- | --- | --- | --- |"
    )
    for dtype, runs in found.items():
        times = [[second for run in runs for second in run[what]] for what in ("answer", "step")]
        cells = [f"{median(all_):.2f} ({min(all_):.2f} to {max(all_):.2f})" for all_ in times]
        cells += [f"{median(run[what] for run in runs):,.0f}" for what in ("loaded MB", "peak MB")]
        print(f"| {dtype} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
