"""Measures whether training worked, and merges adapters into standalone models.

    python evaluate.py --config configs/quiz.yaml --adapter runs/quiz/epoch_*                   a learning curve
    python evaluate.py --mode merge --adapter runs/quiz/epoch_3 --merged_model_path merged      a standalone model
    python evaluate.py --help                                                                   every setting

Base model and adapters answer the same held-out samples under the same seeds. Accuracies come with Wilson intervals;
each model is compared with the base sample by sample (exact McNemar test, Newcombe's interval, paired bootstrap).

Left out on purpose: splits of its own. What is held out is the task's decision; an adapter that was trained with other
`questions` or another `test_share` is refused, since it would be tested on what it was trained on.
"""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_ppo.chat import TUTOR_PROMPT, chat, encode_chat
from lora_ppo.checkpoint import Damaged, verify_checkpoint
from lora_ppo.episodes import Episode, Message, Outcome, Task, judge, play
from lora_ppo.journal import now, turn_seed
from lora_ppo.policy import Policy, base_name, load_policy
from lora_ppo.settings import BUNDLED_MODEL, ConfigError, help_text, known_name, parse, setting, split_arguments
from lora_ppo.statistics import RESAMPLES, bootstrap_interval, mcnemar_exact, newcombe_interval, wilson_interval
from lora_ppo.terminal import clean
from lora_ppo.training import chunks
from train import CHOICES, TASKS, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

METHODS = {
    "accuracy": "Wilson score interval, 95 %",
    "accuracy difference": "Newcombe's interval for paired proportions (1998, method 10), 95 %",
    "p": "exact McNemar test, two-sided",
    "reward difference": f"paired bootstrap, percentiles of {RESAMPLES} resamples, 95 %",
}

# ---------------------------------------------------------------------------------------------------------- settings


@dataclass
class EvaluateConfig(TrainConfig):
    """Training's settings, so that one file serves both, and evaluation's own."""

    mode: str = setting("evaluate", "evaluate, merge, or both: merge, then evaluate")
    adapter: list[str] = setting(["none"], "adapter folders, several give a learning curve; none: the base alone")
    num_samples: int = setting(200, "held-out samples to answer")
    eval_batch_size: int = setting(32, "samples answered at a time")
    merged_model_path: str = setting("", "folder of the merged model: merge writes it, use_merged_model reads it")
    use_merged_model: bool = setting(False, "evaluate the model in merged_model_path too")
    output_file: str = setting("evaluation.json", "where the results are written, answers included")


# What evaluation uses. A config file may hold training's settings beside these; the command line may not.
SETTINGS = (
    "model_name load_in_4bit bf16_copy device dtype target_modules temperature quiz_temperature top_p max_new_tokens "
    "quiz_tries questions seed mode task quiz_learner test_share adapter num_samples eval_batch_size merged_model_path "
    "use_merged_model output_file"
).split()
MODES = ("evaluate", "merge", "both")
IN_FULL = {"load_in_4bit": "false", "bf16_copy": "false"}  # settings for weights that are merged
USAGE = """usage: python evaluate.py [--config FILE] [--adapter DIR ...] [name=value ...]

Accuracy of base model, adapters and merged model on held-out samples; merging of adapters into standalone models."""


def settings_from(arguments: Sequence[str]) -> EvaluateConfig:
    """The settings from a command line, where `--adapter` takes several folders and `--use_merged_model` no value.

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
        elif word == "--use_merged_model" and not values:
            words.append("--use_merged_model=true")
        else:
            words += [word, *values]
    if folders:
        words.append(f"--adapter=[{', '.join(map(json.dumps, folders))}]")
    for name, _ in split_arguments(EvaluateConfig, words)[1]:
        known_name(EvaluateConfig, name)
        if name not in SETTINGS:
            raise ConfigError(f"{name} is a setting of training: evaluation has no use for it (see --help)")
    return check_settings(parse(EvaluateConfig, words))


def check_settings(config: EvaluateConfig) -> EvaluateConfig:
    """Returns `config` if its settings fit together; raises ConfigError naming what does not, before a model loads."""
    folders = adapters(config)
    choices = {"mode": MODES, "task": tuple(TASKS), "quiz_learner": CHOICES["quiz_learner"]}
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(f"{name}={getattr(config, name)} is unknown: expected one of {', '.join(allowed)}")
    for name in ("num_samples", "eval_batch_size"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}={getattr(config, name)} is out of range: expected at least 1")
    if not 0 < config.test_share < 1:
        raise ConfigError(f"test_share={config.test_share:g} is out of range: expected above 0 and below 1")
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


def check_empty(folder: Path) -> None:
    """Raises ConfigError unless `folder` is empty or can be made."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"merged_model_path={folder} is a file: name a new folder")
    entries = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if entries:
        raise ConfigError(
            f"merged_model_path={folder} is not empty ({len(entries)} entries, such as {entries[0]}): name a new "
            "folder; to evaluate a model that is there, use mode=evaluate and use_merged_model=true"
        )


