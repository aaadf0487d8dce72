"""Measures whether training worked, and merges adapters into standalone models.

    python evaluate.py --config configs/quiz.yaml --adapter runs/quiz/epoch_*                   a learning curve
    python evaluate.py --mode merge --adapter runs/quiz/epoch_3 --merged_model_path merged      a standalone model
    python evaluate.py --mode quizmaster model_name=smollm2                                     what quizzes are worth
    python evaluate.py --help                                                                   every setting

Base model and adapters answer the same held-out samples under the same seeds. Accuracies come with Wilson intervals;
each model is compared with the base sample by sample (exact McNemar test, Newcombe's interval, paired bootstrap).

Left out on purpose: splits of its own. What is held out is the task's decision; an adapter that was trained with other
`questions` or another `test_share` is refused, since it would be tested on what it was trained on.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lora_ppo.adapters import IN_FULL, attached, base_settings, check_empty, merge, read_adapter, suited
from lora_ppo.checkpoint import other_prompts
from lora_ppo.evaluation import METHODS, Answer, Result, answer_all, comparison, figures, held_out, write_json
from lora_ppo.journal import now
from lora_ppo.loading import load_policy
from lora_ppo.policy import Policy
from lora_ppo.quizmaster import ANSWERS
from lora_ppo.settings import ConfigError, help_text, known_name, parse, setting, split_arguments, version
from lora_ppo.statistics import wilson_interval
from lora_ppo.step import out_of_memory
from lora_ppo.streams import run_program
from lora_ppo.terminal import clean
from train import TASK_MODULES, TASKS, TrainConfig

# ---------------------------------------------------------------------------------------------------------- settings


@dataclass
class EvaluateConfig(TrainConfig):
    """Training's settings, so that one file serves both, and evaluation's own."""

    mode: str = setting(
        "evaluate",
        "evaluate, merge, or both: merge, then evaluate; quizmaster: measure what the base model's quizzes are worth",
        group="evaluation",
    )
    adapter: list[str] = setting(["none"], "adapter folders, several give a learning curve; none: the base alone")
    num_samples: int = setting(200, "held-out samples to answer")
    samples_per_problem: int = setting(1, "answers to each sample; with several, pass@k is told for k up to so many")
    eval_batch_size: int = setting(32, "samples answered at a time")
    merged_model_path: str = setting("", "folder of the merged model: merge writes it, use_merged_model reads it")
    use_merged_model: bool = setting(False, "evaluate the model in merged_model_path too")
    output_file: str = setting("evaluation.json", "where the results are written, answers included")


# What evaluation uses. A config file may hold training's settings beside these; the command line may not.
SETTINGS = (
    "model_name load_in_4bit bf16_copy device dtype prompts target_modules temperature quiz_temperature top_p "
    "max_new_tokens quiz_tries seed mode task test_share adapter num_samples samples_per_problem eval_batch_size "
    "merged_model_path use_merged_model output_file"
).split() + [field.name for module in TASK_MODULES.values() for field in fields(module.TaskSettings)]
ROUND = 1_000_003  # between the seeds of a sample's answers
MODES = ("evaluate", "merge", "both", "quizmaster")
USAGE = """usage: python evaluate.py [--config FILE] [--adapter DIR ...] [name=value ...]

