"""Trains the policy on a task, unattended: PPO or GRPO, in batches, in one process or in many.

    python train.py --config configs/quiz.yaml                             train
    python train.py --config configs/quiz.yaml resume_from=latest          go on where it stopped
    accelerate launch --config_file configs/accelerate/cpu.yaml train.py --config configs/quiz.yaml
    python train.py --help                                                 every setting

Each step plays batch_size episodes of the task, of one reply or of several, turns their rewards into advantages, and
takes minibatch updates on them; a step that leaves the trust region is undone. Generation, rewards, losses and
checkpoints are the tutor's own (lora_ppo_demo.py, ppo.py); what is here is the batch, the loop and the bookkeeping.

Every process holds the adapters and plays its share of the episodes. Gradients are summed over processes, and each
process divides by the token count of all: the sum is the gradient of the joint batch, however the tokens are spread.

Left out on purpose: a reward model, asynchronous rollouts, an inference server. Shapes as in lora_ppo_demo.py.
"""

import contextlib
import importlib.util
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config, ConfigError, from_command_line, save_yaml, setting
from lora_ppo_demo import (
    Batch,
    Damaged,
    LineFile,
    Policy,
    Snapshot,
    StepSkipped,
    checkpoints,
    clean,
    collate,
    encode_chat,
    generate_batch,
    gradient_dropout,
    is_bundled,
    load_checkpoint,
    load_policy,
    now,
    remove_folder,
    save_checkpoint,
    token_logprobs_and_values,
    trust_region,
    turn_seed,
    verify_checkpoint,
)
from tasks import Episode, Outcome, Task

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

# ---------------------------------------------------------------------------------------------------------- settings

TUTOR_SETTINGS = {f.name: f for f in fields(Config)}


def shared(name: str) -> Any:
    """The tutor's setting of this name, with its default and its help."""
    f = TUTOR_SETTINGS[name]
    return setting(f.default_factory() if f.default is MISSING else f.default, f.metadata["help"])


@dataclass
class TrainConfig:
    # what is learnt, and how long
    task: str = setting("quiz", "what earns the reward")
    algorithm: str = setting("ppo", "ppo, or grpo (group_size answers a prompt, no value head)")
    output_dir: str = setting("runs/train", "where log, checkpoints and report are written")
    num_epochs: int = setting(1, "epochs")
    samples_per_epoch: int = setting(0, "prompts an epoch; 0: every training sample of the task once")
    eval_every: int = setting(0, "steps between evaluations on the test split; 0: one after each epoch")
    eval_samples: int = setting(100, "test samples an evaluation answers")
    save_every: int = setting(50, "steps between checkpoints within an epoch")
    keep_checkpoints: int = setting(2, "checkpoints step_N that are kept; every epoch_N is")
    resume_from: str = setting("", "latest (of output_dir), or the folder of a checkpoint; empty: a fresh start")
    report_to: str = setting("none", "tracker: none, tensorboard, wandb or trackio")
    seed: int = shared("seed")
    # the quiz task
    questions: str = setting("", "text file of questions, one a line; empty: the bundled fact tables")
    quiz_learner: str = setting("auto", "reader, gain, or auto: reader for the bundled model, gain for any other")
    test_share: float = setting(0.2, "share of the facts that is kept for the test split")
    # model
    model_name: str = shared("model_name")
    load_in_4bit: str = shared("load_in_4bit")
    device: str = shared("device")
    dtype: str = shared("dtype")
    lora_r: int = shared("lora_r")
    lora_alpha: int = shared("lora_alpha")
    lora_dropout: float = shared("lora_dropout")
    target_modules: list[str] = shared("target_modules")
    gradient_checkpointing: bool = setting(False, "compute activations again in the backward pass: less memory")
    # generation
    temperature: float = shared("temperature")
    quiz_temperature: float = shared("quiz_temperature")
    top_p: float = shared("top_p")
    max_new_tokens: int = shared("max_new_tokens")
    quiz_tries: int = shared("quiz_tries")
    # the update
    learning_rate: float | None = shared("learning_rate")
    optimizer: str = setting("adamw", "adamw; on CUDA also adamw_8bit, paged_adamw_8bit (bitsandbytes)")
    batch_size: int = setting(16, "answers a step, on all processes together")
    mini_batch_size: int = setting(16, "answers in one forward and backward pass, on all processes together")
    gradient_accumulation_steps: int = setting(1, "passes that make one optimizer step")
    ppo_epochs: int = shared("ppo_epochs")
    group_size: int = setting(8, "answers to one prompt (grpo)")
    normalize_groups: bool = setting(False, "divide advantages by their group's standard deviation (grpo)")
    cliprange: float = shared("cliprange")
    cliprange_value: float = shared("cliprange_value")
    vf_coef: float = shared("vf_coef")
    entropy_coef: float = shared("entropy_coef")
    gamma: float = shared("gamma")
    lam: float = shared("lam")
    kl_coef: float = shared("kl_coef")
    adaptive_kl: bool = shared("adaptive_kl")
    kl_target: float = shared("kl_target")
    kl_horizon: int = shared("kl_horizon")
    target_kl: float = shared("target_kl")
    max_grad_norm: float = shared("max_grad_norm")

    learner = "person"  # no setting: what config.check asks of every configuration

    @property
    def prompts_per_step(self) -> int:
        return self.batch_size // (self.group_size if self.algorithm == "grpo" else 1)