def adapters(config: EvaluateConfig) -> list[Path]:
    """The adapter folders that are named; none for `none`."""
    return [Path(name) for name in config.adapter if name != "none"]


# -------------------------------------------------------------------------------------------------------- statistics


# --------------------------------------------------------------------------------------------------------- answering


@dataclass(frozen=True)
class Answer:
    """What a model said to a sample: the question, its last reply, the tokens of all its replies, the outcome."""

    question: str
    text: str
    tokens: int
    outcome: Outcome


class Unjudged:
    """An episode whose outcome comes later: judging then draws the same random numbers for every model."""

    def __init__(self, episode: Episode):
        self.episode, self.question = episode, ""

    def reset(self) -> list[Message]:
        messages = self.episode.reset()
        self.question = messages[-1]["content"]
        return messages

    def step(self, reply: str) -> str | None:
        return self.episode.step(reply)

    def outcome(self) -> None:
        return None


def held_out(task: Task, count: int, seed: int) -> list[Any]:
    """`count` samples of the test split, drawn from `seed`. Raises ConfigError where it has fewer."""
    samples = list(task.samples("test"))
    if count > len(samples):
        raise ConfigError(f"num_samples={count}: the test split has {len(samples)} samples, ask for no more")
    return random.Random(seed).sample(samples, count)


def answer_all(
    policy: Policy, task: Task, samples: Sequence[Any], adapter: bool, seed: int, batch_size: int = 32
) -> list[Answer]:
    """The policy's tries at `samples`, `batch_size` at a time, with its adapter on or off.

    Every batch, and its judging, draws from a generator of its own, seeded from `seed`: two models that are asked the
    same get the same random numbers.
    """
    import torch

    answers = []
    for number, asked in enumerate(chunks(samples, batch_size)):
        torch.manual_seed(turn_seed(seed, number))
        episodes = [Unjudged(task.episode(sample)) for sample in asked]
        trajectories = play(policy, episodes, adapter)
        texts = [t.replies[-1] if t.replies else "" for t in trajectories]
        torch.manual_seed(turn_seed(seed, -1 - number))
        outcomes = judge([unjudged.episode for unjudged in episodes])
        for episode, text, t, outcome in zip(episodes, texts, trajectories, outcomes, strict=True):
            answers.append(Answer(episode.question, text, t.length, t.outcome or outcome))
    return answers


# ---------------------------------------------------------------------------------------------------------- adapters


def read_adapter(folder: Path) -> dict[str, Any]:
    """The `state.json` of a whole checkpoint; {} for a plain PEFT folder. Raises ConfigError for anything else."""
    if not folder.is_dir():
        raise ConfigError(f"adapter={folder}: there is no such folder; expected a checkpoint, a PEFT folder, or none")
    try:
        ours = any((folder / name).exists() for name in ("manifest.json", "state.json"))
        state = verify_checkpoint(folder) if ours else {}
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
    except Damaged as error:
        raise ConfigError(f"adapter={folder} is damaged: {error}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"adapter={folder} has no usable adapter_config.json ({type(error).__name__})") from None
    if kind != "LORA" or not (folder / "adapter_model.safetensors").exists():
        raise ConfigError(f"adapter={folder}: expected peft_type LORA (found {kind}) and an adapter_model.safetensors")
    return state


def suited(config: EvaluateConfig, folder: Path, state: dict[str, Any]) -> None:
    """Raises ConfigError if the adapter belongs to another base model, or if training saw what is held out here."""
    if state and state["base_model"] != base_name(config):
        raise ConfigError(
            f"adapter={folder} was trained on model_name={state['base_model']}, now it is {base_name(config)}: "
            "set model_name to the former"
        )
    trained = state.get("config", {})
    for name in ("questions", "test_share"):
        here, there = getattr(config, name), trained.get(name)
        if "task" in trained and config.mode != "merge" and there is not None and there != here:
            raise ConfigError(
                f"adapter={folder} was trained with {name}={there}, now it is {here}: other samples would be held out, "
                f"and some of them it was trained on; set {name}={there}"
            )


def base_settings(config: EvaluateConfig, states: Sequence[dict[str, Any]]) -> EvaluateConfig:
    """`config` with the base model that the first checkpoint names, where model_name=auto leaves it open."""
    name = next((state["base_model"] for state in states if state), None)
    if config.model_name == "auto" and name:
        config = replace(config, model_name=str(BUNDLED_MODEL) if name == f"bundled:{BUNDLED_MODEL.name}" else name)
    return replace(config, lora_r=1)  # the adapters come from their folders: the policy's own one is idle


def attach(policy: Policy, folder: Path, name: str) -> None:
    """Puts the adapter of `folder` beside the policy's own and makes it the active one. Raises ConfigError."""
    from safetensors import SafetensorError

    try:
        result = policy.model.load_adapter(str(folder), adapter_name=name, torch_device=str(policy.device))
        missing = result.missing_keys
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"adapter={folder} does not fit model_name={base_name(policy.config)}: {reason}") from None
    if missing:
        raise ConfigError(f"adapter={folder} lacks {len(missing)} tensors, such as {missing[0]}")
    added = policy.model.peft_config[name]
    if added.use_dora or added.lora_bias:
        raise ConfigError(f"adapter={folder} uses DoRA or biases: expected plain LoRA")
    policy.use_adapter(name)
    policy.model.eval()


