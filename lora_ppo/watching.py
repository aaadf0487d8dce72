"""What tells whether a run learns anything: shares of its answers, a step in short, groups without contrast."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_ppo.episodes import Trajectory
from lora_ppo.processes import total

if TYPE_CHECKING:
    from accelerate import Accelerator

NOTED = ("states_fact", "strict")  # what an outcome's details may say of an answer: true or false
PATIENCE = 20  # steps without contrast in any group, after which a person is told


def shares(accelerator: "Accelerator", trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Of all processes' answers, the share cut off at max_new_tokens, and those that the task notes of some of them."""
    noted = {name: [t.outcome.details[name] for t in trajectories if name in t.outcome.details] for name in NOTED}
    noted["cut_off"] = [t.cut_off for t in trajectories]
    sums = total(accelerator, *(x for found in noted.values() for x in (sum(found), len(found))))
    pairs = zip(noted, sums[::2], sums[1::2], strict=True)
    return {name: true / count for name, true, count in pairs if count}


def in_short(line: dict[str, Any], groups: int) -> str:
    """A step's line of the log for the progress bar; `groups` are those of a step (GRPO)."""
    text = f"reward {line.get('reward', 0):+.2f}  accuracy {line.get('accuracy', 0):.0%}"
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
    if last["accuracy"] > 0.5:
        hint = "nearly all are right: take harder problems"
    elif last["cut_off"] > 0.2:
        hint = f"{last['cut_off']:.0%} are cut off: raise max_new_tokens, or ask for shorter ones"
    else:
        hint = "nearly all are wrong: take easier problems, prompts with examples, or a larger group_size"
    return (
        f"For {PATIENCE} steps no group of answers has had contrast: all answers to a prompt earned the same, and "
        f"nothing was learned. Of the last ones {hint}; temperature=1 makes them differ more."
    )


def training_stats(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The log as columns: `training` has a value for each step, `evaluation` one for each evaluation."""
    names = (
        "step reward accuracy kl kl_coef step_kl length loss policy_loss value_loss entropy grad_norm "
        "equal_groups left_out cut_off strict outcome"
    )
    steps = [line for line in lines if line["step"] > 0]
    found = [line for line in lines if "eval_accuracy" in line]
    evals = ["step", *(name for name in (found[0] if found else ()) if name.startswith("eval_"))]
    return {
        "training": {name: [line.get(name) for line in steps] for name in names.split()},
        "evaluation": {name.removeprefix("eval_"): [line.get(name) for line in found] for name in evals},
    }
