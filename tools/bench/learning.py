"""How many answers, and how many seconds, it takes to learn: this project's PPO beside TRL 0.11.4's.

    pip install --no-deps --target DIR trl==0.11.4 tyro docstring-parser typeguard
    python tools/bench/learning.py --trl DIR          both, over five seeds
    python tools/bench/learning.py                    this project's alone
    python tools/bench/learning.py --control          rewards shuffled among questions: this must not learn
    python tools/bench/learning.py --validation --set learning_rate=1e-3          to choose settings by
    python tools/bench/learning.py --learner rules --steps 150 --seeds 3 --set model_name=smollm2          a real model

One answer a step, as a person drives the tutor, with the simulated learner of `tasks/quiz.py` in the person's place, or
with one by rules (`--learner rules`, half_known.py). A benchmark that was stopped goes on from its output file.
Every run of a seed has the same start, questions in the same order, random numbers and held-out facts; the quizzes are
written beforehand by the base model, and are the same for all. Seconds are those of sampling, judging and steps.

TRL's PPOTrainer (the last release line with a `step` for one batch) is driven as its documentation drives it: with its
defaults, except for a batch of one, and with this project's settings. It trains the same LoRA adapters from the same
weights, through PEFT's own layers. It has no notion of a sampling temperature: its log-probabilities are those of
temperature 1.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from config import Config  # noqa: E402
from evaluate import percent  # noqa: E402
from lora_ppo.chat import encode_chat, encode_text  # noqa: E402
from lora_ppo.evaluation import Answer, answer_all, write_json  # noqa: E402
from lora_ppo.forward import collate, token_logprobs_and_values  # noqa: E402
from lora_ppo.generate import generate  # noqa: E402
from lora_ppo.journal import turn_seed  # noqa: E402
from lora_ppo.loading import load_policy  # noqa: E402
from lora_ppo.policy import Policy  # noqa: E402
from lora_ppo.ppo import exact_kl  # noqa: E402
from lora_ppo.settings import ConfigError  # noqa: E402
from lora_ppo.statistics import newcombe_interval, wilson_interval  # noqa: E402
from lora_ppo.step import StepSkipped, ppo_step  # noqa: E402
from lora_ppo.terminal import program  # noqa: E402
from lora_ppo.training import chunks  # noqa: E402
from tasks.quiz import QUIZZES_PER_PASS, QuizTask, Sample  # noqa: E402
from tools.bench.half_known import RuleTask  # noqa: E402

TRL_VERSION, TRL_NEEDS = "0.11.4", "trl==0.11.4 tyro docstring-parser typeguard"
ARMS = {"ours": "ours", "trl": "TRL, our settings", "trl-defaults": "TRL, its defaults"}
EVALUATION_SEED = 1_000_000  # added to the run's: evaluation draws from generators of its own


# ------------------------------------------------------------------------------------------------------ two trainers


class Ours:
    """The core's PPO, one answer a step."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def answer(self, prompt: list[int]) -> list[int]:
        return generate(self.policy, prompt, self.policy.config.temperature)

    def step(self, prompt: list[int], response: list[int], reward: float) -> None:
        batch = collate([prompt], [response], self.policy.pad_id, self.policy.device)
        try:
            ppo_step(self.policy, batch, [reward])
        except StepSkipped as skipped:
            print(f"a step was skipped: {skipped}", file=sys.stderr)


class Trl:
    """TRL's PPOTrainer on the same model and adapters; `settings` are the PPOConfig's that differ from its defaults."""

    def __init__(self, policy: Policy, seed: int, settings: dict[str, Any]):
        from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

        for module in policy.model.modules():  # the core's own forward of LoRA layers is not TRL's
            vars(module).pop("forward", None)
        config = PPOConfig(seed=seed, **{"batch_size": 1, "mini_batch_size": 1} | settings)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(policy.model)
        self.policy = policy
        self.trainer = PPOTrainer(config=config, model=model, ref_model=None, tokenizer=policy.tokenizer)

    def answer(self, prompt: list[int]) -> list[int]:
        import torch

        return self.sample(torch.tensor(prompt, device=self.policy.device))[0].tolist()

    def sample(self, prompts: Any, **options: Any) -> Any:
        """What TRL's generate writes to a prompt, or to several, sampled as the settings have it."""
        config = self.policy.config
        return self.trainer.generate(
            prompts,
            return_prompt=False,
            do_sample=True,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=0,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=self.policy.stop_ids,
            pad_token_id=self.policy.pad_id,
            **options,
        )

    def step(self, prompt: list[int], response: list[int], reward: float) -> None:
        import torch

        self.trainer.step([torch.tensor(prompt)], [torch.tensor(response)], [torch.tensor(reward)])