# -------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Result:
    """A model's answers. `folder` is its adapter or merged model, `step` the PPO steps that trained it, if known."""

    name: str
    folder: str
    step: int | None
    answers: list[Answer]


def evaluate(config: EvaluateConfig, notice: Callable[[str], None]) -> tuple[list[Result], EvaluateConfig]:
    """What base, adapters and merged model answer to the same samples; the resolved settings. Raises ConfigError."""
    folders = adapters(config)
    states = [read_adapter(folder) for folder in folders]
    build_task = TASKS[config.task](config)
    policy, config = load_policy(base_settings(config, states), notice)
    for folder, state in zip(folders, states, strict=True):
        suited(config, folder, state)
    task = build_task(policy)
    samples = held_out(task, config.num_samples, config.seed)

    def answers(answering: Policy, name: str, adapter: bool) -> list[Answer]:
        notice(f"{name} answers {len(samples)} samples")
        return answer_all(answering, task, samples, adapter, config.seed, config.eval_batch_size)

    results = [Result("base", "", None, answers(policy, "base", adapter=False))]
    for i, (folder, state) in enumerate(zip(folders, states, strict=True)):
        attach(policy, folder, f"adapter_{i}")
        results.append(Result(folder.name, str(folder), state.get("step"), answers(policy, folder.name, adapter=True)))
        policy.use_adapter()
        policy.model.delete_adapter(f"adapter_{i}")
    if all(state for state in states):  # a learning curve, whatever the order in which the shell named the folders
        results[1:] = sorted(results[1:], key=lambda result: result.step)
    if config.use_merged_model:
        merged, _ = load_policy(replace(config, model_name=config.merged_model_path, **IN_FULL), notice)
        results.append(Result("merged", config.merged_model_path, None, answers(merged, "merged", adapter=False)))
    return results, config


def figures(result: Result) -> dict[str, Any]:
    """A model's figures over the samples whose outcome is known; facts are counted where the task states them."""
    known = [answer for answer in result.answers if answer.outcome.verdict != "unknown"]
    right = sum(answer.outcome.verdict == "correct" for answer in known)
    stated = [a.outcome.details["states_fact"] for a in result.answers if "states_fact" in a.outcome.details]
    return {
        "name": result.name,
        "folder": result.folder,
        "step": result.step,
        "samples": len(known),
        "unknown": len(result.answers) - len(known),
        "correct": right,
        "accuracy": right / len(known) if known else None,
        "accuracy_interval": wilson_interval(right, len(known)),
        "facts": len(stated),
        "facts_stated": sum(stated),
        "facts_stated_share": sum(stated) / len(stated) if stated else None,
        "facts_stated_interval": wilson_interval(sum(stated), len(stated)) if stated else None,
        "mean_reward": fmean(answer.outcome.reward for answer in known) if known else None,
        "mean_tokens": fmean(answer.tokens for answer in result.answers),
        "most_tokens": max(answer.tokens for answer in result.answers),
    }