RANGES = {
    "num_epochs": (1, 1_000_000),
    "samples_per_epoch": (0, 1e9),
    "eval_every": (0, 1e9),
    "eval_samples": (1, 1_000_000),
    "test_share": (0.001, 0.999),
    "mini_batch_size": (1, 4096),
    "gradient_accumulation_steps": (1, 4096),
}
CHOICES = {
    "algorithm": ("ppo", "grpo"),
    "optimizer": ("adamw", "adamw_8bit", "paged_adamw_8bit"),
    "report_to": ("none", "tensorboard", "wandb", "trackio"),
    "quiz_learner": ("auto", "reader", "gain"),
}
# What decides which samples a step gets: a run can't go on under another value.
COURSE = ("task", "algorithm", "batch_size", "group_size", "samples_per_epoch", "questions", "test_share", "seed")


def check(config: TrainConfig, processes: int = 1) -> None:
    """Raises ConfigError naming both values where settings are out of range or don't fit each other."""
    for name, (low, high) in RANGES.items():
        if not low <= getattr(config, name) <= high:
            raise ConfigError(f"{name}={getattr(config, name)} is out of range: expected {low:g} to {high:g}")
    for name, allowed in (CHOICES | {"task": tuple(TASKS)}).items():
        if getattr(config, name) not in allowed:
            raise ConfigError(f"{name}={getattr(config, name)} is unknown: expected one of {', '.join(allowed)}")
    one_step = config.mini_batch_size * config.gradient_accumulation_steps
    if config.batch_size % one_step:
        raise ConfigError(
            f"batch_size={config.batch_size} is not divisible by mini_batch_size={config.mini_batch_size} times "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}"
        )
    if config.mini_batch_size % processes:
        raise ConfigError(f"mini_batch_size={config.mini_batch_size} is not divisible by the {processes} processes")
    if config.algorithm == "grpo":
        if config.group_size < 2:
            raise ConfigError(f"group_size={config.group_size} with algorithm=grpo: a group needs at least 2 answers")
        if config.batch_size % (config.group_size * processes):
            raise ConfigError(
                f"batch_size={config.batch_size} is not divisible by group_size={config.group_size}"
                + (f" times the {processes} processes" if processes > 1 else "")
            )
    if config.samples_per_epoch % config.prompts_per_step:
        raise ConfigError(
            f"samples_per_epoch={config.samples_per_epoch} is not divisible by the {config.prompts_per_step} prompts "
            f"of a step (batch_size={config.batch_size})"
        )
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise ConfigError(f"report_to={config.report_to} needs a package: pip install {config.report_to}")


def quiz_task(config: TrainConfig) -> Callable[[Policy], Task]:
    """Checks the questions now, before any model is loaded; what it returns builds the task."""
    from tasks.quiz import QuizTask, split_samples

    split_samples("train", config.seed, config.questions, config.test_share)

    def build(policy: Policy) -> Task:
        default = "reader" if is_bundled(policy.config.model_name) else "gain"
        learner = default if config.quiz_learner == "auto" else config.quiz_learner
        return QuizTask(policy, config.seed, learner, config.questions, config.test_share)

    return build


TASKS: dict[str, Callable[[TrainConfig], Callable[[Policy], Task]]] = {"quiz": quiz_task}

# ---------------------------------------------------------------------------------------------------------- episodes


@dataclass
class Trajectory:
    """An episode as tokens: the prompt, then the policy's replies and what the environment said between them."""

    prompt: list[int]
    response: list[int]
    chosen: list[bool]  # of the response: True where the policy chose the token
    replies: list[str]
    outcome: Outcome | None = None
    question: str = ""  # the last message of the prompt

    @property
    def length(self) -> int:
        """Tokens that the policy wrote."""
        return sum(self.chosen)


def play(policy: Policy, episodes: Sequence[Episode], adapter: bool = True) -> list[Trajectory]:
    """Plays the episodes to their ends, all together; those that outgrow the model's context end as unknown."""
    tokenizer = policy.tokenizer
    trajectories = []
    for episode in episodes:
        messages = episode.reset()
        trajectories.append(Trajectory(encode_chat(tokenizer, messages), [], [], [], question=messages[-1]["content"]))
    active = list(range(len(episodes)))
    while active:
        for i in active:
            end_without_room(policy, trajectories[i])
        active = [i for i in active if trajectories[i].outcome is None]
        if not active:
            break
        contexts = [trajectories[i].prompt + trajectories[i].response for i in active]
        replies = generate_batch(policy, contexts, policy.config.temperature, adapter=adapter)
        for i, ids in zip(list(active), replies, strict=True):
            trajectory = trajectories[i]
            trajectory.response += ids
            trajectory.chosen += [True] * len(ids)
            trajectory.replies.append(tokenizer.decode(ids, skip_special_tokens=True))
            said = episodes[i].step(trajectory.replies[-1])
            if said is None:
                trajectory.outcome = episodes[i].outcome()
                active.remove(i)
            else:
                said_ids = environment_ids(policy, said, ids[-1] in policy.stop_ids)
                trajectory.response += said_ids
                trajectory.chosen += [False] * len(said_ids)
    return trajectories


