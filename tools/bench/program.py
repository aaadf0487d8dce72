"""Table 5 of tools/bench/speed.py: the program as a user starts it, and what it costs on disk and in memory."""

import contextlib
import random
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any

from lora_ppo.checkpoint import save_checkpoint
from lora_ppo.journal import LineFile, now
from lora_ppo.settings import BUNDLED_MODEL
from tools.bench.measure import MB, Arm, race, resident_peak, timing
from tools.bench.processes import ROOT, NotRun
from tools.bench.setup import Bench, Table


def tutor(bench: Bench, *settings: str, **streams: Any) -> subprocess.Popen:
    """The program as a user starts it, in a folder of its own."""
    folder = tempfile.mkdtemp(dir=bench.workspace)
    fixed = [f"model_name={BUNDLED_MODEL}", f"device={bench.device}", f"dtype={bench.dtype}"]
    command = [sys.executable, str(ROOT / "lora_ppo_demo.py"), *fixed, *settings]
    quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(command, cwd=folder, **(quiet | streams))


def measure_start(bench: Bench, table: Table) -> None:
    """Seconds to the help and to the first prompt, beside the imports alone; the memory of a session of one turn."""

    def python(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    def first_prompt(_: None) -> subprocess.Popen:
        process, seen = tutor(bench, stdout=subprocess.PIPE), ""
        while not seen.endswith("You: "):
            character = process.stdout.read(1)
            if not character:
                raise NotRun("the program ended before its first prompt")
            seen += character
        return process

    arms = [
        Arm("to the end of --help", lambda _: python(str(ROOT / "lora_ppo_demo.py"), "--help")),
        Arm("to the first prompt", first_prompt, finish=lambda process: process.communicate()),
        Arm("importing torch, transformers, peft", lambda _: python("-c", "import torch, transformers, peft")),
    ]
    race(arms, bench.repeats)
    for arm in arms:
        table.rows.append({"what": arm.name} | timing(arm))
    process = tutor(bench)
    with resident_peak(process.pid) as peak:
        process.communicate("What is the capital of France?\nA\n")
    table.rows.append({"what": "a session of one turn: peak resident memory", "MB": peak[-1] / MB})


def measure_disk(bench: Bench, table: Table) -> None:
    """Seconds of a checkpoint and of a log line, each forced to disk."""
    policy = bench.policy("tiny")
    log = LineFile(bench.workspace / "run.log")
    line = {
        "timestamp": now(),
        "question": "q" * 60,
        "answer": "a" * 300,
        "metrics": [random.random() for _ in range(16)],
    }
    folder = bench.workspace / "step_0"
    arms = [
        Arm("a checkpoint", lambda _: save_checkpoint(folder, policy, {}, "A measurement.")),
        Arm("a log line", lambda _: log.append(line)),
    ]
    race(arms, bench.repeats)
    sizes = [sum(path.stat().st_size for path in folder.iterdir()), log.size / (bench.repeats + 1)]
    for arm, size in zip(arms, sizes, strict=True):
        table.rows.append({"what": arm.name} | timing(arm) | {"MB": size / MB})


def measure_growth(bench: Bench, table: Table) -> None:
    """How the memory of a real session grows, from turn to turn."""
    import psutil

    from tasks.facts import table_facts

    questions, logs = bench.workspace / "questions.txt", bench.workspace / "logs"
    facts = random.Random(0).sample(table_facts(), 200)
    questions.write_text("".join(f"{fact.question(fact.subject.ask[0])}\n" for fact in facts), encoding="utf-8")
    settings = ("learner=simulated", f"questions={questions}", f"steps={bench.turns}", f"log_dir={logs}")
    process = tutor(bench, *settings)
    seen: list[tuple[int, float]] = []  # (turns finished, resident MB)
    watched, log = psutil.Process(process.pid), logs / "run.log"
    while process.poll() is None:
        turns = log.read_bytes().count(b"\n") if log.exists() else 0
        with contextlib.suppress(psutil.NoSuchProcess):
            seen.append((turns, watched.memory_info().rss / MB))
        time.sleep(0.2)
    last = seen[-1][0]
    if last < bench.turns:
        raise NotRun(f"the session ended after {last} of {bench.turns} turns")
    early = [resident for turns, resident in seen if 0.1 * last <= turns <= 0.2 * last + 1]
    late = [resident for turns, resident in seen if turns >= 0.9 * last and resident]
    name = f"resident memory over {last} turns"
    table.rows.append({"what": f"{name}: early", "MB": median(early)})
    table.rows.append({"what": f"{name}: late", "MB": median(late)})
    table.rows.append({"what": f"{name}: growth", "MB": median(late) - median(early)})
