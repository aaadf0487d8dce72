"""One step of training: from trajectories to advantages to weights, by PPO or GRPO, in one process or in many.

Every process holds the adapters and its share of the trajectories. Gradients are summed over processes, and each
process divides by the token count of all: the sum is the gradient of the joint batch, however the tokens are spread.
The frozen base model is whole on every process, or its layers are sharded over them (FSDP).

Shapes as in lora_ppo_demo.py: B trajectories (of this process), T response tokens, V vocabulary.
"""

import contextlib
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from lora_ppo.forward import Batch, collate, token_logprobs_and_values
from lora_ppo.policy import Policy, Snapshot, gradient_dropout
from lora_ppo.settings import ConfigError
from lora_ppo.step import OUT_OF_MEMORY, StepSkipped, out_of_memory, ppo_losses, trust_region
from tasks.episodes import Trajectory

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from train import TrainConfig

Result = TypeVar("Result")

# -------------------------------------------------------------------------------------------------------- advantages


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
        mine = [getattr(self, f.name)[rows] for f in fields(self) if f.name not in ("batch", "first", "logits")]
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


def everywhere(policy: Policy, accelerator: "Accelerator", work: Callable[[], Result]) -> Result:
    """What `work` returns: each process does its own, in as many forward passes as it needs.

    Memory that runs out on one process raises StepSkipped on all. With sharded weights it ends the run: the others are
    waiting for a layer by then.
    """
    result, failed = None, False
    try:
        with in_step(policy, accelerator):
            result = work()
    except Exception as error:
        if not out_of_memory(error) or sharded(accelerator):
            raise
        failed = True
    if total(accelerator, failed)[0]:
        raise StepSkipped(f"{OUT_OF_MEMORY}, or a smaller batch_size and mini_batch_size")
    return result


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

    from lora_ppo import ppo

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
    policy: Policy, accelerator: "Accelerator", config: "TrainConfig", trajectories: Sequence[Trajectory]
) -> tuple[Experience, dict[str, float]]:
    """Advantages for the trajectories of this process, and how the episodes of all processes went."""
    import torch

    from lora_ppo import ppo

    known = [t.outcome.verdict != "unknown" and math.isfinite(t.outcome.reward) for t in trajectories]
    if config.algorithm == "grpo":  # a group is whole or left out
        known = [k for group in chunks(known, config.group_size) for k in [all(group)] * len(group)]
    scores = torch.tensor([t.outcome.reward if k else 0.0 for t, k in zip(trajectories, known, strict=True)])
    chosen = [[c and k for c in t.chosen] for t, k in zip(trajectories, known, strict=True)]
    prompts, responses = [t.prompt for t in trajectories], [t.response for t in trajectories]
    batch = collate(prompts, responses, policy.pad_id, policy.device, chosen)
    mask = batch.response_mask
    scores = scores.to(policy.device)
    seen = everywhere(policy, accelerator, lambda: observe(policy, accelerator, config, batch))
    logprobs, ref_logprobs, values, kl, logits, first = seen
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
        equal = (flat.cpu() & torch.tensor(known)).sum().item() // config.group_size
        metrics["equal_groups"] = int(total(accelerator, equal)[0])
        mask = mask & ~flat.unsqueeze(1)
        batch = replace(batch, response_mask=mask)
        advantages, returns = per_answer.unsqueeze(1) * mask, torch.zeros_like(values)
    else:
        metrics["value"] = value / max(tokens, 1)
        rewards = ppo.compute_rewards(scores, logprobs, ref_logprobs, mask, policy.kl_coef)
        advantages, returns = ppo.gae(rewards, values, mask, config.gamma, config.lam)
        if answers >= 8:  # in a small batch whitening erases or flips the reward
            advantages = whiten_jointly(accelerator, advantages, mask)
    return Experience(batch, logprobs, ref_logprobs, values, advantages, returns, first, logits), metrics


def rows_per_pass(config: "TrainConfig", accelerator: "Accelerator") -> int:
    return config.mini_batch_size // accelerator.num_processes