def end_without_room(policy: Policy, trajectory: Trajectory) -> None:
    """Ends an episode as unknown if another reply doesn't fit into the model's context."""
    needed = len(trajectory.prompt) + len(trajectory.response) + policy.config.max_new_tokens
    if needed > policy.context:
        why = f"{needed} tokens do not fit into the model's context of {policy.context}"
        trajectory.outcome = Outcome("unknown", 0.0, why)
        if not trajectory.response or len(trajectory.prompt) + len(trajectory.response) > policy.context:
            trajectory.prompt = trajectory.prompt[:1]  # a row that takes part in nothing
            trajectory.response, trajectory.chosen = [policy.pad_id], [False]


def environment_ids(policy: Policy, text: str, ended: bool) -> list[int]:
    """The tokens between two replies: the environment's `text` as the next message of the chat.

    They are what the chat template puts after a reply's end token, that token included unless the reply `ended` with
    it. The replies themselves stay the tokens that were sampled; nothing is tokenized a second time.
    """
    tokenizer = policy.tokenizer
    if tokenizer.chat_template is None:
        return tokenizer(f"\n\n{text}\n\n", add_special_tokens=False, split_special_tokens=True).input_ids
    opening = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    before = encode_chat(tokenizer, opening)
    after = encode_chat(tokenizer, [*opening, {"role": "user", "content": text}])
    same = next((i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), len(before))
    ends = [i for i in range(same) if after[i] in policy.stop_ids]
    if not ends:
        raise ConfigError("this model's chat template ends replies with no stop token: several turns are not possible")
    return after[ends[-1] + ended :]


# -------------------------------------------------------------------------------------------------------- advantages


@dataclass(frozen=True)
class Experience:
    """This process's share of a step: what was sampled, and what policy and reference said of it then; all (B, T).

    The batch's response_mask leaves out answers that no reward was given to and, with GRPO, groups of equal rewards.
    """

    batch: Batch
    logprobs: "Tensor"
    ref_logprobs: "Tensor"
    values: "Tensor"
    advantages: "Tensor"
    returns: "Tensor"

    def rows(self, rows: Sequence[int]) -> "Experience":
        mine = [getattr(self, f.name)[rows] for f in fields(self) if f.name != "batch"]
        return Experience(batch_rows(self.batch, rows), *mine)


def batch_rows(batch: Batch, rows: Sequence[int]) -> Batch:
    return Batch(batch.input_ids[rows], batch.attention_mask[rows], batch.response_mask[rows])


def chunks(items: Sequence, size: int) -> list[Sequence]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def total(accelerator: "Accelerator", *numbers: float) -> list[float]:
    """Each number, summed over the processes."""
    if accelerator.num_processes == 1:
        return list(numbers)
    import torch

    return accelerator.reduce(torch.tensor(numbers, dtype=torch.float64, device=accelerator.device), "sum").tolist()


def group_advantages(scores: "Tensor", group_size: int, normalize: bool) -> "Tensor":
    """GRPO's advantages (B,): scores (B,) less the mean of their group, `group_size` neighbours; 0 where all are equal.

    Shao et al. 2024, section 4.1 (https://arxiv.org/abs/2402.03300). `normalize` divides by the group's standard
    deviation, as there; without it easy and hard prompts keep their weight (Liu et al. 2025,
    https://arxiv.org/abs/2503.20783). Raises ValueError if the scores are not whole groups of at least 2.
    """
    if group_size < 2 or len(scores) % group_size:
        raise ValueError(f"{len(scores)} scores are not whole groups of group_size={group_size}, at least 2")
    groups = scores.view(-1, group_size)
    advantages = groups - groups.mean(-1, keepdim=True)
    if normalize:
        advantages = advantages / (groups.std(-1, keepdim=True) + 1e-4)
    equal = (groups == groups[:, :1]).all(-1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).flatten()


def whiten_jointly(accelerator: "Accelerator", x: "Tensor", mask: "Tensor") -> "Tensor":
    """ppo.whiten over the tokens of all processes; returns this process's share."""
    import torch

    import ppo

    if accelerator.num_processes == 1:
        return ppo.whiten(x, mask)
    mine = x[mask]
    counts = accelerator.gather(torch.tensor([len(mine)], device=x.device))
    joint = torch.zeros(len(counts), int(counts.max()), device=x.device)
    joint[accelerator.process_index, : len(mine)] = mine
    joint = accelerator.reduce(joint, "sum")
    white = ppo.whiten(joint, torch.arange(joint.shape[1], device=x.device) < counts.unsqueeze(1))
    return torch.zeros_like(x).masked_scatter(mask, white[accelerator.process_index, : len(mine)])