Accuracy of base model, adapters and merged model on held-out samples; merging
of adapters into standalone models."""


def settings_from(arguments: Sequence[str]) -> EvaluateConfig:
    """The settings from a command line, where `--adapter` takes several folders.

    Raises ConfigError.
    """
    words: list[str] = []
    folders: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        values = []
        while rest and not rest[0].startswith("--") and rest[0].partition("=")[0] not in SETTINGS:
            values.append(rest.pop(0))
        if word == "--adapter" and values:
            folders += values
        else:
            words += [word, *values]
    for name, _ in split_arguments(EvaluateConfig, words)[1]:
        known_name(EvaluateConfig, name)
        if name not in SETTINGS:
            raise ConfigError(f"{name} is a setting of training: evaluation has no use for it (see --help)")
    return check_settings(parse(EvaluateConfig, words, {"adapter": folders} if folders else None))


def check_settings(config: EvaluateConfig) -> EvaluateConfig:
    """Returns `config` if its settings fit together; raises ConfigError naming what does not, before a model loads."""
    folders = adapters(config)
    for name, allowed in {"mode": MODES, "task": tuple(TASKS)}.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(f"{name}={getattr(config, name)} is unknown: expected one of {', '.join(allowed)}")
    for name in ("num_samples", "samples_per_problem", "eval_batch_size"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}={getattr(config, name)} is out of range: expected at least 1")
    if not 0 < config.test_share < 1:
        raise ConfigError(f"test_share={config.test_share:g} is out of range: expected above 0 and below 1")
    if config.mode == "quizmaster":
        if folders or config.use_merged_model:
            raise ConfigError("mode=quizmaster measures the base model: it takes no adapter and no merged model")
        return config
    if (config.mode != "evaluate" or config.use_merged_model) and not config.merged_model_path:
        what = "use_merged_model=true" if config.mode == "evaluate" else f"mode={config.mode}"
        raise ConfigError(f"{what} needs merged_model_path=DIR")
    if config.mode != "evaluate":
        if len(folders) != 1:
            raise ConfigError(f"mode={config.mode} merges one adapter, and adapter names {len(folders)}: name one")
        check_empty(Path(config.merged_model_path))
    elif config.use_merged_model and not (Path(config.merged_model_path) / "config.json").exists():
        raise ConfigError(f"merged_model_path={config.merged_model_path} holds no model: write one with mode=merge")
    if config.mode != "merge" and not Path(config.output_file).absolute().parent.is_dir():
        raise ConfigError(f"output_file={config.output_file}: {Path(config.output_file).parent} is no folder")
    return config


def adapters(config: EvaluateConfig) -> list[Path]:
    """The adapter folders that are named; none for `none`."""
    return [Path(name) for name in config.adapter if name != "none"]


# -------------------------------------------------------------------------------------------------------- evaluation


def evaluate(config: EvaluateConfig, notice: Callable[[str], None]) -> tuple[list[Result], EvaluateConfig]:
    """What base, adapters and merged model answer to the same samples; the resolved settings. Raises ConfigError."""
    folders = adapters(config)
    states = [read_adapter(folder) for folder in folders]
    build_task = TASKS[config.task](config)
    trained = [*folders, Path(config.merged_model_path)] if config.use_merged_model else folders
    policy, config = load_policy(base_settings(config, trained, states, notice), notice)
    for folder, state in zip(folders, states, strict=True):
        suited(policy, folder, state)
        if line := other_prompts(folder, policy):
            notice(line)
    task = build_task(policy)
    samples = held_out(task, config.num_samples, config.seed)

    def asked(answering: Policy, name: str, adapter: bool, folder: str = "", step: int | None = None) -> Result:
        rounds: list[list[Answer]] = []
        for number in range(config.samples_per_problem):
            again = f", time {number + 1}" if number else ""
            with progress(f"{name} answers {len(samples)} samples{again}", len(samples), notice) as show:
                seed = config.seed + number * ROUND
                rounds.append(answer_all(answering, task, samples, adapter, seed, config.eval_batch_size, show))
        return Result(name, folder, step, rounds[0], rounds[1:])

    results = [asked(policy, "base", adapter=False)]
    for i, (folder, state) in enumerate(zip(folders, states, strict=True)):
        with attached(policy, folder, f"adapter_{i}"):
            results.append(asked(policy, folder.name, True, str(folder), state.get("step")))
    if all(state for state in states):  # a learning curve, whatever the order in which the shell named the folders
        results[1:] = sorted(results[1:], key=lambda result: result.step)
    if config.use_merged_model:
        merged, _ = load_policy(replace(config, model_name=config.merged_model_path, **IN_FULL), notice)
        results.append(asked(merged, "merged", False, config.merged_model_path))
    return results, config


def report(config: EvaluateConfig, results: Sequence[Result]) -> dict[str, Any]:
    """Everything that was measured, ready for JSON: figures, comparisons with the base, and every answer."""
    models = [figures(result) for result in results]
    for model, result in zip(models[1:], results[1:], strict=True):
        model["versus_base"] = comparison(result, results[0], config.seed)
    answers = [
        {"question": row[0][0].question}
        | {
            result.folder or result.name: {
                "answer": answer.text,
                "verdict": answer.outcome.verdict,
                "reward": answer.outcome.reward,
                "why": answer.outcome.why,
                "tokens": answer.tokens,
            }
            | ({"verdicts": [said.outcome.verdict for said in (answer, *again)]} if again else {})
            for result, (answer, *again) in zip(results, row, strict=True)
        }
        for row in zip(*(zip(result.answers, *result.more, strict=True) for result in results), strict=True)
    ]
    settings = {name: getattr(config, name) for name in SETTINGS}
    return {"timestamp": now(), "settings": settings, "methods": METHODS, "models": models, "answers": answers}


@contextlib.contextmanager
def progress(text: str, count: int, notice: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """A progress bar at a terminal, elsewhere `text`; what it gives is told how many samples are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False)
    if not console.is_terminal:
        notice(text)
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        item = bar.add_task(clean(text), total=count)
        yield lambda done: bar.update(item, completed=done)