def comparison(result: Result, base: Result, seed: int = 0) -> dict[str, Any]:
    """`result` minus `base` over the samples whose outcome both know."""
    pairs = [(a.outcome, b.outcome) for a, b in zip(result.answers, base.answers, strict=True)]
    pairs = [(a, b) for a, b in pairs if "unknown" not in (a.verdict, b.verdict)]
    table = [(a.verdict == "correct", b.verdict == "correct") for a, b in pairs]
    both, only_here, only_base = (table.count(cell) for cell in ((True, True), (True, False), (False, True)))
    neither = len(table) - both - only_here - only_base
    rewards = [a.reward - b.reward for a, b in pairs]
    return {
        "samples": len(pairs),
        "both_right": both,
        "only_this_right": only_here,
        "only_base_right": only_base,
        "neither_right": neither,
        "accuracy_difference": (only_here - only_base) / len(pairs) if pairs else None,
        "accuracy_difference_interval": newcombe_interval(both, only_here, only_base, neither),
        "p": mcnemar_exact(only_here, only_base),
        "reward_difference": fmean(rewards) if pairs else None,
        "reward_difference_interval": bootstrap_interval(rewards, seed) if pairs else None,
    }


def report(config: EvaluateConfig, results: Sequence[Result]) -> dict[str, Any]:
    """Everything that was measured, ready for JSON: figures, comparisons with the base, and every answer."""
    models = [figures(result) for result in results]
    for model, result in zip(models[1:], results[1:], strict=True):
        model["versus_base"] = comparison(result, results[0], config.seed)
    answers = [
        {"question": row[0].question}
        | {
            result.folder or result.name: {
                "answer": answer.text,
                "verdict": answer.outcome.verdict,
                "reward": answer.outcome.reward,
                "why": answer.outcome.why,
                "tokens": answer.tokens,
            }
            for result, answer in zip(results, row, strict=True)
        }
        for row in zip(*(result.answers for result in results), strict=True)
    ]
    settings = {name: getattr(config, name) for name in SETTINGS}
    return {"timestamp": now(), "settings": settings, "methods": METHODS, "models": models, "answers": answers}


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes `record` as ASCII JSON; a reader sees the old file or the new one, whole."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(record, indent=1), encoding="ascii")
    os.replace(new, path)


def percent(share: float | None, interval: Sequence[float] | None = None, sign: str = "") -> str:
    """`80.5 % (74.5 to 85.4)`; a dash where nothing was counted."""
    if share is None:
        return "-"
    ends = f" ({100 * interval[0]:{sign}.1f} to {100 * interval[1]:{sign}.1f})" if interval else ""
    return f"{100 * share:{sign}.1f} %{ends}"