def examine(
    policy: Policy, accelerator: "Accelerator", config: TrainConfig, trajectories: Sequence[Trajectory]
) -> tuple[Experience, dict[str, float]]:
    """Advantages for the trajectories of this process, and how the episodes of all processes went."""
    import torch

    import ppo

    known = [t.outcome.verdict != "unknown" and math.isfinite(t.outcome.reward) for t in trajectories]
    if config.algorithm == "grpo":  # a group is whole or left out
        known = [k for group in chunks(known, config.group_size) for k in [all(group)] * len(group)]
    scores = torch.tensor([t.outcome.reward if k else 0.0 for t, k in zip(trajectories, known, strict=True)])
    chosen = [[c and k for c in t.chosen] for t, k in zip(trajectories, known, strict=True)]
    prompts, responses = [t.prompt for t in trajectories], [t.response for t in trajectories]
    batch = collate(prompts, responses, policy.pad_id, policy.device, chosen)
    mask = batch.response_mask
    scores = scores.to(policy.device)
    seen = observe(policy, batch, rows_per_pass(config, accelerator))
    logprobs, ref_logprobs, values, kl = seen
    kept = zip(trajectories, known, strict=True)
    right = sum(t.outcome.verdict == "correct" for t, k in kept if k)
    sums = (masked.masked_fill(~mask, 0.0).sum().item() for masked in (kl, logprobs - ref_logprobs, values))
    length = sum(t.length for t in trajectories)
    answers, reward, right, tokens, length, kl, kl_estimate, value = total(
        accelerator, sum(known), scores.sum().item(), right, mask.sum().item(), length, *sums
    )
    metrics = {
        "reward": reward / max(answers, 1),
        "accuracy": right / max(answers, 1),
        "answers": int(answers),
        "left_out": config.batch_size - int(answers),
        "length": length / config.batch_size,
        "kl": kl / max(answers, 1),
        "kl_estimate": kl_estimate / max(answers, 1),
        "kl_coef": policy.kl_coef,
    }
    if config.algorithm == "grpo":
        per_answer = group_advantages(scores, config.group_size, config.normalize_groups)
        flat = (scores.view(-1, config.group_size) == scores[:: config.group_size, None]).all(-1)
        flat = flat.repeat_interleave(config.group_size)
        metrics["equal_groups"] = int(total(accelerator, (flat.cpu() & torch.tensor(known)).sum().item())[0])
        metrics["equal_groups"] //= config.group_size
        mask = mask & ~flat.unsqueeze(1)
        batch = replace(batch, response_mask=mask)
        advantages, returns = per_answer.unsqueeze(1) * mask, torch.zeros_like(values)
    else:
        metrics["value"] = value / max(tokens, 1)
        rewards = ppo.compute_rewards(scores, logprobs, ref_logprobs, mask, policy.kl_coef)
        advantages, returns = ppo.gae(rewards, values, mask, config.gamma, config.lam)
        if answers >= 8:  # in a small batch whitening erases or flips the reward
            advantages = whiten_jointly(accelerator, advantages, mask)
    return Experience(batch, logprobs, ref_logprobs, values, advantages, returns), metrics


def rows_per_pass(config: TrainConfig, accelerator: "Accelerator") -> int:
    return config.mini_batch_size // accelerator.num_processes


def observe(policy: Policy, batch: Batch, size: int) -> list["Tensor"]:
    """logprobs, ref_logprobs, values and the exact KL from the reference, each (B, T), `size` rows at a time."""
    import torch

    import ppo

    seen = []
    with torch.no_grad():
        for rows in chunks(range(len(batch.input_ids)), size):
            part = batch_rows(batch, rows)
            logprobs, values, logits = token_logprobs_and_values(policy, part)
            ref_logprobs, _, ref_logits = token_logprobs_and_values(policy, part, adapter=False)
            seen.append((logprobs, ref_logprobs, values, ppo.exact_kl(logits, ref_logits)))
    return [torch.cat(parts) for parts in zip(*seen, strict=True)]


# -------------------------------------------------------------------------------------------------------- the update


def learn(
    policy: Policy, accelerator: "Accelerator", config: TrainConfig, trajectories: Sequence[Trajectory]
) -> dict[str, Any]:
    """One step on the trajectories of all processes; returns its metrics, the same on each.

    All or nothing, as in the tutor. `outcome` is `taken`, `undone` (beyond the trust region) or `skipped`, with `why`.
    """
    before = policy.snapshot()
    metrics: dict[str, Any] = {}
    try:
        experience, metrics = examine(policy, accelerator, config, trajectories)
        metrics |= update(policy, accelerator, config, experience)
        metrics["step_kl"] = moved(policy, accelerator, config, experience.batch, before)
        if config.adaptive_kl:
            policy.kl_coef = adapted(policy, config, metrics)
        metrics["outcome"] = "taken"
        if not metrics["step_kl"] <= config.target_kl:  # NaN included
            policy.restore(before)
            metrics["outcome"] = "undone"
    except StepSkipped as skipped:
        policy.restore(before)
        metrics |= {"outcome": "skipped", "why": str(skipped)}
    except BaseException:
        policy.restore(before)
        raise
    return metrics


def adapted(policy: Policy, config: TrainConfig, metrics: dict[str, Any]) -> float:
    import ppo

    return ppo.adapted_kl_coef(
        policy.kl_coef, metrics["kl"], config.kl_target, config.kl_horizon, answers=metrics["answers"]
    )