def measure_quizzes(config: EvaluateConfig, notice: Callable[[str], None]) -> None:
    """Measures what the base model's quizzes are worth, and keeps it for the tutor. Raises ConfigError."""
    from tasks.quiz_gate import QUESTIONS, measure

    policy, config = load_policy(config, notice)
    with progress(f"{config.model_name} is asked {QUESTIONS} questions", QUESTIONS, notice) as show:
        gate = measure(policy, show)
    notice(f"quizzes: {gate.worth()}")
    if gate.signal:
        interval = percent(gate.right / gate.shown, wilson_interval(gate.right, gate.shown))
        notice(f"{gate.shown} of {gate.asked} questions got a quiz; sound: {gate.right}, {interval}")
    if gate.signal == "agreement":
        notice(f"gate: {gate.agreement} of {ANSWERS} short answers agree, likelier by {gate.lead:g} nats than others")
    elif gate.signal:
        notice("gate: the model, shown the options, picks the key in most of their orders")


def points(difference: float | None, interval: Sequence[float]) -> str:
    """`+12.5 points (8.1 to 16.9)`; a dash where nothing was counted."""
    if difference is None:
        return "-"
    return f"{100 * difference:+.1f} points ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"


def percent(share: float | None, interval: Sequence[float] | None = None) -> str:
    """`80.5 % (74.5 to 85.4)`; a dash where nothing was counted."""
    if share is None:
        return "-"
    ends = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
    return f"{100 * share:.1f} %{ends}"


def show(record: dict[str, Any]) -> None:
    """Prints the results as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    models = record["models"]
    table = Table(title=f"{models[0]['samples']} held-out samples of task {record['settings']['task']}")
    some = [("facts_stated_share", "states the fact"), ("strict_accuracy", "in the form asked for")]
    some = [(key, heading) for key, heading in some if models[0][key] is not None]
    headings = ("model", "step", "accuracy (95 %, Wilson)", *(h for _, h in some), "reward", "tokens", "cut off")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for model in models:
        table.add_row(
            clean(model["name"]),
            "-" if model["step"] is None else str(model["step"]),
            percent(model["accuracy"], model["accuracy_interval"]),
            *(percent(model[key]) for key, _ in some),
            "-" if model["mean_reward"] is None else f"{model['mean_reward']:+.3f}",
            f"{model['mean_tokens']:.1f}",
            percent(model["cut_off_share"]),
        )
    console.print(table)
    tables = [("accuracy by level", "by_level", "accuracy"), ("accuracy by skill", "by_skill", "accuracy")]
    tables += [
        ("verdicts", "verdicts", "share"),
        ("how episodes ended", "reasons", "share"),
        ("pass@k", "pass_at", "share"),
    ]
    for title, key, share in tables:
        if kinds := list(dict.fromkeys(kind for model in models for kind in model[key])):
            table = Table(title=title)
            table.add_column("", justify="left")
            for model in models:
                table.add_column(clean(model["name"]), justify="right")
            for kind in kinds:  # a row each: there may be dozens
                cells = [model[key].get(kind) for model in models]
                shares = [percent(cell[share], cell.get("interval")) if cell else "-" for cell in cells]
                table.add_row(clean(str(kind)), *shares)
            console.print(table)
    for model in models:
        if model["unknown"]:
            console.print(f"{clean(model['name'])}: {model['unknown']} more samples had no outcome and are left out.")
    if len(models) == 1:
        return
    table = Table(title="difference from the base, sample by sample")
    for heading in ("model", "accuracy (95 %, Newcombe)", "p (McNemar)", "reward (95 %, bootstrap)"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for model in models[1:]:
        versus = model["versus_base"]
        low, high = versus["reward_difference_interval"] or (0, 0)
        reward = "-" if not versus["samples"] else f"{versus['reward_difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        difference = points(versus["accuracy_difference"], versus["accuracy_difference_interval"])
        table.add_row(clean(model["name"]), difference, f"{versus['p']:.2g}", reward)
    console.print(table)


def main() -> int:
    """The program. Exit status: 0; 1 if results can't be written or shown; 2 for bad settings; 130 after Ctrl-C."""
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        print(help_text(EvaluateConfig, USAGE, only=SETTINGS))
        return 0
    if "--version" in arguments:
        print(version())
        return 0

    def notice(text: str) -> None:
        with contextlib.suppress(OSError):  # results come first; that nobody can be shown anything is told at the end
            print(clean(text), flush=True)

    try:
        config = settings_from(arguments)
        if config.mode == "quizmaster":
            measure_quizzes(config, notice)
        if config.mode in ("merge", "both"):
            merge(replace(config, mode="merge"), notice)  # what is held out, evaluation looks at
        if config.mode in ("evaluate", "both"):
            results, resolved = evaluate(config, notice)
            record = report(resolved, results)
            try:
                write_json(Path(config.output_file), record)
            except OSError as error:
                show(record)
                print(f"error: output_file={config.output_file}: {error.strerror or error}", file=sys.stderr)
                return 1
            show(record)
            notice(f"wrote {config.output_file}")
        return 0
    except ConfigError as error:
        print(f"error: {clean(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: no results were written", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print("error: memory ran out: lower eval_batch_size, or max_new_tokens", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(run_program(main))
