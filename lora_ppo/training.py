"""A batch of episodes becomes one step: PPO or GRPO, in minibatches, in one process or many. `learn` tells the story.

The numbers of its steps are those of step.ppo_step, which is the same for one batch in one pass. Every process holds
the adapters and its share of the trajectories. Gradients are summed over processes, and each divides by the token count
of all: the sum is the gradient of the joint batch, however the tokens are spread (processes.py).

Shapes: B trajectories of this process, T response tokens, V vocabulary.
"""

import contextlib
import functools
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from lora_ppo.episodes import Trajectory
from lora_ppo.forward import Batch, collate, token_logprobs_and_values
from lora_ppo.policy import Policy, Snapshot, gradient_dropout
from lora_ppo.processes import everywhere, sharded, total, whiten_jointly
from lora_ppo.settings import Settings
from lora_ppo.step import OUT_OF_MEMORY, StepSkipped, out_of_memory, trust_region
from lora_ppo.watching import shares

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


KEPT_LOGITS = 2**26  # elements: 256 MB in float32
LOSSES = ("loss", "policy_loss", "value_loss", "entropy", "clip_fraction")


@dataclass(frozen=True)
class Experience:
    """This process's share of a step: what was sampled, and what policy and reference said of it then; all (B, T).

    The batch's response_mask leaves out answers that no reward was given to and, with GRPO, groups of equal rewards.
    `first` is the policy's forward pass with its graph, where the update is one pass over all rows: there the policy is
    the one that sampled, and no second pass is needed. `logits` (B, T, V) are the policy's, where they fit and there is
    a trust region.
    """

    batch: Batch
    logprobs: "Tensor"
    ref_logprobs: "Tensor"
    values: "Tensor"
    advantages: "Tensor"
    returns: "Tensor"
    first: tuple["Tensor", "Tensor", "Tensor"] | None = None
    logits: "Tensor | None" = None

    def rows(self, rows: Sequence[int]) -> "Experience":
        if self.first:
            return self
        batch = self.batch.rows(rows)
        t, names = batch.response_mask.shape[1], (f.name for f in fields(self))
        mine = [getattr(self, name)[rows, :t] for name in names if name not in ("batch", "first", "logits")]
        return Experience(batch, *mine)


def chunks(items: Sequence, size: int) -> list[Sequence]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def learn(
    policy: Policy, accelerator: "Accelerator", config: Settings, trajectories: Sequence[Trajectory]
) -> dict[str, Any]:
    """One step on the trajectories of all processes; returns its metrics, the same on each.

    All or nothing, as in the tutor. `outcome` is `taken`, `undone` (beyond the trust region) or `skipped`, with `why`.
    """
    from lora_ppo import ppo

    before, metrics = None, {}
    try:
        before = policy.snapshot()

        # 1. to 4. What policy and reference say of the answers; rewards; advantages.
        experience, metrics = examine(policy, accelerator, config, trajectories)

        # 5. ppo_epochs passes over the batch, each in minibatches that are shuffled anew: the loss, its gradient summed
        #    over the processes, a step of AdamW.
        mask, sums, taken = experience.batch.response_mask, Counter(), 0
        size = rows_per_pass(config, accelerator) * config.gradient_accumulation_steps
        for epoch in range(config.ppo_epochs):
            order = list(range(len(experience.logprobs)))
            random.Random(f"{config.seed}/{policy.step}/{epoch}").shuffle(order)  # the same on every process
            for rows in chunks(order, size):
                tokens = total(accelerator, mask[rows].sum().item())[0]
                if not tokens:
                    continue
                joint = functools.partial(gradients, policy, accelerator, config, experience.rows(rows), tokens)
                parts = ppo.minibatch_update(joint, policy.optimizer, config.max_grad_norm)
                parts["grad_norm"] = parts["grad_norm"].item()
                if not (math.isfinite(parts["loss"]) and math.isfinite(parts["grad_norm"])):
                    loss, norm = parts["loss"], parts["grad_norm"]
                    raise StepSkipped(f"the loss is not finite (loss {loss}, gradient norm {norm})")
                taken += 1
                sums.update(parts)
        policy.optimizer.zero_grad()
        if not taken:
            raise StepSkipped("no answer has an advantage: every one was left out, or earned what its group earned")
        metrics |= {name: value / taken for name, value in sums.items()}
        if config.algorithm == "grpo":
            del metrics["value_loss"]  # there is none

        # 6. The price of divergence may follow it (Ziegler et al. 2019, section 2.2).
        if config.adaptive_kl:
            policy.kl_coef = ppo.adapted_kl_coef(
                policy.kl_coef, metrics["kl"], config.kl_target, config.kl_horizon, metrics["answers"]
            )

        # 7. The trust region: how far the step went. What went further than target_kl is taken back.
        metrics["outcome"] = "taken"
        if config.target_kl:
            metrics["step_kl"] = moved(policy, accelerator, config, experience, before)
            if not metrics["step_kl"] <= config.target_kl:  # NaN included
                policy.restore(before)
                metrics["outcome"] = "undone"
    except StepSkipped as skipped:
        policy.restore(before)
        metrics |= {"outcome": "skipped", "why": str(skipped)}
    except BaseException as error:
        if before:
            policy.restore(before)
        if accelerator.num_processes > 1 or not out_of_memory(error):
            raise
        metrics |= {"outcome": "skipped", "why": OUT_OF_MEMORY}
    return metrics