def update(policy: Policy, accelerator: "Accelerator", config: TrainConfig, experience: Experience) -> dict[str, float]:
    """ppo_epochs passes of minibatch updates. Raises StepSkipped, on every process, where nothing can be learnt."""
    import torch

    count = len(experience.logprobs)
    size = rows_per_pass(config, accelerator) * config.gradient_accumulation_steps
    mask, metrics, taken = experience.batch.response_mask, {}, 0
    for epoch in range(config.ppo_epochs):
        order = list(range(count))
        random.Random(f"{config.seed}/{policy.step}/{epoch}").shuffle(order)  # the same on every process
        for rows in chunks(order, size):
            tokens = total(accelerator, mask[rows].sum().item())[0]
            if not tokens:
                continue
            policy.optimizer.zero_grad()
            parts = gradients(policy, accelerator, config, experience.rows(rows), tokens)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters.values(), config.max_grad_norm).item()
            if not (math.isfinite(parts["loss"]) and math.isfinite(grad_norm)):
                raise StepSkipped(f"the loss is not finite (loss {parts['loss']}, gradient norm {grad_norm})")
            policy.optimizer.step()
            taken += 1
            for name, value in (parts | {"grad_norm": grad_norm}).items():
                metrics[name] = metrics.get(name, 0.0) + value
    policy.optimizer.zero_grad()
    if not taken:
        raise StepSkipped("no answer has an advantage: every one was left out, or earned what its group earned")
    return {name: value / taken for name, value in metrics.items()}


def gradients(
    policy: Policy, accelerator: "Accelerator", config: TrainConfig, experience: Experience, tokens: float
) -> dict[str, float]:
    """Leaves in every parameter the gradient of the loss, a mean over the `tokens` response tokens of all processes.

    Returns the loss and its parts. Memory that runs out on one process makes the loss NaN on all, so that all skip.
    """
    import torch

    sums: dict[str, float] = {}
    failed = 0.0
    try:
        for rows in chunks(range(len(experience.logprobs)), rows_per_pass(config, accelerator)):
            piece = experience.rows(rows)
            share = piece.batch.response_mask.sum().item() / tokens
            with gradient_dropout(policy), recomputing(policy):
                parts = losses(policy, config, piece)
                (parts["loss"] * share).backward()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.item() * share
    except torch.OutOfMemoryError:
        failed = math.nan
    if accelerator.num_processes > 1:
        sums = dict(zip(LOSSES, total(accelerator, *(sums.get(name, 0.0) for name in LOSSES)), strict=True))
        failed = total(accelerator, failed)[0]
        owners = list(policy.parameters.values())
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in owners])
        pieces = accelerator.reduce(flat, "sum").split([p.numel() for p in owners])
        for p, piece in zip(owners, pieces, strict=True):
            p.grad = piece.view_as(p).clone()
    sums["loss"] = sums.get("loss", 0.0) + failed
    return sums


LOSSES = ("loss", "policy_loss", "value_loss", "entropy", "clip_fraction")


def losses(policy: Policy, config: TrainConfig, piece: Experience) -> dict[str, "Tensor"]:
    """The loss of one forward pass and its parts, each a mean over the piece's response tokens; 0 if it has none."""
    import ppo

    mask = piece.batch.response_mask
    logprobs, values, logits = token_logprobs_and_values(policy, piece.batch)
    if not mask.any():
        nothing = 0.0 * (logprobs.sum() + values.sum())
        return dict.fromkeys(LOSSES, nothing)
    pg_loss, clip_fraction = ppo.policy_loss(logprobs, piece.logprobs, piece.advantages, mask, config.cliprange)
    mean_entropy = ppo.entropy(logits if config.entropy_coef else logits.detach(), mask)
    loss = pg_loss - config.entropy_coef * mean_entropy
    vf_loss = 0.0 * pg_loss.detach()
    if config.algorithm == "ppo":
        vf_loss, _ = ppo.value_loss(values, piece.values, piece.returns, mask, config.cliprange_value)
        loss = loss + config.vf_coef * vf_loss
    elif policy.kl_coef:
        # GRPO prices divergence in the loss, by an estimate that is never negative (Shao et al. 2024, equation 4).
        difference = (piece.ref_logprobs - logprobs).masked_fill(~mask, 0.0)
        loss = loss + policy.kl_coef * ppo.masked_mean(difference.exp() - difference - 1.0, mask)
    return dict(zip(LOSSES, (loss, pg_loss, vf_loss, mean_entropy, clip_fraction), strict=True))


def moved(policy: Policy, accelerator: "Accelerator", config: TrainConfig, batch: Batch, before: Snapshot) -> float:
    """How far the update went: the exact KL(old || new), in nats, mean over the response tokens of all processes.

    The old weights come back for a forward pass, as the logits of a whole batch may be too large to be kept.
    """
    import torch

    after, nats = policy.snapshot(), 0.0
    for rows in chunks(range(len(batch.input_ids)), rows_per_pass(config, accelerator)):
        part = batch_rows(batch, rows)
        policy.restore(before)
        with torch.no_grad():
            _, _, old_logits = token_logprobs_and_values(policy, part)
        policy.restore(after)
        step_kl = trust_region(policy, part, old_logits, 0.0)["step_kl"]
        tokens = part.response_mask.sum().item()
        nats += step_kl * tokens if tokens else 0.0
    nats, tokens = total(accelerator, nats, batch.response_mask.sum().item())
    return nats / tokens


