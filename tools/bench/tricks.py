"""What each trick is worth: a reply, a quiz and a PPO step with it turned off, beside each with all of them.

    python tools/bench/tricks.py                                   SmolLM2 (`make smollm2`) and the bundled model
    python tools/bench/tricks.py --models smollm2 --dtypes float32 --repeats 5

A trick stays if it gives 15 % of the time or memory of a real model's reply, quiz or step. The quiz is what the
quizmaster writes for one that is agreed on: short answers beside the tutor's, wrong options, and scores. All ways run
by turns in one process; seconds are medians, `without` is the ratio to those with all tricks. Peaks are above the
loaded model. Those of a GPU (recorded passes, the 16-bit copy of 4-bit weights) are measured by speed.py there.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lora_ppo import caches, ppo  # noqa: E402
from lora_ppo.generate import Request, generate, replies  # noqa: E402
from lora_ppo.policy import Policy  # noqa: E402
from lora_ppo.quizmaster import ANSWERS, Draft, answer_logprobs, answer_requests, with_wrong_options  # noqa: E402
from tools.bench.measure import Arm, peak_above, race  # noqa: E402
from tools.bench.setup import Bench  # noqa: E402
from tools.bench.speed import Work  # noqa: E402

REPLY, QUIZ, STEP = "reply", "quiz", "step"
QUESTION, OPTIONS = "Which planet is known as the red planet?", ("Mars", "Venus", "Earth", "Jupiter")


@contextlib.contextmanager
def changed(thing: Any, name: str, value: Any) -> Iterator[None]:
    """In here the attribute `name` of a thing is `value`."""
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


@contextlib.contextmanager
def without_own_forward(policy: Policy, is_trick: Callable[[Any], bool]) -> Iterator[None]:
    """In here the modules whose own forward is such a trick have that of their class."""
    own = {m: vars(m).pop("forward") for m in policy.model.modules() if is_trick(vars(m).get("forward"))}
    if not own:
        raise RuntimeError("the trick is not there to be turned off")
    try:
        yield
    finally:
        for module, function in own.items():
            module.forward = function


def is_product(function: Any) -> bool:
    return getattr(function, "__qualname__", "").startswith("speed_up_products")


def is_lean(function: Any) -> bool:
    return type(getattr(getattr(function, "func", function), "__self__", None)).__name__ == "LeanLayer"


def tricks(policy: Policy) -> dict[str, tuple[Callable[[], Any], tuple[str, ...]]]:
    """How each is turned off, and where it acts."""
    found: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {}
    if policy.recorder.compiled:
        found["compiled pass"] = lambda: changed(policy.recorder, "compiled", None), (REPLY,)
    if policy.beginnings.kept:
        found["remembered beginnings"] = lambda: changed(policy.beginnings, "kept", {}), (QUIZ,)
    if policy.config.dtype == "float32":
        found["products by oneDNN, rows in blocks"] = lambda: without_own_forward(policy, is_product), (REPLY, STEP)
    found["spared activations"] = lambda: without_own_forward(policy, is_lean), (STEP,)
    found["rounding up"] = lambda: changed(caches, "ROUND", 1), (STEP,)
    found["pieces of the vocabulary"] = lambda: changed(ppo, "PIECE", dict.fromkeys(ppo.PIECE, 2**40)), (STEP,)
    return found


def measure(bench: Bench, name: str) -> None:
    """Prints the rows of one model in one precision."""
    policy = bench.policy(name, max_new_tokens=bench.new_tokens)
    work, stops = Work(bench, policy), policy.stop_ids
    prompt = work.prompt[: bench.question_tokens]

    def reply() -> None:
        policy.stop_ids = [-1]  # no token ends it
        generate(policy, prompt, 1.0)
        policy.stop_ids = stops

    def quiz() -> None:
        answering = Request(prompt, 1.0)
        replies(policy, [answering, *answer_requests(policy, QUESTION)])
        replies(policy, answer_requests(policy, QUESTION))
        with_wrong_options(policy, Draft(QUESTION, OPTIONS[0], ANSWERS))
        answer_logprobs(policy, QUESTION, OPTIONS)

    runs = {REPLY: reply, QUIZ: quiz, STEP: work.step}
    ways = {"all of them": (contextlib.nullcontext, (REPLY, QUIZ, STEP))} | tricks(policy)

    def arm(way: str, what: str) -> Arm:
        def run(_: Any) -> None:
            with ways[way][0]():
                runs[what]()

        return Arm(way, run, work.reset)

    arms = {(way, what): arm(way, what) for way, (_, where) in ways.items() for what in where}
    reply()  # what is compiled is proven here
    race([*arms.values()], bench.repeats)
    peaks = {}
    for (way, what), each in arms.items():
        if what == STEP:
            work.reset()
            peaks[way] = peak_above(lambda each=each: each.run(None))
    for (way, what), each in arms.items():
        ratio = each.median / arms["all of them", what].median
        peak = f"{peaks[way]:.0f}" if what == STEP else ""
        print(
            f"| {name} | {policy.config.dtype} | {what} | {way} | {each.median:.3f} | {ratio:.2f} | {peak} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2", "tiny"], help="tiny: the bundled model")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of all but the bundled model")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each [3]")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    print("| model | dtype | | turned off | seconds | without | peak MB |\n" + "| --- " * 7 + "|")
    with tempfile.TemporaryDirectory() as place:
        for name in options.models:
            for dtype in ["float32"] if name == "tiny" else options.dtypes:
                bench = Bench([name], "cpu", dtype, options.repeats, Path(place), new_tokens=48)
                measure(bench, name)


if __name__ == "__main__":
    main()