def examine(
    policy: Policy, accelerator: "Accelerator", config: Settings, trajectories: Sequence[Trajectory]
) -> tuple[Experience, dict[str, float]]:
    """Advantages for the trajectories of this process, and how the episodes of all processes went."""
    import torch

    from lora_ppo import ppo

    # 1. The batch. An answer without a reward takes part in nothing; with GRPO, neither does its group.
    known = [t.outcome.verdict != "unknown" and math.isfinite(t.outcome.reward) for t in trajectories]
    if config.algorithm == "grpo":
        known = [k for group in chunks(known, config.group_size) for k in [all(group)] * len(group)]
    scores = torch.tensor([t.outcome.reward if k else 0.0 for t, k in zip(trajectories, known, strict=True)])
    chosen = [[c and k for c in t.chosen] for t, k in zip(trajectories, known, strict=True)]
    prompts, responses = [t.prompt for t in trajectories], [t.response for t in trajectories]
    batch = collate(prompts, responses, policy.pad_id, policy.device, chosen)
    mask, scores = batch.response_mask, scores.to(policy.device)  # (B, T), (B,)

    # 2. What the policy that sampled them and the reference say of the answers, in passes that fit into memory.
    seen = everywhere(policy, accelerator, lambda: observe(policy, accelerator, config, batch))
    logprobs, ref_logprobs, values, kl, logits, first = seen

    # 3. How the episodes of all processes went, for the log.
    right = sum(t.outcome.verdict == "correct" for t, k in zip(trajectories, known, strict=True) if k)
    sums = (masked.masked_fill(~mask, 0.0).sum().item() for masked in (kl, logprobs - ref_logprobs, values))
    length = sum(t.length for t in trajectories)
    answers, reward, right, tokens, length, kl, kl_estimate, value = total(
        accelerator, sum(known), scores.sum().item(), right, mask.sum().item(), length, *sums
    )
    metrics = shares(accelerator, trajectories) | {
        "answers": int(answers),
        "left_out": config.batch_size - int(answers),
        "length": length / config.batch_size,
        "kl_coef": policy.kl_coef,
    }
    if answers:  # of nothing there is no mean
        means = {"reward": reward, "accuracy": right, "kl": kl, "kl_estimate": kl_estimate}
        metrics |= {name: figure / answers for name, figure in means.items()}

    # 4. Advantages (B, T).
    if config.algorithm == "grpo":
        # GRPO: an answer's score less the mean of its group (Shao et al. 2024, section 4.1), the same at each token. No
        # value head. Groups in which all earn the same teach nothing and are left out.
        per_answer = ppo.group_advantages(scores, config.group_size, config.normalize_groups)
        flat = (scores.view(-1, config.group_size) == scores[:: config.group_size, None]).all(-1)
        flat = flat.repeat_interleave(config.group_size)
        equal = (flat.cpu() & torch.tensor(known)).sum().item() // config.group_size
        metrics["equal_groups"] = int(total(accelerator, equal)[0])
        mask = mask & ~flat.unsqueeze(1)
        batch = replace(batch, response_mask=mask)
        advantages, returns = per_answer.unsqueeze(1) * mask, torch.zeros_like(values)
    else:
        # PPO: rewards that pay for divergence, and GAE (Schulman et al. 2016, eq. 16), as in step.ppo_step.
        if tokens:
            metrics["value"] = value / tokens
        rewards = ppo.compute_rewards(scores, logprobs, ref_logprobs, mask, policy.kl_coef)
        advantages, returns = ppo.gae(rewards, values, mask, config.gamma, config.lam)
        if answers >= 8:  # among few answers whitening erases or flips the reward
            advantages = whiten_jointly(accelerator, advantages, mask)
    return Experience(batch, logprobs, ref_logprobs, values, advantages, returns, first, logits), metrics