@contextlib.contextmanager
def recomputing(policy: Policy) -> Iterator[None]:
    """Gradient checkpointing acts in here, where it is on: its layers ask whether they are in training."""
    layers = [module for module in policy.model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.training = True  # of the layer alone: a dropout inside it stays off
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def prepare(policy: Policy, config: TrainConfig) -> None:
    """Puts the wanted optimizer, and gradient checkpointing, on a fresh policy. Raises ConfigError."""
    if config.gradient_checkpointing:
        options = {"use_reentrant": False}
        policy.model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if config.optimizer != "adamw":
        if policy.device.type != "cuda":
            raise ConfigError(f"optimizer={config.optimizer} needs CUDA, and device is {policy.device}: use adamw")
        use_8bit_adamw(policy, paged=config.optimizer.startswith("paged"))


def use_8bit_adamw(policy: Policy, paged: bool) -> None:
    """Replaces AdamW by bitsandbytes' 8-bit one, its state in tensors from the start, as the core saves it."""
    import bitsandbytes
    import torch

    class Optimizer(bitsandbytes.optim.AdamW8bit):
        def init_state(self, group, p, gindex, pindex):
            super().init_state(group, p, gindex, pindex)
            state = self.state[p]
            state["step"] = torch.zeros((), device=p.device)
            state |= {name: state[name].clone() for name in ("qmap1", "qmap2") if name in state}  # one for each

        def update_step(self, group, p, gindex, pindex):
            state = self.state[p]
            step, state["step"] = state["step"], int(state["step"])  # bitsandbytes wants a number
            super().update_step(group, p, gindex, pindex)
            state["step"] = step.fill_(state["step"])

    policy.optimizer = Optimizer(
        policy.parameters.values(), lr=policy.config.learning_rate, weight_decay=0.0, is_paged=paged
    )
    for gindex, group in enumerate(policy.optimizer.param_groups):
        for pindex, p in enumerate(group["params"]):
            policy.optimizer.init_state(group, p, gindex, pindex)


# ----------------------------------------------------------------------------------------------------------- the run


def wilson_interval(right: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share, `right` of `count` (Wilson 1927); (0, 1) if nothing was counted."""
    if not count:
        return 0.0, 1.0
    share, spread = right / count, z * z / count
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def all_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every epoch_N and step_N that says its step, the newest first."""
    found = []
    for folder in (*root.glob("epoch_*"), *root.glob("step_*")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append((int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"]), folder))
    return sorted(found, key=lambda pair: (pair[0], pair[1].name), reverse=True)


def find_checkpoint(config: TrainConfig, notice: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The whole checkpoint that `resume_from` means, with its state; None for a fresh start. Raises ConfigError."""
    root = Path(config.output_dir)
    there = all_checkpoints(root)
    if not config.resume_from:
        if there or (root / "train.log").exists():
            raise ConfigError(f"output_dir={root} holds a run: set resume_from=latest, or another output_dir")
        return None
    latest = config.resume_from == "latest"
    reasons = []
    for folder in [path for _, path in there] if latest else [Path(config.resume_from)]:
        try:
            state = verify_checkpoint(folder)
            break
        except Damaged as error:
            reasons.append(f"{folder.name}: {error}")
            if latest:
                notice(f"{folder.name} is not used ({error}); trying the one before it.")
    else:
        raise ConfigError(
            f"resume_from={config.resume_from}: no whole checkpoint in {root if latest else config.resume_from} "
            f"({'; '.join(reasons) or 'none at all'})"
        )
    if not latest and (there or (root / "train.log").exists()):
        inside = folder.resolve().parent == root.resolve()
        if not inside or there[0][0] > state["step"]:
            newest = f"step {there[0][0]}" if there else "no checkpoint yet"
            raise ConfigError(
                f"resume_from={folder} is at step {state['step']}, and output_dir={root} holds a run ({newest}): "
                "set resume_from=latest, or another output_dir"
            )
    for name in COURSE:
        if state["config"].get(name) != getattr(config, name):
            raise ConfigError(
                f"{folder} was trained with {name}={state['config'].get(name)}, now it is {getattr(config, name)}: "
                f"set {name} back, or start afresh in another output_dir"
            )
    return folder, state


@contextlib.contextmanager
def stop_requests(patient: bool) -> Iterator[list[int]]:
    """Notes Ctrl-C and SIGTERM in the list it gives. A second ends at once, unless `patient`: a launcher sends two."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked and not patient:
            raise KeyboardInterrupt
        asked.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Training:
    """A policy, its task, and the run on disk. What a step does follows from weights, settings and its number."""

    def __init__(self, config: TrainConfig, policy: Policy, task: Task, accelerator: "Accelerator"):
        self.config, self.policy, self.task, self.accelerator = config, policy, task, accelerator
        self.root = Path(config.output_dir)
        self.log = LineFile(self.root / "train.log")
        self.lines: list[dict[str, Any]] = []
        self.train, self.laps = task.samples("train"), {}
        per_epoch = config.samples_per_epoch or len(self.train)
        self.steps_per_epoch = max(1, per_epoch // config.prompts_per_step)
        self.last = config.num_epochs * self.steps_per_epoch

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(clean(text), file=sys.stderr, flush=True)

    def resume(self, folder: Path, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint; the log's lines of later steps are dropped, as these steps are taken again."""
        try:
            load_checkpoint(folder, self.policy)
        except Damaged as error:
            raise ConfigError(f"resume_from={folder}: {error}") from None
        self.policy.configure(self.policy.config)
        if folder.resolve().parent == self.root.resolve() and self.accelerator.is_main_process:
            if self.log.size > state["log_offset"]:
                os.truncate(self.log.path, state["log_offset"])
            self.lines = self.log.read()
        self.say(f"Going on from {folder}, step {self.policy.step}.")

    def samples(self, step: int) -> list[Any]:
        """The samples of a step: shuffled passes over the training split, one after the other."""
        picked = []
        for place in range(step * self.config.prompts_per_step, (step + 1) * self.config.prompts_per_step):
            lap, i = divmod(place, len(self.train))
            if lap not in self.laps:
                self.laps[lap] = random.Random(f"{self.config.seed}/{lap}").sample(
                    range(len(self.train)), len(self.train)
                )
            picked.append(self.train[self.laps[lap][i]])
        return picked

    def step(self) -> dict[str, Any]:
        """Plays and learns one batch; returns its log line."""
        import torch

        config, accelerator, number = self.config, self.accelerator, self.policy.step
        processes = accelerator.num_processes
        torch.manual_seed(turn_seed(config.seed, number * processes + accelerator.process_index))
        mine = self.samples(number)[accelerator.process_index :: processes]
        copies = config.group_size if config.algorithm == "grpo" else 1
        started = time.perf_counter()
        trajectories = play(self.policy, [self.task.episode(sample) for sample in mine for _ in range(copies)])
        played = time.perf_counter() - started
        metrics = learn(self.policy, accelerator, config, trajectories)
        self.policy.step = number + 1
        tokens = total(accelerator, sum(t.length for t in trajectories))[0]
        line = {"timestamp": now(), "step": number + 1, "epoch": number // self.steps_per_epoch + 1} | metrics
        seconds = time.perf_counter() - started
        return line | {"tokens_per_second": round(tokens / played, 1), "seconds": round(seconds, 3)}

    def evaluate(self) -> dict[str, float]:
        """Accuracy with its interval, reward and length on test samples; samples and seed are the same every time."""
        import torch

        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        samples = self.task.samples("test")[: self.config.eval_samples][rank::processes]
        torch.manual_seed(turn_seed(self.config.seed, -1 - rank))
        trajectories = []
        for part in chunks(samples, max(1, self.config.batch_size // processes)):
            trajectories += play(self.policy, [self.task.episode(sample) for sample in part])
        known = [t for t in trajectories if t.outcome.verdict != "unknown"]
        right = sum(t.outcome.verdict == "correct" for t in known)
        facts = [t.outcome.details["states_fact"] for t in trajectories if "states_fact" in t.outcome.details]
        count, right, reward, tokens, answers, stated, of = total(
            self.accelerator,
            *(len(known), right, sum(t.outcome.reward for t in known)),
            *(sum(t.length for t in trajectories), len(trajectories), sum(facts), len(facts)),
        )
        low, high = wilson_interval(right, count)
        found = {"eval_accuracy": right / max(count, 1), "eval_low": low, "eval_high": high, "eval_samples": int(count)}
        found |= {"eval_reward": reward / max(count, 1), "eval_length": tokens / max(answers, 1)}
        return found | ({"eval_states_fact": stated / of} if of else {})

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line to the log and to the trackers; a disk that refuses costs a message, not the run."""
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.lines.append(line)
        self.accelerator.log({k: v for k, v in line.items() if isinstance(v, int | float)}, step=line["step"])
        if self.accelerator.is_main_process:
            try:
                self.log.append(line)
            except OSError as error:
                self.say(f"Could not write the log ({error}). The run goes on.")

    def result(self) -> str:
        """How the run went, in a sentence, for the model card."""
        found = [line for line in self.lines if "eval_accuracy" in line]
        if not found:
            return "It was not evaluated yet."
        first, last = found[0], found[-1]
        return (
            f"Held-out accuracy {last['eval_accuracy']:.1%} at step {last['step']} (95 % interval "
            f"{last['eval_low']:.1%} to {last['eval_high']:.1%}, {last['eval_samples']} samples), "
            f"{first['eval_accuracy']:.1%} at step {first['step']}."
        )

    def save(self, name: str) -> None:
        """Writes the checkpoint `name`, on the main process, while the others wait."""
        if self.accelerator.is_main_process:
            step = self.policy.step
            state = {"epoch": step // self.steps_per_epoch, "data_cursor": step * self.config.prompts_per_step}
            state |= {"rng": {"seed": self.config.seed, "step": step}, "log_offset": self.log.size}
            stats = {"training_stats.json": json.dumps(training_stats(self.lines), indent=1)}
            try:
                save_checkpoint(self.root / name, self.policy, state, self.result(), stats)
                for folder in checkpoints(self.root)[self.config.keep_checkpoints :]:
                    remove_folder(folder)
            except OSError as error:
                self.say(f"Could not save {name} ({error}). The run goes on.")
        self.accelerator.wait_for_everyone()

    def checkpoint_name(self) -> str:
        epoch, rest = divmod(self.policy.step, self.steps_per_epoch)
        return f"step_{self.policy.step}" if rest else f"epoch_{epoch}"

    def run(self) -> int:
        """Trains to the end, or until it is asked to stop. Returns the exit status."""
        config, policy = self.config, self.policy
        align(policy, self.accelerator)
        with stop_requests(self.accelerator.num_processes > 1) as asked, self.progress() as show:
            if policy.step == 0 and not self.lines:
                self.write({"timestamp": now(), "step": 0} | self.evaluate())
            stop = False
            while policy.step < self.last and not stop:
                try:
                    line = self.step()
                except KeyboardInterrupt:
                    self.say(f"Stopped in a step; {self.root} has what was saved before. {self.how_to_go_on()}")
                    return 130
                stop = total(self.accelerator, float(bool(asked)))[0] > 0
                every = config.eval_every or self.steps_per_epoch
                if policy.step % every == 0 or policy.step == self.last:
                    line |= self.evaluate()
                self.write(line)
                show(line)
                if stop or policy.step % self.steps_per_epoch == 0 or policy.step % config.save_every == 0:
                    self.save(self.checkpoint_name())
        if policy.step < self.last:
            self.say(f"Stopped after step {policy.step}, saved in {self.root / self.checkpoint_name()}.")
            self.say(self.how_to_go_on())
            return 130
        self.report()
        return 0

    def how_to_go_on(self) -> str:
        several = self.accelerator.num_processes > 1
        launcher = f"accelerate launch --num_processes {self.accelerator.num_processes}" if several else "python"
        return f"Go on with: {launcher} train.py --config {self.root / 'effective_config.yaml'} resume_from=latest"

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """A progress bar; what it gives shows a log line in it."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        hidden = not self.accelerator.is_main_process
        with Progress(*columns, console=Console(stderr=True, markup=False), disable=hidden) as bar:
            item = bar.add_task("the first step", total=self.last, completed=self.policy.step)

            def show(line: dict[str, Any]) -> None:
                text = f"reward {line['reward']:+.2f}  accuracy {line['accuracy']:.0%}  KL {line['kl']:.2f}"
                text += f"  {line['tokens_per_second']:.0f} tokens/s"
                bar.update(item, completed=line["step"], description=text)

            yield show

    def report(self) -> None:
        """Writes report.html and its plots, with answers of the base model and of the trained one side by side."""
        if self.accelerator.is_main_process:
            import torch

            from tools.report import write_report

            answers = []
            for adapter in (False, True):
                torch.manual_seed(self.config.seed)
                episodes = [self.task.episode(sample) for sample in self.task.samples("test")[:10]]
                answers.append(play(self.policy, episodes, adapter))
            rows = [(a.question, a.replies, b.replies) for a, b in zip(*answers, strict=True)]
            path = write_report(self.root, self.lines, rows, self.result())
            self.say(f"{self.result()} The report is {path}.")
        self.accelerator.wait_for_everyone()


def training_stats(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The log as columns: `training` has a value for each step, `evaluation` one for each evaluation."""
    names = "step reward accuracy kl kl_coef step_kl length loss policy_loss value_loss entropy grad_norm outcome"
    steps = [line for line in lines if line["step"] > 0]
    found = [line for line in lines if "eval_accuracy" in line]
    evals = ["step", *(name for name in (found[0] if found else ()) if name.startswith("eval_"))]
    return {
        "training": {name: [line.get(name) for line in steps] for name in names.split()},
        "evaluation": {name.removeprefix("eval_"): [line.get(name) for line in found] for name in evals},
    }


def align(policy: Policy, accelerator: "Accelerator") -> None:
    """Every process starts from the main one's weights."""
    if accelerator.num_processes > 1:
        import torch.distributed

        for tensor in policy.tensors().values():
            torch.distributed.broadcast(tensor, 0)


def train(config: TrainConfig) -> int:
    """The whole run; settings and data are checked before any model is loaded. Raises ConfigError."""
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    build_task = TASKS[config.task](config)

    def notice(text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(clean(text), file=sys.stderr, flush=True)

    found = find_checkpoint(config, notice)
    import torch
    from accelerate import Accelerator

    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    tracker = None if config.report_to == "none" else config.report_to
    accelerator = Accelerator(cpu=on_cpu, log_with=tracker, project_dir=config.output_dir)
    device = config.device
    if accelerator.num_processes > 1 and device in ("auto", "cuda"):
        config = replace(config, device=str(accelerator.device))
    policy, config = load_policy(config, notice)
    prepare(policy, config)
    training = Training(config, policy, build_task(policy), accelerator)
    if found:
        training.resume(*found)
    if accelerator.is_main_process:
        training.root.mkdir(parents=True, exist_ok=True)
        save_yaml(replace(config, device=device), training.root / "effective_config.yaml")
    if tracker:
        accelerator.init_trackers("train", config={"algorithm": config.algorithm, "task": config.task})
    status = training.run()
    accelerator.end_training()
    return status


USAGE = """usage: python train.py [--config FILE] [name=value ...]

Trains the policy on a task, unattended. In several processes: accelerate launch train.py [name=value ...]
"""


def main() -> int:
    """The program. Exit status: 0; 2 for a setting or data that can't be used; 130 after Ctrl-C."""
    config = from_command_line(TrainConfig, USAGE)
    try:
        return train(config)
    except ConfigError as error:
        print(f"error: {clean(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
