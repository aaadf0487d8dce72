"""What tells whether a run learns anything: shares of its answers, a step in short, groups without contrast.

And whether it learns what is meant: a policy that is paid by a model finds replies that please it and no one else. Such
tasks are watched at each evaluation (`watch`), and `stop_if` ends a run whose replies leave their bands.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_ppo.episodes import Trajectory
from lora_ppo.forward import collate, token_logprobs_and_values
from lora_ppo.policy import Policy
from lora_ppo.processes import everywhere, total
from lora_ppo.settings import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

STOPPING = ("length", "distinct_2")  # figures of an evaluation that stop_if may look at
NOTED = ("states_fact", "strict")  # what an outcome's details may say of an answer: true or false
PATIENCE = 20  # steps without contrast in any group, after which a person is told


def shares(accelerator: "Accelerator", trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Of all processes' answers, the share cut off at max_new_tokens, and those that the task notes of some of them."""
    noted = {name: [t.outcome.details[name] for t in trajectories if name in t.outcome.details] for name in NOTED}
    noted["cut_off"] = [t.cut_off for t in trajectories]
    sums = total(accelerator, *(x for found in noted.values() for x in (sum(found), len(found))))
    pairs = zip(noted, sums[::2], sums[1::2], strict=True)
    return {name: true / count for name, true, count in pairs if count}


def watch(policy: Policy, accelerator: "Accelerator", parts: Sequence[Sequence[Trajectory]]) -> dict[str, Any]:
    """Of all processes' answers, played in `parts`: their exact KL from the base model, nats an answer; distinct_2, the
    share of their pairs of words that are different ones (Li et al. 2016); accuracy and reward by level."""
    import torch
    from accelerate.utils import gather_object

    from lora_ppo import ppo

    def divergence() -> float:
        nats = 0.0
        for part in parts:
            prompts, responses, chosen = zip(*((t.prompt, t.response, t.chosen) for t in part), strict=True)
            batch = collate(prompts, responses, policy.pad_id, policy.device, chosen)
            with torch.no_grad():
                logits, ref = (token_logprobs_and_values(policy, batch, adapter)[2] for adapter in (True, False))
            kl = ppo.exact_kl(logits, ref, policy.config.temperature)
            nats += kl.masked_fill(~batch.response_mask, 0.0).sum().item()
        return nats

    trajectories = [t for part in parts for t in part]
    nats, count = total(accelerator, everywhere(policy, accelerator, divergence), len(trajectories))
    known = [t for t in trajectories if t.outcome.verdict != "unknown"]
    said = [" ".join(t.replies) for t in trajectories]
    rows = [(t.outcome.details.get("level"), t.outcome.verdict == "correct", t.outcome.reward) for t in known]
    rows = [row for row in rows if row[0]]
    if accelerator.num_processes > 1:
        said, rows = gather_object(said), gather_object(rows)
    levels = {level: [row for row in rows if row[0] == level] for level in sorted({row[0] for row in rows})}
    found: dict[str, Any] = {"kl": nats / max(count, 1), "distinct_2": distinct(said, 2)}
    if levels:
        found["by_level"] = {
            level: {"accuracy": sum(r[1] for r in own) / len(own), "reward": sum(r[2] for r in own) / len(own)}
            for level, own in levels.items()
        }
    return found