def in_one_pass(config: "TrainConfig", accelerator: "Accelerator", rows: int) -> bool:
    """Whether the update is a single forward and backward pass over all rows, by the policy that sampled them."""
    plain = not (config.lora_dropout or config.gradient_checkpointing or sharded(accelerator))
    return plain and config.ppo_epochs == 1 and rows <= rows_per_pass(config, accelerator)


def observe(policy: Policy, accelerator: "Accelerator", config: "TrainConfig", batch: Batch) -> tuple:
    """logprobs, ref_logprobs, values and the exact KL from the reference, each (B, T); `Experience`'s logits and first.

    From the second minibatch on the policy is no longer the one that sampled: the ratio's denominator is what is kept
    here. In the first update it is the current policy's, and the ratio is 1 up to rounding.
    """
    import torch

    from lora_ppo import ppo

    seen, kept, forward, count = [], [], None, len(batch.input_ids)
    whole = in_one_pass(config, accelerator, count)
    fits = batch.response_mask.numel() * policy.head.weight.shape[0] <= KEPT_LOGITS
    for rows in chunks(range(count), rows_per_pass(config, accelerator)):
        part = batch_rows(batch, rows)
        with torch.set_grad_enabled(whole):
            forward = token_logprobs_and_values(policy, part)
        logprobs, values, logits = (x.detach() for x in forward)
        with torch.no_grad():
            ref_logprobs, _, ref_logits = token_logprobs_and_values(policy, part, adapter=False)
        seen.append((logprobs, ref_logprobs, values, ppo.exact_kl(logits, ref_logits, config.temperature)))
        if fits and config.target_kl:
            kept.append(logits)
    joined = [torch.cat(parts) for parts in zip(*seen, strict=True)]
    return *joined, torch.cat(kept) if kept else None, forward if whole else None


# -------------------------------------------------------------------------------------------------------- the update


def learn(
    policy: Policy, accelerator: "Accelerator", config: "TrainConfig", trajectories: Sequence[Trajectory]
) -> dict[str, Any]:
    """One step on the trajectories of all processes; returns its metrics, the same on each.

    All or nothing, as in the tutor. `outcome` is `taken`, `undone` (beyond the trust region) or `skipped`, with `why`.
    """
    before = policy.snapshot()
    metrics: dict[str, Any] = {}
    try:
        experience, metrics = examine(policy, accelerator, config, trajectories)
        metrics |= update(policy, accelerator, config, experience)
        if config.adaptive_kl:
            policy.kl_coef = adapted(policy, config, metrics)
        metrics["outcome"] = "taken"
        if config.target_kl:
            metrics["step_kl"] = moved(policy, accelerator, config, experience, before)
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


def adapted(policy: Policy, config: "TrainConfig", metrics: dict[str, Any]) -> float:
    from lora_ppo import ppo

    return ppo.adapted_kl_coef(
        policy.kl_coef, metrics["kl"], config.kl_target, config.kl_horizon, answers=metrics["answers"]
    )


def update(
    policy: Policy, accelerator: "Accelerator", config: "TrainConfig", experience: Experience
) -> dict[str, float]:
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
    if config.algorithm == "grpo":
        del metrics["value_loss"]  # there is none
    return {name: value / taken for name, value in metrics.items()}


def gradients(
    policy: Policy, accelerator: "Accelerator", config: "TrainConfig", experience: Experience, tokens: float
) -> dict[str, float]:
    """Leaves in every parameter the gradient of the loss, a mean over the `tokens` response tokens of all processes.

    Returns the loss and its parts.
    """
    import torch

    def passes() -> dict[str, float]:
        sums = dict.fromkeys(LOSSES, 0.0)
        for rows in chunks(range(len(experience.logprobs)), rows_per_pass(config, accelerator)):
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


KEPT_LOGITS = 2**26  # elements: 256 MB in float32
LOSSES = ("loss", "policy_loss", "value_loss", "entropy", "clip_fraction")