def trl_settings(config: Config) -> dict[str, Any]:
    """This project's settings under the names of TRL's PPOConfig."""
    return {
        "learning_rate": config.learning_rate,
        "ppo_epochs": config.ppo_epochs,
        "init_kl_coef": config.kl_coef,
        "adap_kl_ctrl": config.adaptive_kl,
        "gamma": config.gamma,
        "lam": config.lam,
        "cliprange": config.cliprange,
        "cliprange_value": config.cliprange_value,
        "vf_coef": config.vf_coef,
        "max_grad_norm": config.max_grad_norm,
    }


def find_trl(folder: str) -> None:
    """Makes `import trl` mean the one in `folder`. Raises ConfigError if it is not there, or another version."""
    if not (Path(folder) / "trl").is_dir():
        raise ConfigError(f"--trl {folder} holds no trl: pip install --no-deps --target {folder} {TRL_NEEDS}")
    sys.path.insert(0, str(Path(folder).resolve()))
    warnings.filterwarnings("ignore")
    try:
        import trl
        from trl import PPOTrainer  # noqa: F401
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"--trl {folder}: trl can't be imported ({reason}); it needs {TRL_NEEDS}") from None
    if trl.__version__ != TRL_VERSION:
        raise ConfigError(f"--trl {folder} holds trl {trl.__version__}, expected {TRL_VERSION}")


def make_trainer(arm: str, config: Config) -> Ours | Trl:
    """A trainer with fresh adapters: the same ones for every arm of a seed."""
    policy, config = load_policy(config)
    if arm == "ours":
        return Ours(policy)
    return Trl(policy, config.seed, trl_settings(config) if arm == "trl" else {})


# -------------------------------------------------------------------------------------------------------- experiment


@dataclass(frozen=True)
class Material:
    """What all runs of a seed share: the task, with its quizzes written, and the questions of both splits."""

    task: QuizTask
    train: list[Sample]
    test: list[Sample]
    rewards: list[float] | None  # with --control: the rewards to give, shuffled among the training questions


def prepare(
    config: Config, learner: str, steps: int, samples: int, control: bool = False, validation: bool = False
) -> Material:
    """Writes the quizzes of a seed. Questions on which no sound quiz can be made are left out, in both splits.

    With `validation` the facts to measure on are of the training split, and no step sees them.
    """
    policy = load_policy(config)[0]
    task = RuleTask(policy) if learner == "rules" else QuizTask(policy, config.seed, learner)
    train = quizzed(task, task.samples("train"), steps, "training")
    unseen = task.samples("test")
    if validation:
        unseen = [sample for sample in task.samples("train") if sample not in train]
    test = quizzed(task, unseen, samples, "held-out")
    rewards = None
    if learner == "rules":
        random.Random(config.seed).shuffle(train)
    if control:
        answers = answer_all(task.policy, task, train, adapter=False, seed=config.seed)
        rewards = [answer.outcome.reward for answer in answers]
        random.Random(config.seed).shuffle(rewards)
    return Material(task, train, test, rewards)


def quizzed(task: QuizTask, samples: Sequence[Sample], count: int, what: str) -> list[Sample]:
    """The first `count` samples that have a quiz. Raises ConfigError if there are fewer."""
    found: list[Sample] = []
    for some in chunks(samples, QUIZZES_PER_PASS):
        task.write(some)
        found += [sample for sample in some if task.written[sample.question]]
        if len(found) >= count:
            return found[:count]
    raise ConfigError(f"only {len(found)} of {len(samples)} {what} questions have a sound quiz, wanted {count}")