def show(record: dict[str, Any]) -> None:
    """Prints the results as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    models = record["models"]
    table = Table(title=f"{models[0]['samples']} held-out samples of task {record['settings']['task']}")
    for heading in ("model", "step", "accuracy (95 %, Wilson)", "states the fact", "reward", "tokens"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for model in models:
        table.add_row(
            clean(model["name"]),
            "-" if model["step"] is None else str(model["step"]),
            percent(model["accuracy"], model["accuracy_interval"]),
            percent(model["facts_stated_share"]),
            "-" if model["mean_reward"] is None else f"{model['mean_reward']:+.3f}",
            f"{model['mean_tokens']:.1f}",
        )
    console.print(table)
    if models[0]["unknown"]:
        console.print(f"{models[0]['unknown']} more samples had no outcome (no sound quiz) and are left out.")
    if len(models) == 1:
        return
    table = Table(title="difference from the base, sample by sample")
    for heading in ("model", "accuracy (95 %, Newcombe)", "p (McNemar)", "reward (95 %, bootstrap)"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for model in models[1:]:
        versus = model["versus_base"]
        low, high = versus["reward_difference_interval"] or (0, 0)
        reward = "-" if not versus["samples"] else f"{versus['reward_difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        difference = percent(versus["accuracy_difference"], versus["accuracy_difference_interval"], sign="+")
        table.add_row(clean(model["name"]), difference, f"{versus['p']:.2g}", reward)
    console.print(table)


# ----------------------------------------------------------------------------------------------------------- merging

PROBES = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Which planet is the largest?", "The largest planet is Jupiter, and it has dozens of moons."),
    ("How do I repair a clock?", "I do not know how clocks are repaired."),
)
# The largest difference of merged and adapter logits that rounding explains, in units of the largest logit.
MERGE_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def probe_logits(policy: Policy, adapter: bool) -> "Tensor":
    """The logits (N, V) of every response token of the probes, at temperature 1."""
    import torch

    tokenizer = policy.tokenizer
    logits = []
    for question, text in PROBES:
        prompt = encode_chat(tokenizer, chat(TUTOR_PROMPT, question))
        ids = torch.tensor([[*prompt, *tokenizer.encode(text, add_special_tokens=False)]], device=policy.device)
        with torch.no_grad(), policy.adapter(adapter):
            logits.append(policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float())
    return torch.cat(logits)


def merge(config: EvaluateConfig, notice: Callable[[str], None]) -> dict[str, float]:
    """Writes base model plus adapter as a standalone model to `merged_model_path`, and checks it.

    The base is loaded in bfloat16 or float32, whatever training used: weights in 4 bits can't take an adapter in
    without loss. Returns `difference`, the largest between the logits of the merged model, read back from disk, and of
    the adapter, and `effect`, the largest between adapter and base. Raises ConfigError, and writes nothing, if the
    first is more than rounding explains.
    """
    folder, out = adapters(config)[0], Path(config.merged_model_path)
    state = read_adapter(folder)
    in_4bit = state.get("config", {}).get("load_in_4bit") == "true" or config.load_in_4bit == "true"
    config = replace(base_settings(config, [state]), **IN_FULL)
    if in_4bit and config.dtype == "auto":
        config.dtype = "bfloat16"
    policy, config = load_policy(config, notice)
    suited(config, folder, state)
    base = probe_logits(policy, adapter=False)
    attach(policy, folder, "trained")
    wanted = probe_logits(policy, adapter=True)
    new = out.with_name(f".{out.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        policy.model.merge_and_unload(adapter_names=["trained"]).save_pretrained(new)
        policy.tokenizer.save_pretrained(new)
        (new / "README.md").write_text(merged_card(config, folder, state), encoding="utf-8")
        del policy
        found = probe_logits(load_policy(replace(config, model_name=str(new)), notice)[0], adapter=False)
        difference, effect = (found - wanted).abs().max().item(), (wanted - base).abs().max().item()
        allowed = MERGE_TOLERANCE[config.dtype] * wanted.abs().max().item()
        if not difference <= allowed or difference > effect / 4 > 0:  # NaN included
            raise ConfigError(
                f"merging failed and nothing was written: merged and adapter logits differ by {difference:.3g}, where "
                f"rounding to {config.dtype} explains {allowed:.3g} and the adapter itself makes {effect:.3g}"
                + ("" if config.dtype == "float32" else ": try dtype=float32")
            )
        check_empty(out)
        if out.exists():
            out.rmdir()
        new.rename(out)
    except OSError as error:
        raise ConfigError(f"merged_model_path={out} can't be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    notice(f"wrote {out} ({config.dtype}); largest difference of merged and adapter logits: {difference:.3g}")
    notice(f"for comparison, largest difference of adapter and base logits: {effect:.3g}")
    if difference > 0.1 * effect > 0:
        notice(f"warning: rounding to {config.dtype} is more than a tenth of the adapter's effect: use dtype=float32")
    return {"difference": difference, "effect": effect}


def merged_card(config: EvaluateConfig, folder: Path, state: dict[str, Any]) -> str:
    """The README.md of a merged model."""
    algorithm = state.get("config", {}).get("algorithm", "ppo")
    steps = f" after {state['step']} {algorithm.upper()} steps" if "step" in state else ""
    return (
        f"---\nbase_model: {base_name(config)}\nlibrary_name: transformers\ntags: [lora, {algorithm}, merged]\n---\n"
        f"# {base_name(config)} with `{folder.name}` merged in\n\n"
        f"The LoRA adapters of `{folder.name}`{steps}, added to the base model's weights in {config.dtype}.\n"
    )


def main() -> int:
    """The program. Exit status: 0; 1 if the results can't be written; 2 for bad settings; 130 after Ctrl-C."""
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        lines = help_text(EvaluateConfig, USAGE).split("\n")
        print("\n".join(line for line in lines if not line.startswith("  ") or line.split()[0] in SETTINGS))
        return 0

    def notice(text: str) -> None:
        print(clean(text), flush=True)

    try:
        config = settings_from(arguments)
        if config.mode != "evaluate":
            merge(config, notice)
        if config.mode != "merge":
            results, resolved = evaluate(config, notice)
            record = report(resolved, results)
            show(record)
            try:
                write_json(Path(config.output_file), record)
            except OSError as error:
                print(f"error: output_file={config.output_file}: {error.strerror or error}", file=sys.stderr)
                return 1
            notice(f"wrote {config.output_file}")
        return 0
    except ConfigError as error:
        print(f"error: {clean(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: no results were written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