def rows_per_pass(config: Settings, accelerator: "Accelerator") -> int:
    return config.mini_batch_size // accelerator.num_processes


def in_one_pass(config: Settings, accelerator: "Accelerator", rows: int) -> bool:
    """Whether the update is a single forward and backward pass over all rows, by the policy that sampled them."""
    plain = not (config.lora_dropout or config.gradient_checkpointing or sharded(accelerator))
    return plain and config.ppo_epochs == 1 and rows <= rows_per_pass(config, accelerator)


def observe(policy: Policy, accelerator: "Accelerator", config: Settings, batch: Batch) -> tuple:
    """logprobs, ref_logprobs, values and the exact KL from the reference, each (B, T); `Experience`'s logits and first.

    From the second minibatch on the policy is no longer the one that sampled: the ratio's denominator is what is kept
    here. In the first update it is the current policy's, and the ratio is 1 up to rounding.
    """
    import torch
    from torch.nn.functional import pad

    from lora_ppo import ppo

    seen, kept, forward, count = [], [], None, len(batch.input_ids)
    whole = in_one_pass(config, accelerator, count)
    fits = batch.response_mask.numel() * policy.head.weight.shape[0] <= KEPT_LOGITS
    for rows in chunks(range(count), rows_per_pass(config, accelerator)):
        part = batch.rows(rows)
        with torch.set_grad_enabled(whole):
            forward = token_logprobs_and_values(policy, part)
        logprobs, values, logits = (x.detach() for x in forward)
        with torch.no_grad():
            ref_logprobs, _, ref_logits = token_logprobs_and_values(policy, part, adapter=False)
        missing = batch.response_mask.shape[1] - logprobs.shape[1]
        kl = ppo.exact_kl(logits, ref_logits, config.temperature)
        seen.append(tuple(pad(x, (0, missing)) for x in (logprobs, ref_logprobs, values, kl)))
        if fits and config.target_kl:
            kept.append(pad(logits, (0, 0, 0, missing)))
    joined = [torch.cat(parts) for parts in zip(*seen, strict=True)]
    return *joined, torch.cat(kept) if kept else None, forward if whole else None