def train(trainer: Ours | Trl, material: Material, seed: int, every: int) -> list[dict[str, Any]]:
    """One run: a step on each training question, and the figures on held-out facts before and after `every` steps."""
    import torch

    seconds = {"sampling": 0.0, "judging": 0.0, "steps": 0.0}
    tokenizer, task = trainer.policy.tokenizer, material.task
    points = [measure(trainer, material, seed, 0, seconds)]
    for number, sample in enumerate(material.train):
        torch.manual_seed(turn_seed(seed, number))
        prompt = encode_chat(tokenizer, trainer.policy.prompts.tutor.messages(sample.question))
        with timed(seconds, "sampling"):
            response = trainer.answer(prompt)
        with timed(seconds, "judging"):
            outcome = task.outcomes([sample], [trainer.policy.text(response)])[0]
        reward = outcome.reward if material.rewards is None else material.rewards[number]
        with timed(seconds, "steps"):
            trainer.step(prompt, response, reward)
        if (number + 1) % every == 0 or number + 1 == len(material.train):
            points.append(measure(trainer, material, seed, number + 1, seconds))
    return points


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the time spent in here to `seconds[name]`."""
    started = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - started


def measure(trainer: Ours | Trl, material: Material, seed: int, step: int, seconds: dict[str, float]) -> dict[str, Any]:
    """The trainer's policy on the held-out facts, in numbers; `right` says sample by sample who was."""
    trainer.policy.model.eval()
    answers = answer_all(trainer.policy, material.task, material.test, adapter=True, seed=EVALUATION_SEED + seed)
    return {
        "step": step,
        "right": [answer.outcome.verdict == "correct" for answer in answers],
        "states_fact": sum(answer.outcome.details["states_fact"] for answer in answers),
        "mean_tokens": fmean(answer.tokens for answer in answers),
        "most_tokens": max(answer.tokens for answer in answers),
        "kl": divergence(trainer, answers),
        "example": answers[0].text,
        "seconds": dict(seconds),
    }


def divergence(trainer: Ours | Trl, answers: Sequence[Answer]) -> float:
    """The exact KL(policy || base) of the answers, summed over each one's tokens: their mean, in nats."""
    import torch

    policy, nats = trainer.policy, []
    ours = isinstance(trainer, Ours)  # TRL's model has PEFT's own switch for adapters
    for some in chunks(answers, 16):
        chats = [policy.prompts.tutor.messages(answer.question) for answer in some]
        told = [[*encode_text(policy.tokenizer, answer.text), policy.end_id] for answer in some]
        prompts = [encode_chat(policy.tokenizer, chat) for chat in chats]
        batch = collate(prompts, told, policy.pad_id, policy.device)
        with torch.no_grad():
            *_, logits = token_logprobs_and_values(policy, batch)
            with contextlib.nullcontext() if ours else policy.model.disable_adapter():
                *_, base = token_logprobs_and_values(policy, batch, adapter=not ours)
        kl = exact_kl(logits, base, policy.config.temperature).masked_fill(~batch.response_mask, 0.0)
        nats += kl.sum(-1).tolist()
    return fmean(nats)