def distinct(texts: Sequence[str], n: int) -> float:
    """The share of the texts' n-grams of words, taken all together, that are different ones; 0 without any."""
    said = [text.lower().split() for text in texts]
    grams = [tuple(words[i : i + n]) for words in said for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def bands(stop_if: Sequence[str]) -> list[tuple[str, str, float]]:
    """The conditions of `stop_if` as (figure, < or >, factor). Raises ConfigError."""
    found = []
    for condition in stop_if:
        match = re.fullmatch(r"(\w+)\s*([<>])\s*(\d+\.?\d*)", condition.strip())
        if not match or match[1] not in STOPPING:
            raise ConfigError(
                f"stop_if={condition!r} is no condition: expected one such as length>2 or distinct_2<0.8, that is "
                f"{' or '.join(STOPPING)}, < or >, and how many times its value at the start"
            )
        found.append((match[1], match[2], float(match[3])))
    return found


def out_of_band(lines: Sequence[dict[str, Any]], stop_if: Sequence[str]) -> str:
    """Which condition of `stop_if` the last evaluation fulfils, in a sentence; "" for none."""
    evaluations = [line for line in lines if "eval_length" in line]
    for name, sign, factor in bands(stop_if) if len(evaluations) > 1 else ():
        first, last = (line.get(f"eval_{name}") for line in (evaluations[0], evaluations[-1]))
        if first is None or last is None:
            continue
        if last < factor * first if sign == "<" else last > factor * first:
            return (
                f"Stopped at step {evaluations[-1]['step']} by stop_if={name}{sign}{factor:g}: {name} of held-out "
                f"replies is {last:.3g}, and was {first:.3g} at the start."
            )
    return ""


def in_short(line: dict[str, Any], groups: int) -> str:
    """A step's line of the log for the progress bar; `groups` are those of a step (GRPO)."""
    paid = "score" if "score" in line else "reward"
    text = (
        f"{paid} {line[paid]:+.2f}  accuracy {line['accuracy']:.0%}"
        if {paid, "accuracy"} <= line.keys()
        else "no reward"
    )
    text += f" ({line['strict']:.0%} strict)" if "strict" in line else ""
    text += f"  entropy {line['entropy']:.2f}" if "entropy" in line else ""
    text += f"  KL {line.get('kl', 0):.2g}  {line['tokens_per_second']:.0f} tokens/s"
    if line.get("equal_groups"):
        text += f"  {line['equal_groups']} of {groups} groups without contrast"
    return text + (f"  {line['cut_off']:.0%} cut off" if line.get("cut_off") else "")


def without_contrast(lines: Sequence[dict[str, Any]], groups: int) -> str:
    """What to say after PATIENCE steps in which every answer earned what its group earned; "" at any other step."""
    flat = 0
    for line in reversed(lines):
        if line.get("equal_groups") != groups:
            break
        flat += 1
    if flat != PATIENCE:
        return ""
    last = lines[-1]
    if last["accuracy"] >= 0.9:
        hint = "nearly all are right: take harder problems"
    elif last["cut_off"] > 0.2:
        hint = f"{last['cut_off']:.0%} are cut off: raise max_new_tokens, or ask for shorter ones"
    elif last["accuracy"] <= 0.1:
        hint = "nearly all are wrong: take easier problems, prompts with examples, or a larger group_size"
    else:
        hint = "some prompts are always answered right and others never: take ones between them, or a larger group_size"
    return (
        f"For {PATIENCE} steps no group of answers has had contrast: all answers to a prompt earned the same, and "
        f"nothing was learned. Of the last ones {hint}; below temperature=1 they differ less."
    )


def result_of(lines: Sequence[dict[str, Any]], what: str = "Held-out accuracy") -> str:
    """How the run of these log lines went, in a sentence, for the model card."""
    found = [line for line in lines if "eval_accuracy" in line]
    if not found:
        return "It was not evaluated yet."

    def told(line: dict[str, Any]) -> str:
        interval = f"{line['eval_low']:.1%} to {line['eval_high']:.1%}"
        return f"{line['eval_accuracy']:.1%} at step {line['step']} (95 % interval {interval})"

    samples = found[-1]["eval_samples"]
    return f"{what} {told(found[-1])}, {told(found[0])}, on {samples} samples."


def training_stats(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The log as columns: `training` has a value for each step, `evaluation` one for each evaluation."""
    names = (
        "step reward accuracy kl kl_coef step_kl length loss policy_loss value_loss entropy grad_norm "
        "equal_groups left_out cut_off strict outcome"
    ).split()
    names += ["score", "states_fact", "level"] if any("score" in line for line in lines) else []
    steps = [line for line in lines if line["step"] > 0]
    found = [line for line in lines if "eval_accuracy" in line]
    evals = ["step", *(name for name in (found[0] if found else ()) if name.startswith("eval_"))]
    return {
        "training": {name: [line.get(name) for line in steps] for name in names},
        "evaluation": {name.removeprefix("eval_"): [line.get(name) for line in found] for name in evals},
    }
