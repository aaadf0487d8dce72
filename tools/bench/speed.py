"""How fast the tutor is, beside what a user would pick instead and beside what the machine can do.

    python tools/bench/speed.py                                            every table that needs nothing else
    python tools/bench/speed.py --trl DIR --agilerl PYTHON --json FILE     with its peers, also as JSON
    python tools/bench/speed.py --table 1 --models tiny                    one table, one model

    pip install --no-deps --target DIR trl==0.11.4 tyro docstring-parser typeguard        for --trl
    pip install --no-deps --target DIR trl==1.16.0       for --trl_latest, and pip install datasets beside this project;
                                                         not needed where requirements-dev.txt was installed
    pip install "agilerl[cpu-llm]==2.58.0"               in an environment whose python --agilerl names

1 one PPO step; 2 the wait after the key; 3 answer and quiz; 4 training in batches; 5 start-up, disk and memory.
Times are medians; what is compared runs by turns, in one run, on the same weights, tokens and threads. What was not
run stands below its table, with the reason. `tiny` is the bundled model; the others have random weights of real shapes.
"""

import argparse
import contextlib
import itertools
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lora_ppo.chat import encode_chat  # noqa: E402
from lora_ppo.evaluation import write_json  # noqa: E402
from lora_ppo.forward import collate  # noqa: E402
from lora_ppo.generate import Request, generate, plain_reply, replies  # noqa: E402
from lora_ppo.policy import Policy  # noqa: E402
from lora_ppo.quizmaster import first_requests, make_quiz  # noqa: E402
from lora_ppo.step import Foresight, ppo_step  # noqa: E402
from tools.bench.learning import TRL_VERSION, Trl, find_trl, trl_settings, versions  # noqa: E402
from tools.bench.measure import (  # noqa: E402
    MB,
    Arm,
    count,
    machine,
    memory_in_use,
    memory_rate,
    multiplication_rate,
    peak_above,
    profile,
    race,
    timing,
)
from tools.bench.processes import Child, NotRun  # noqa: E402
from tools.bench.program import measure_disk, measure_growth, measure_start  # noqa: E402
from tools.bench.setup import IN_4_BITS, SHAPES, Bench, Table, each_model, peft_layers  # noqa: E402

OURS, COPY = "this project", "this project, bf16 copy"
TRL, AGILERL = f"TRL {TRL_VERSION} PPOTrainer", "AgileRL LLMPPO"
GENERATE, GRPO = "transformers generate", "TRL GRPOTrainer"
TRAIN, TRUST_REGION = "train.py", "train.py, trust region"


# ------------------------------------------------------------------------------------------------ 1: one PPO step


class Work:
    """The sample on which every trainer takes its step, of random tokens; `reset` brings back the weights before it."""

    def __init__(self, bench: Bench, policy: Policy):
        self.policy, tokenizer = policy, policy.tokenizer
        plain = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
        drawn = random.Random(0).choices(plain, k=bench.prompt_tokens + bench.response_tokens)
        self.prompt, self.response = drawn[: bench.prompt_tokens], drawn[bench.prompt_tokens :]
        self.batch = collate([self.prompt], [self.response], policy.pad_id, policy.device)
        self.start = policy.snapshot()

    def reset(self) -> None:
        self.policy.restore(self.start)
        self.policy.model.eval()

    def step(self, score: float = 1.0) -> None:
        ppo_step(self.policy, self.batch, [score])

    def trl_arm(self, bench: Bench) -> Arm:
        """A step of TRL's PPOTrainer on the same model, adapters and settings. Raises NotRun without its folder."""
        if not bench.trl:
            raise NotRun(f"no --trl DIR with trl {TRL_VERSION} was given")
        find_trl(bench.trl)
        with peft_layers(self.policy):
            trainer = Trl(self.policy, self.policy.config.seed, trl_settings(self.policy.config))

        def step(_: None) -> None:
            with peft_layers(self.policy):
                trainer.step(self.prompt, self.response, 1.0)

        return Arm(TRL, step, self.reset)


def ppo_step_table(bench: Bench) -> Table:
    table = Table(
        1,
        f"One PPO step: one sample, prompt {bench.prompt_tokens}, response {bench.response_tokens} tokens",
        "ratio: seconds to this project's. of limit: share of the limit reached, (2 + 4 ppo_epochs) N T FLOP (policy "
        "and reference forward, backward) at the rate of a large matrix product of that dtype. Passes are of one "
        "sequence through the base. vocabulary tensors: made with V columns and a row for each response token. "
        "profiled s: one run more, under a profiler; products s: those of them in matrix products, attention's among "
        "them. tensors MB, peak MB: what the tensors, and what the process, fill at the most above the loaded model. "
        "bf16 copy: of weights in 4 bits; the other rows have none. AgileRL builds its own adapters, and a second set "
        "for its critic.",
    )
    return each_model(bench, table, measure_steps)