def experiment(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """Every arm with every seed: lists of runs by arm. A run is its seed and its points.

    After each run the output file has it; what it has already, of a call with the same options, isn't run again.
    """
    peers = ["trl"] if arguments.learner == "rules" else ["trl", "trl-defaults"]
    arms = ["ours"] + (peers if arguments.trl and not arguments.control else [])
    runs = earlier_runs(arguments, arms)
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        config = replace(settings_with(dict(pair.split("=", 1) for pair in arguments.set)), seed=seed)
        missing = [arm for arm in arms if seed not in [run["seed"] for run in runs[arm]]]
        for arm in [arm for arm in arms if arm not in missing]:
            say(f"seed {seed}: {ARMS[arm]}: from {arguments.output}")
        if not missing:
            continue
        say(f"seed {seed}: writing quizzes")
        counts = arguments.steps, arguments.samples
        material = prepare(config, arguments.learner, *counts, arguments.control, arguments.validation)
        for arm in missing:
            points = train(make_trainer(arm, config), material, seed, arguments.every)
            runs[arm].append({"seed": seed, "points": points})
            curve = ", ".join(f"{point['step']}: {100 * fmean(point['right']):.1f} %" for point in points)
            say(f"seed {seed}: {ARMS[arm]}: {curve}; {sum(points[-1]['seconds'].values()):.1f} s")
            write_json(Path(arguments.output), {"arguments": vars(arguments), "versions": versions(), "runs": runs})
    return runs


def earlier_runs(arguments: argparse.Namespace, arms: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The runs in the output file, by arm, for the seeds that are asked for; none if it is of other options."""
    file, seeds = Path(arguments.output), range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"arguments": {}, "runs": {}}
    counts = ("seeds", "first_seed", "output", "trl")
    same = all(record["arguments"].get(k) == v for k, v in vars(arguments).items() if k not in counts)
    runs = record["runs"] if same else {}
    return {arm: [run for run in runs.get(arm, []) if run["seed"] in seeds] for arm in arms}


def settings_with(settings: dict[str, str]) -> Config:
    """The tutor's configuration with `settings` set, as its command line sets them. Raises ConfigError."""
    from lora_ppo.settings import parse

    return parse(Config, [f"{name}={value}" for name, value in settings.items()])


# ----------------------------------------------------------------------------------------------------------- results


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """An arm's runs, averaged point by point over the seeds."""
    rows = []
    for points in zip(*(run["points"] for run in runs), strict=True):
        accuracies = [fmean(point["right"]) for point in points]
        facts = [point["states_fact"] / len(point["right"]) for point in points]
        rows.append(
            {
                "step": points[0]["step"],
                "accuracy": fmean(accuracies),
                "worst": min(accuracies),
                "best": max(accuracies),
                "states_fact": fmean(facts),
                "mean_tokens": fmean(point["mean_tokens"] for point in points),
                "most_tokens": max(point["most_tokens"] for point in points),
                "kl": fmean(point["kl"] for point in points),
                "seconds": fmean(sum(point["seconds"].values()) for point in points),
                "seconds_in_steps": fmean(point["seconds"]["steps"] for point in points),
            }
        )
    return rows


def show(summaries: dict[str, list[dict[str, Any]]], seeds: int) -> None:
    """The table: held-out accuracy, mean over seeds, lowest and highest seed in brackets."""
    from rich.console import Console
    from rich.table import Table

    first = next(iter(summaries.values()))
    table = Table(title=f"held-out accuracy, mean of {seeds} seeds (lowest to highest)")
    table.add_column("trainer")
    for row in first:
        table.add_column(f"{row['step']} answers", justify="right")
    for heading in ("facts stated", "tokens", "exact KL", "seconds", "in steps"):
        table.add_column(heading, justify="right")
    for arm, rows in summaries.items():
        cells = [f"{100 * r['accuracy']:.1f} % ({100 * r['worst']:.0f} to {100 * r['best']:.0f})" for r in rows]
        last = rows[-1]
        cells += [f"{percent(rows[0]['states_fact'])} -> {percent(last['states_fact'])}"]
        cells += [f"{rows[0]['mean_tokens']:.1f} -> {last['mean_tokens']:.1f}", f"{last['kl']:.2g}"]
        cells += [f"{last['seconds']:.1f}", f"{last['seconds_in_steps']:.1f}"]
        table.add_row(ARMS[arm], *cells)
    width = None if sys.stdout.isatty() else 160
    Console(highlight=False, markup=False, emoji=False, width=width).print(table)


def pooled(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of an arm's runs, those of all seeds as one."""
    return [
        {"step": points[0]["step"], "right": [hit for point in points for hit in point["right"]]}
        for points in zip(*(run["points"] for run in runs), strict=True)
    ]


def difference_interval(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float]:
    """The 95 % interval of (first accuracy - second accuracy) on the same samples."""
    cells = list(zip(first, second, strict=True))
    return newcombe_interval(*(cells.count(cell) for cell in itertools.product((True, False), repeat=2)))


def verdicts(summaries: dict[str, list[dict[str, Any]]], runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Ours beside each of TRL's arms, with paired 95 % intervals, and the longest answers, in sentences."""
    ours = summaries["ours"]
    lines = [f"longest held-out answer: {ours[0]['most_tokens']} tokens before, {ours[-1]['most_tokens']} after"]
    for arm in [arm for arm in summaries if arm != "ours"]:
        theirs = summaries[arm]
        points = []
        for a, b in list(zip(pooled(runs["ours"]), pooled(runs[arm]), strict=True))[1:]:
            low, high = difference_interval(a["right"], b["right"])
            difference = fmean(a["right"]) - fmean(b["right"])
            points.append(f"{100 * difference:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}) after {a['step']}")
        share = ours[-1]["seconds"] / theirs[-1]["seconds"]
        in_steps = ours[-1]["seconds_in_steps"] / theirs[-1]["seconds_in_steps"]
        lines.append(
            f"ours beside {ARMS[arm]}: {', '.join(points)}; {share:.2f} of its seconds, {in_steps:.2f} in steps alone"
        )
        there = next((row for row in ours if row["accuracy"] >= theirs[-1]["accuracy"]), None)
        if there:
            lines.append(
                f"its last accuracy, {percent(theirs[-1]['accuracy'])}, ours has after {there['step']} answers, in "
                f"{there['seconds'] / theirs[-1]['seconds']:.2f} of its seconds"
            )
    return lines


def control_verdicts(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every seed and point of a control run, and for all seeds together: is it within the base's interval?"""
    rows = []
    seeds = [(str(run["seed"]), run["points"]) for run in runs]
    for seed, points in [*seeds, ("all", pooled(runs))]:
        base = points[0]["right"]
        low, high = wilson_interval(sum(base), len(base))
        for point in points[1:]:
            rows.append(
                {
                    "seed": seed,
                    "step": point["step"],
                    "base": fmean(base),
                    "base_interval": (low, high),
                    "accuracy": fmean(point["right"]),
                    "inside": low <= fmean(point["right"]) <= high,
                    "difference_interval": difference_interval(point["right"], base),
                }
            )
    return rows


def show_control(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        verdict = "within" if row["inside"] else "OUTSIDE"
        print(
            f"control, seed {row['seed']}, {row['step']} answers: {percent(row['accuracy'])}, {verdict} the base's "
            f"{percent(row['base'], row['base_interval'])}; difference "
            f"{100 * row['difference_interval'][0]:+.1f} to {100 * row['difference_interval'][1]:+.1f} points"
        )


def versions() -> dict[str, str]:
    """What the seconds depend on."""
    import torch
    import transformers

    names = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    cores, threads = str(os.cpu_count()), str(torch.get_num_threads())
    return names | {"machine": platform.machine(), "cores": cores, "threads": threads}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", metavar="DIR", default="", help=f"folder into which trl {TRL_VERSION} was installed")
    parser.add_argument("--steps", type=int, default=300, help="answers to learn from [300]")
    parser.add_argument("--every", type=int, default=100, help="answers between two evaluations [100]")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each trainer [5]")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them [0]")
    parser.add_argument("--samples", type=int, default=200, help="held-out facts [200]")
    parser.add_argument(
        "--learner", choices=("reader", "gain", "rules"), default="reader", help="who takes the quizzes [reader]"
    )
    parser.add_argument("--control", action="store_true", help="shuffle the rewards among the questions")
    parser.add_argument("--validation", action="store_true", help="measure on training facts that no step sees")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the tutor")
    parser.add_argument("--output", default="bench_learning.json", help="JSON file [bench_learning.json]")
    arguments = parser.parse_args()
    for name in ("steps", "every", "seeds", "samples"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} is out of range: expected at least 1")
    for pair in arguments.set:
        if "=" not in pair:
            parser.error(f"--set {pair}: expected NAME=VALUE")
    if not Path(arguments.output).absolute().parent.is_dir():
        parser.error(f"--output {arguments.output}: {Path(arguments.output).parent} is no folder")
    return arguments


@program
def main() -> int:
    """The program. Exit status: 0, or 2 for what can't be used."""
    arguments = parse_arguments()
    if arguments.trl and not arguments.control:
        find_trl(arguments.trl)
    runs = experiment(arguments, lambda text: print(text, flush=True))
    summaries = {arm: summary(runs[arm]) for arm in runs}
    show(summaries, arguments.seeds)
    record = {"arguments": vars(arguments), "versions": versions(), "summary": summaries, "runs": runs}
    if arguments.control:
        record["control"] = control_verdicts(runs["ours"])
        show_control(record["control"])
    for line in verdicts(summaries, runs):
        print(line)
    write_json(Path(arguments.output), record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