def gradients(
    policy: Policy, accelerator: "Accelerator", config: Settings, experience: Experience, tokens: float
) -> dict[str, float]:
    """Leaves in every parameter the gradient of the loss, a mean over the `tokens` response tokens of all processes.

    Returns the loss and its parts.
    """
    import torch

    def passes() -> dict[str, float]:
        sums = dict.fromkeys(LOSSES, 0.0)
        shortest_first = experience.batch.attention_mask.sum(1).argsort().tolist()  # rows of a pass are padded alike
        for rows in chunks(shortest_first, rows_per_pass(config, accelerator)):
            piece = experience.rows(rows)
            share = piece.batch.response_mask.sum().item() / tokens
            with gradient_dropout(policy), recomputing(policy):
                parts = losses(policy, config, piece)
                (parts["loss"] * share).backward()
            for name, value in parts.items():
                sums[name] += value.item() * share
        return sums

    sums = everywhere(policy, accelerator, passes)
    if accelerator.num_processes > 1:
        sums = dict(zip(LOSSES, total(accelerator, *sums.values()), strict=True))
        owners = list(policy.parameters.values())
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in owners])
        pieces = accelerator.reduce(flat, "sum").split([p.numel() for p in owners])
        for p, piece in zip(owners, pieces, strict=True):
            p.grad = piece.view_as(p).clone()
    return sums


def losses(policy: Policy, config: Settings, piece: Experience) -> dict[str, "Tensor"]:
    """The loss of one forward pass and its parts, each a mean over the piece's response tokens; 0 if it has none."""
    from lora_ppo import ppo

    mask, forward = piece.batch.response_mask, piece.first or token_logprobs_and_values(policy, piece.batch)
    logprobs, values, _ = forward
    if not mask.any():
        nothing = sum(x.masked_fill(~mask, 0.0).sum() for x in (logprobs, values))  # on padding they may be infinite
        return dict.fromkeys(LOSSES, nothing)
    old = piece.logprobs, piece.values, piece.advantages, piece.returns
    parts = ppo.ppo_losses(*forward, *old, mask, config)
    if config.algorithm == "grpo":
        parts["loss"] = parts["policy_loss"]  # no value head
        if config.entropy_coef:
            parts["loss"] = parts["loss"] - config.entropy_coef * parts["entropy"]
        if policy.kl_coef:
            # Divergence is priced in the loss, by an estimate that is never negative (Shao et al. 2024, equation 4).
            difference = (piece.ref_logprobs - logprobs).masked_fill(~mask, 0.0)
            k3 = difference.expm1() - difference
            parts["loss"] = parts["loss"] + policy.kl_coef * ppo.masked_mean(k3, mask)
    return parts


def moved(
    policy: Policy, accelerator: "Accelerator", config: Settings, experience: Experience, before: Snapshot
) -> float:
    """How far the update went: the exact KL(old || new), in nats, mean over the response tokens of all processes.

    Where the old logits were too large to be kept, the old weights come back for a forward pass.
    """
    import torch

    batch = experience.batch

    def logits_before(part: Batch, rows: Sequence[int], after: Snapshot) -> "Tensor":
        if experience.logits is not None:
            return experience.logits[rows, : part.response_mask.shape[1]]
        policy.restore(before)
        with torch.no_grad():
            _, _, logits = token_logprobs_and_values(policy, part)
        policy.restore(after)
        return logits

    def distance() -> float:
        after, nats = policy.snapshot(), 0.0
        for rows in chunks(range(len(batch.input_ids)), rows_per_pass(config, accelerator)):
            part = batch.rows(rows)
            step_kl = trust_region(policy, part, logits_before(part, rows, after), 0.0)["step_kl"]
            tokens = part.response_mask.sum().item()
            nats += step_kl * tokens if tokens else 0.0
        return nats

    nats, tokens = total(accelerator, everywhere(policy, accelerator, distance), batch.response_mask.sum().item())
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


def prepare(policy: Policy, config: Settings) -> None:
    """Puts the wanted optimizer and gradient checkpointing on a fresh policy."""
    if config.gradient_checkpointing:
        options = {"use_reentrant": False}
        policy.model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if config.optimizer != "adamw":
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

    policy.optimizer = Optimizer(policy.groups(), weight_decay=0.0, is_paged=paged)
    for gindex, group in enumerate(policy.optimizer.param_groups):
        for pindex, p in enumerate(group["params"]):
            policy.optimizer.init_state(group, p, gindex, pindex)