def measure_steps(bench: Bench, table: Table, name: str) -> None:
    """The rows of one model."""
    import torch

    policy, agile = bench.policy(name, bf16_copy="false"), None
    work, labels = Work(bench, policy), {"model": name, "dtype": policy.config.dtype}
    works, loaded = {OURS: work}, {"the loaded model": memory_in_use() / MB}
    if name in IN_4_BITS:
        with table.attempt(model=name, trainer=COPY):
            works[COPY] = Work(bench, bench.policy(name, bf16_copy="true"))
            loaded["the loaded model, bf16 copy"] = memory_in_use() / MB - sum(loaded.values())
    rate = multiplication_rate(policy.config.dtype, bench.device)
    with contextlib.ExitStack() as stack:
        with table.attempt(model=name, trainer=AGILERL):
            if not bench.agilerl:
                raise NotRun("no --agilerl PYTHON of an environment with agilerl[cpu-llm] was given")
            if name in IN_4_BITS:
                raise NotRun("it is compared on models in 16 or 32 bits")
            extra = {"prompt": work.prompt, "response": work.response}
            child = bench.child("agilerl", policy, extra, bench.agilerl, threads=torch.get_num_threads())
            agile = stack.enter_context(child)
        for epochs in (1, 4):
            for each in works.values():
                each.policy.config.ppo_epochs = epochs
            measure_step(bench, table, labels | {"epochs": epochs}, works, rate, agile)
    table.rows += [labels | {"trainer": what, "peak MB": size} for what, size in loaded.items()]


def measure_step(
    bench: Bench, table: Table, labels: dict[str, Any], works: dict[str, Work], rate: float, agile: Child | None
) -> None:
    """The rows of one number of epochs; `rate` is the machine's, in FLOP/s."""
    work, epochs = works[OURS], labels["epochs"]
    arms = [Arm(name, lambda _, own=own: own.step(), own.reset) for name, own in works.items()]
    ours = arms[0]
    with table.attempt(**labels, trainer=TRL):
        arms.append(work.trl_arm(bench))
    if agile:
        arms.append(Arm(AGILERL, lambda _: agile.ask("step", epochs=epochs)))
    race(arms, bench.repeats)
    trainable, parameters = work.policy.model.get_nb_trainable_parameters()
    flop = (2 + 4 * epochs) * (parameters - trainable) * work.batch.input_ids.numel()
    for arm in arms:
        if arm.name == AGILERL:
            made = agile.ask("probe", epochs=epochs)
        else:
            own = works.get(arm.name, work)
            recorder, run = own.policy.recorder, lambda arm=arm: arm.run(None)
            own.reset()
            recorder.able, able = False, recorder.able  # a pass that is played calls no hooks
            try:
                made = count(own.policy.model, run, bench.response_tokens)
            finally:
                recorder.able = able
            own.reset()
            made |= profile(run)
            own.reset()
            made["peak MB"] = peak_above(run)
        share = {"of limit": flop / rate / arm.median}
        table.rows.append(labels | {"trainer": arm.name} | timing(arm, ours) | share | made)
    for each in works.values():
        each.reset()
    limit = {"seconds": flop / rate, "ratio": flop / rate / ours.median, "of limit": 1.0}
    table.rows.append(labels | {"trainer": f"limit at {rate / 1e9:,.0f} GFLOP/s"} | limit)


# ----------------------------------------------------------------------------------------- 2: the wait after the key


def wait_table(bench: Bench) -> Table:
    table = Table(
        2,
        "The wait after the key: from the choice to the step's outcome",
        f"One sample, prompt {bench.prompt_tokens}, response {bench.response_tokens} tokens, ppo_epochs 1. ratio: "
        "seconds to those of the plain step. of TRL: share of the seconds of TRL's step. MB kept: of tensors, while "
        "the person reads the quiz; peak MB: of the process, above the loaded model, while both outcomes are computed.",
    )
    return each_model(bench, table, measure_wait)


