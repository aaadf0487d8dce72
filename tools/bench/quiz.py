"""What a model's quizzes are worth on facts that nobody chose anything by, and how long a question waits for its quiz.

    python tools/bench/quiz.py model_name=smollm2                      200 questions, phrased as no prompt phrases them
    python tools/bench/quiz.py model_name=smollm2 questions=40 out=runs/quiz_bench.jsonl

Settings are the tutor's. Each question goes through the tutor's own functions: the answer is streamed, and its quiz is
begun beside it. Each result is a line of `out`; a run that was stopped goes on behind the last. Last comes the gate on
gold quizzes: which of the table's own four options the model holds likeliest.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from config import Config  # noqa: E402
from lora_ppo.chat import encode_chat  # noqa: E402
from lora_ppo.generate import Request, replies  # noqa: E402
from lora_ppo.journal import turn_seed  # noqa: E402
from lora_ppo.loading import load_policy  # noqa: E402
from lora_ppo.policy import Policy  # noqa: E402
from lora_ppo.quiz import flaw, quiz_text  # noqa: E402
from lora_ppo.quizmaster import answer_logprobs, first_requests, make_quiz, survives  # noqa: E402
from lora_ppo.settings import parse  # noqa: E402
from lora_ppo.statistics import wilson_interval  # noqa: E402
from lora_ppo.terminal import program  # noqa: E402
from tasks.facts import Fact  # noqa: E402
from tasks.questions import split_samples  # noqa: E402
from tasks.quiz_gate import ensure_gate, says, sound  # noqa: E402


def turn(policy: Policy, number: int, question: str, fact: Fact) -> dict[str, Any]:
    """One question as the tutor takes it, up to its quiz."""
    import torch

    torch.manual_seed(turn_seed(policy.config.seed, number))
    prompt, times, why = encode_chat(policy.tokenizer, policy.prompts.tutor.messages(question)), [], []
    started = time.perf_counter()
    answering = Request(prompt, policy.config.temperature, on_text=lambda text: times.append(time.perf_counter()))
    response, *written = replies(policy, [answering, *first_requests(policy, question)])
    quiz = make_quiz(policy, question, written, why)
    seconds = time.perf_counter() - started
    row: dict[str, Any] = {"question": question, "fact": fact.answer, "why": why, "tokens": len(response)}
    row |= {"first_token": (times or [started])[0] - started, "answer": (times or [started])[-1] - started}
    row |= {"seconds": seconds, "quiz": None}
    if quiz:
        options = [quiz.options[quiz.key], *(option for i, option in enumerate(quiz.options) if i != quiz.key)]
        row |= {"quiz": quiz_text(quiz.question, options), "key_right": says(options[0], fact)}
        row |= {"sound": sound(options, fact), "flaw": flaw(quiz.question, options)}
    if policy.quiz_gate.signal == "options":
        from lora_ppo.quiz import Quiz

        row["gold"] = survives(policy, Quiz(fact.quiz_question, fact.options, 0))
    else:
        scores = answer_logprobs(policy, fact.quiz_question, fact.options)
        row["gold"] = scores.index(max(scores)) == 0
    return row


def share(rows: Sequence[Any]) -> str:
    """`91.2 % (77.0 to 97.0), 31 of 34`."""
    low, high = wilson_interval(sum(rows), len(rows))
    text = f"{100 * sum(rows) / len(rows):.1f} % ({100 * low:.1f} to {100 * high:.1f}), " if rows else ""
    return f"{text}{sum(rows)} of {len(rows)}"


@program
def main() -> int:
    words = sys.argv[1:]
    if "-h" in words or "--help" in words:
        print(__doc__)
        return 0
    own = dict(word.split("=", 1) for word in words if word.startswith(("questions=", "out=")))
    out = Path(own.get("out", "runs/bench_quiz.jsonl"))
    config = parse(Config, [word for word in words if not word.startswith(("questions=", "out="))])
    policy, _ = load_policy(config)
    ensure_gate(policy, print)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    asked = split_samples("test")[: int(own.get("questions", "200"))]
    with out.open("a") as file:
        for number, sample in list(enumerate(asked))[len(rows) :]:
            rows.append(turn(policy, number, sample.question, sample.fact))
            print(json.dumps(rows[-1]), file=file, flush=True)
    quizzes = [row for row in rows if row["quiz"]]
    print(f"| {len(rows)} questions on held-out facts | {policy.config.model_name} |\n| --- | --- |")
    print(f"| gate | {policy.quiz_gate} |")
    print(f"| quizzes with the key right, all others wrong | {share([r['sound'] for r in quizzes])} |")
    print(f"| quizzes whose key is right | {share([r['key_right'] for r in quizzes])} |")
    print(f"| questions that get a quiz | {share([bool(r['quiz']) for r in rows])} |")
    print(f"| degenerate quizzes | {sum(bool(r['flaw']) for r in quizzes)} of {len(quizzes)} |")
    print(f"| gold quizzes solved, by chance 25 % | {share([r['gold'] for r in rows])} |")
    for name, some in (("a quiz", quizzes), ("a quiz or none", rows)):
        times = sorted(r["seconds"] for r in some) or [0.0]
        print(f"| seconds from question to {name}, median (most) | {median(times):.1f} ({times[-1]:.1f}) |")
    print(
        f"| seconds to the first token, to the answer's last | {median(r['first_token'] for r in rows):.2f}, "
        f"{median(r['answer'] for r in rows):.1f} |"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