def losses(policy: Policy, config: "TrainConfig", piece: Experience) -> dict[str, "Tensor"]:
    """The loss of one forward pass and its parts, each a mean over the piece's response tokens; 0 if it has none."""
    from lora_ppo import ppo

    mask, forward = piece.batch.response_mask, piece.first or token_logprobs_and_values(policy, piece.batch)
    logprobs, values, _ = forward
    if not mask.any():
        nothing = 0.0 * (logprobs.sum() + values.sum())
        return dict.fromkeys(LOSSES, nothing)
    parts = ppo_losses(config, mask, forward, piece.logprobs, piece.values, piece.advantages, piece.returns)
    if config.algorithm == "grpo":
        parts["loss"] = parts["policy_loss"] - config.entropy_coef * parts["entropy"]  # no value head
        if policy.kl_coef:
            # Divergence is priced in the loss, by an estimate that is never negative (Shao et al. 2024, equation 4).
            difference = (piece.ref_logprobs - logprobs).masked_fill(~mask, 0.0)
            parts["loss"] += policy.kl_coef * ppo.masked_mean(difference.exp() - difference - 1.0, mask)
    return parts


def moved(
    policy: Policy, accelerator: "Accelerator", config: "TrainConfig", experience: Experience, before: Snapshot
) -> float:
    """How far the update went: the exact KL(old || new), in nats, mean over the response tokens of all processes.

    Where the old logits were too large to be kept, the old weights come back for a forward pass.
    """
    import torch

    batch = experience.batch

    def logits_before(part: Batch, rows: Sequence[int], after: Snapshot) -> "Tensor":
        if experience.logits is not None:
            return experience.logits[rows]
        policy.restore(before)
        with torch.no_grad():
            _, _, logits = token_logprobs_and_values(policy, part)
        policy.restore(after)
        return logits

    def distance() -> float:
        after, nats = policy.snapshot(), 0.0
        for rows in chunks(range(len(batch.input_ids)), rows_per_pass(config, accelerator)):
            part = batch_rows(batch, rows)
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


def prepare(policy: Policy, config: "TrainConfig") -> None:
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


def align(policy: Policy, accelerator: "Accelerator") -> None:
    """Every process starts from the main one's weights."""
    if accelerator.num_processes > 1:
        import torch.distributed

        for tensor in policy.tensors().values():
            torch.distributed.broadcast(tensor, 0)


# ---------------------------------------------------------------------------------------------------------- sharding


def sharded(accelerator: "Accelerator") -> bool:
    """Whether accelerate was told to shard the model (FSDP)."""
    return accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shard(policy: Policy, accelerator: "Accelerator") -> None:
    """Spreads the base model's layers over the processes, where accelerate was told to; raises ConfigError.

    Adapters, value head and embeddings stay whole on every process: all that training changes is as it is without.
    """
    if not sharded(accelerator):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if policy.config.load_in_4bit == "true":
        raise ConfigError("load_in_4bit=true can't be sharded (FSDP): set load_in_4bit=false")
    decoder, kinds = body(policy), policy.model.get_base_model()._no_split_modules or ()
    layers = [module for module in decoder.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ConfigError(f"model_name={policy.config.model_name} names no layers to shard (FSDP): use multi_gpu.yaml")
    mesh = init_device_mesh(policy.device.type, (accelerator.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=set(policy.parameters.values()))
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()))


def body(policy: Policy):
    """The base model less its head: every forward pass goes through it."""
    return policy.model.get_base_model().get_decoder()


@contextlib.contextmanager
def in_step(policy: Policy, accelerator: "Accelerator") -> Iterator[None]:
    """Lets processes make different numbers of forward passes over sharded layers, which all must gather at once.

    Before each pass a process asks who else makes one; whoever is done makes empty ones until nobody does.
    """
    if not sharded(accelerator):
        yield
        return
    import torch

    def announce(*_: Any) -> None:
        total(accelerator, 1)

    hook = body(policy).register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    token = torch.full((1, 1), policy.pad_id, device=policy.device)
    while total(accelerator, 0)[0]:
        with torch.no_grad():
            policy.model(input_ids=token)