def measure_wait(bench: Bench, table: Table, name: str) -> None:
    """The rows of one model."""
    work = Work(bench, bench.policy(name))
    scores = itertools.cycle((1.0, -1.0))

    def foresee(_: Any = None) -> Foresight:
        work.reset()
        foresight = Foresight(work.policy, work.batch)
        foresight.wait()
        return foresight

    plain = Arm("the plain step, after the key", lambda _: work.step(next(scores)), work.reset)
    ready = Arm("both outcomes, before the key", foresee, finish=lambda foresight: foresight.discard())
    take = Arm("picking one, after the key", lambda foresight: foresight.take(next(scores)), foresee)
    arms, theirs = [plain, ready, take], None
    with table.attempt(model=name, what=TRL):
        theirs = work.trl_arm(bench)
        arms.append(theirs)
    race(arms, bench.repeats)
    foresight = foresee()
    held = [foresight.before, *(after for _, after in foresight.outcomes.values())]
    memory = {"MB kept": sum(x.nbytes for snapshot in held for x in snapshot.tensors.values()) / MB}
    foresight.discard()
    memory["peak MB"] = peak_above(lambda: foresee().discard())
    for arm in arms:
        row = {"model": name, "dtype": work.policy.config.dtype, "what": arm.name} | timing(arm, plain)
        row |= {"of TRL": arm.median / theirs.median} if theirs else {}
        table.rows.append(row | (memory if arm is ready else {}))


# -------------------------------------------------------------------------------------------- 3: answer and quiz


def generated(policy: Policy, request: Request, seed: int) -> list[int]:
    """A reply by transformers' generate, with PEFT's layers, its way of switching adapters off, and a cache."""
    policy.model.generation_config.use_cache = True
    off = contextlib.nullcontext() if request.adapter else policy.model.disable_adapter()
    with peft_layers(policy), off:
        return plain_reply(policy, request, seed)


def answer_table(bench: Bench) -> Table:
    table = Table(
        3,
        "Question to answer to quiz, and decoding at batch 1",
        f"Decoding: {bench.new_tokens} tokens after a prompt of {bench.question_tokens}, no end token; tokens/s "
        "without the first token. generate: transformers', with PEFT's adapters. Limit: the bytes of weights "
        "and cache that a token reads, at the rate at which this machine reads as many bytes. Question to quiz: one "
        "try, its key confirmed; seconds from the question on; tokens: of answer and quiz, the same in both. ratio: to "
        "generate, of tokens/s in decoding, of seconds to the quiz.",
    )
    each_model(bench, table, measure_decoding)
    return each_model(bench, table, measure_quiz)


def measure_decoding(bench: Bench, table: Table, name: str) -> None:
    """tokens/s at batch 1, ours and generate's, and the limit."""
    policy = bench.policy(name)
    policy.stop_ids = [-1]  # no token ends a reply
    prompt = (Work(bench, policy).prompt * bench.question_tokens)[: bench.question_tokens]
    ways = {
        OURS: lambda: generate(policy, prompt, 1.0),
        GENERATE: lambda: generated(policy, Request(prompt, 1.0), 0),
    }

    def arm(how: str, tokens: int) -> Arm:
        return Arm(how, lambda _: ways[how](), lambda: setattr(policy.config, "max_new_tokens", tokens))

    first, whole = ({how: arm(how, tokens) for how in ways} for tokens in (1, bench.new_tokens))
    race([*first.values(), *whole.values()], bench.repeats)
    size = bytes_per_token(policy, bench.question_tokens + bench.new_tokens // 2)
    limit = memory_rate(size, bench.device) / size
    rates = {how: (bench.new_tokens - 1) / (whole[how].median - first[how].median) for how in ways}
    rates[f"limit at {limit * size / 1e9:.1f} GB/s"] = limit
    for how, rate in rates.items():
        row = {"model": name, "dtype": policy.config.dtype, "what": f"decoding: {how}"}
        if how in ways:
            if any(len(ids) != bench.new_tokens for ids in whole[how].results):
                raise RuntimeError(f"{how} did not write {bench.new_tokens} tokens")
            row |= {"first token s": first[how].median, "answer s": whole[how].median, "runs": whole[how].seconds}
        table.rows.append(row | {"tokens/s": rate, "of limit": rate / limit, "ratio": rate / rates[GENERATE]})


def bytes_per_token(policy: Policy, length: int) -> int:
    """Bytes that writing one token reads: every weight once (of an untied embedding one row), and the cache."""
    model = policy.model.get_base_model()
    config, embedding = model.config.get_text_config(), model.get_input_embeddings().weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if embedding is not model.get_output_embeddings().weight:
        weights -= embedding.numel() * embedding.element_size()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_hidden_layers * config.num_key_value_heads
    return weights + 2 * heads * width * length * model.dtype.itemsize


def measure_quiz(bench: Bench, table: Table, name: str) -> None:
    """First token, whole answer and quiz: both in one batch, and one after the other through generate."""
    import torch

    from tasks.facts import table_facts

    if name in SHAPES:
        raise NotRun("question to quiz: random weights write none")
    policy = bench.policy(name, quiz_tries=1)
    facts = random.Random(0).sample(table_facts(), bench.repeats)
    questions = [fact.question(fact.subject.held_out[0]) for fact in facts]

    def ask(question: str, write: Callable[[list[Request]], list[list[int]]]) -> dict[str, float]:
        torch.manual_seed(0)
        times = [time.perf_counter()]
        prompt = encode_chat(policy.tokenizer, policy.prompts.tutor.messages(question))
        stream = lambda text: times.append(time.perf_counter())  # noqa: E731
        answer = Request(prompt, policy.config.temperature, on_text=stream)
        written = write([answer, *first_requests(policy, question)])
        made = make_quiz(policy, question, written[1:]) is not None
        marks = {"first token s": times[1:2] or times, "answer s": times[-1:], "quiz s": [time.perf_counter()]}
        seconds = {mark: t - times[0] for mark, (t,) in marks.items()}
        return seconds | {"tokens": sum(map(len, written)), "quizzes": made}

    def in_turn(requests: list[Request]) -> list[list[int]]:
        seeds = torch.randint(2**53, (len(requests),)).tolist()  # as `replies` draws them: the same text is written
        return [generated(policy, request, seed) for request, seed in zip(requests, seeds, strict=True)]

    arms = []
    for how, write in ((OURS, lambda requests: replies(policy, requests)), (f"{GENERATE}, in turn", in_turn)):
        asked = iter([questions[0], *questions])  # the first is for the untimed round
        run = lambda question, write=write: ask(question, write)  # noqa: E731
        arms.append(Arm(f"question to quiz: {how}", run, lambda asked=asked: next(asked)))
    race(arms, bench.repeats)
    for arm in arms:
        row = {key: median(result[key] for result in arm.results) for key in arm.results[0]}
        row |= {"quizzes": sum(result["quizzes"] for result in arm.results), "runs": arm.seconds}
        row |= {"ratio": arm.median / arms[1].median}
        table.rows.append({"model": name, "dtype": policy.config.dtype, "what": arm.name} | row)


# ------------------------------------------------------------------------------------------ 4: training in batches


def training_table(bench: Bench) -> Table:
    shown = (f"{name}: {', '.join(f'{k} {v}' for k, v in each.items())}" for name, each in bench.batches.items())
    table = Table(
        4,
        "Training in batches: rollouts and update of one step",
        "train.py and TRL's GRPOTrainer: GRPO with LoRA, the reference by adapters off, a reward that costs nothing, "
        f"replies of full length ({'; '.join(shown)}). No trust region (target_kl=0), but where it is named. "
        "ratio: seconds to those of train.py in one process on as many threads in all; speed-up: to train.py in one "
        "process on one thread. profiled s: one step more, of the first process, under a profiler; products s: those "
        "of them in matrix products, attention's among them; tensors MB: what they fill at the most above the loaded "
        "model.",
    )
    return each_model(bench, table, measure_training)


def measure_training(bench: Bench, table: Table, name: str) -> None:
    """The rows of one model: threads and processes of train.py, and GRPOTrainer."""
    import torch

    if name not in bench.batches:
        raise NotRun(f"this table has {' and '.join(bench.batches)} alone")
    policy, settings = bench.policy(name), bench.batches[name]
    arms: dict[tuple[str, int, int], Arm] = {}
    profiles: dict[tuple[str, int, int], Callable[[], dict[str, float]]] = {}
    counts = (1, 2) if bench.device == "cpu" else (torch.get_num_threads(),)

    def add(label: str, processes: int, child: Child, n: int, **options: float) -> None:
        arms[label, processes, n] = Arm(label, lambda _: child.ask("step", threads=n, **options))
        profiles[label, processes, n] = lambda: child.ask("profile", threads=n, **options)

    with contextlib.ExitStack() as stack:
        for label, trainer, processes in ((TRAIN, "ours", 1), (GRPO, "grpo", 1), (TRAIN, "ours", 2)):
            with table.attempt(model=name, trainer=label, processes=processes):
                if processes > 1 and bench.device == "cuda":
                    raise NotRun("two processes are compared on a CPU")
                child = bench.child(trainer, policy, settings, processes=processes, threads=counts[0])
                stack.enter_context(child)
                for n in counts if processes == 1 else (1,):
                    add(label, processes, child, n)
                    if (label, processes) == (TRAIN, 1):
                        add(TRUST_REGION, 1, child, n, target_kl=1e6)
        race(list(arms.values()), bench.repeats)
        made = {key: profile() for key, profile in profiles.items()}
    for (label, processes, n), arm in arms.items():
        alone, one = arms.get((TRAIN, 1, processes * n)), arms.get((TRAIN, 1, 1))
        row = {"model": name, "dtype": policy.config.dtype, "trainer": label, "processes": processes, "threads": n}
        row |= {"samples/s": settings["batch_size"] / arm.median} | timing(arm, alone)
        row |= {"speed-up": one.median / arm.median} if one else {}
        table.rows.append(row | made[label, processes, n])


# ------------------------------------------------------------------------------------ 5: start-up, disk and memory


def upkeep_table(bench: Bench) -> Table:
    table = Table(
        5,
        "Start-up, disk and memory, with the bundled model",
        f"Growth: resident memory over {bench.turns} turns of a session with the simulated learner, the median of the "
        "last tenth of its turns less that of the second tenth.",
    )
    with table.attempt(what="start-up"):
        measure_start(bench, table)
    with table.attempt(what="checkpoint and log"):
        measure_disk(bench, table)
    with table.attempt(what="growth"):
        measure_growth(bench, table)
    return table


# ----------------------------------------------------------------------------------------------------------- program

TABLES = {1: ppo_step_table, 2: wait_table, 3: answer_table, 4: training_table, 5: upkeep_table}


def cell(value: Any) -> str:
    """Three significant digits; whole numbers whole."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def show(table: Table) -> None:
    """Prints a table, what it means, and what is missing from it."""
    from rich.console import Console
    from rich.table import Table as Grid

    columns = [name for name in dict.fromkeys(key for row in table.rows for key in row) if name != "runs"]
    grid = Grid(title=f"{table.number} {table.title}", title_justify="left")
    for name in columns:
        text = all(isinstance(row.get(name, ""), str) for row in table.rows)
        grid.add_column(name, justify="left" if text else "right", overflow="fold")
    for row in table.rows:
        grid.add_row(*(cell(row.get(name)) for name in columns))
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 200)
    if table.rows:
        console.print(grid)
    else:
        console.print(f"{table.number} {table.title}: nothing was measured")
    console.print(table.note)
    for missing in table.not_run:
        *labels, why = missing.values()
        console.print(f"not run: {', '.join(labels)}: {why}")
    console.print()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, nargs="+", choices=TABLES, default=list(TABLES), help="which tables [all]")
    parser.add_argument(
        "--models", nargs="+", default=["tiny", *SHAPES], help=f"tiny, {', '.join(SHAPES)}, or a model's folder [all]"
    )
    parser.add_argument("--trl", metavar="DIR", default="", help=f"folder into which trl {TRL_VERSION} was installed")
    parser.add_argument("--trl_latest", metavar="DIR", default="", help="folder of a trl with a GRPOTrainer")
    parser.add_argument("--agilerl", metavar="PYTHON", default="", help="python of an environment that has AgileRL")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of everything that is compared [5]")
    parser.add_argument("--turns", type=int, default=1000, help="turns of the session whose memory is watched [1000]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the base model [float32; CUDA: bfloat16]")
    parser.add_argument("--json", metavar="FILE", default="", help="also writes the tables and every single run here")
    arguments = parser.parse_args()
    for name in ("repeats", "turns"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} is out of range: expected at least 1")
    for name in arguments.models:
        if name not in ("tiny", *SHAPES) and not Path(name).is_dir():
            parser.error(f"--models {name}: expected tiny, {', '.join(SHAPES)}, or a folder")
    for name in ("trl", "trl_latest"):
        folder = getattr(arguments, name)
        if folder and not (Path(folder) / "trl").is_dir():
            parser.error(f"--{name} {folder} holds no trl: see the top of --help for how to install it")
    return arguments


def main() -> int:
    """The program; its tables are printed, and written to the JSON file, one by one as they are done."""
    arguments = parse_arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    chosen = {name: getattr(arguments, name) for name in "models repeats trl agilerl turns".split()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = arguments.dtype or {"cuda": "bfloat16", "cpu": "float32"}[device]
    record = {"command": shlex.join(["python", *sys.argv]), "machine": machine() | versions(), "tables": []}
    print(record["command"], *(f"{name}: {value}" for name, value in record["machine"].items()), sep="\n", end="\n\n")
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        latest = str(Path(arguments.trl_latest).resolve()) if arguments.trl_latest else ""
        bench = Bench(device=device, dtype=dtype, workspace=Path(folder), trl_latest=latest, **chosen)
        for number in arguments.table:
            table = TABLES[number](bench)
            show(table)
            record["tables"].append(asdict(table))
            if arguments.json:
                write_json(Path(arguments.json), record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
