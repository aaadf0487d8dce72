"""One PPO update on sampled answers."""

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_ppo.forward import Batch, token_logprobs_and_values
from lora_ppo.policy import Policy, Snapshot, gradient_dropout
from lora_ppo.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor


OUT_OF_MEMORY = "out of memory: try a smaller max_new_tokens, a smaller lora_r, load_in_4bit=true or bf16_copy=false"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or, in torch's various words, on a CPU."""
    import torch

    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


class StepSkipped(Exception):
    """A PPO step that could not be taken; the weights are as they were."""


def ppo_step(policy: Policy, batch: Batch, scores: Sequence[float], before: Snapshot | None = None) -> dict[str, float]:
    """One PPO update on B sampled answers with their `scores`; returns the metrics of the log.

    All or nothing: a reward or loss that is not finite, memory that runs out, or an interruption leaves weights and
    optimizer as they were (StepSkipped, or whatever was raised). A step that moves the policy further than `target_kl`
    is taken back, and `undone` in the metrics says so; it still counts as a step. `before`: a snapshot of the policy
    as it is, if the caller has one.
    """
    if not all(map(math.isfinite, scores)):
        raise StepSkipped(f"the reward is not finite ({', '.join(map(str, scores))})")
    try:
        before = before or policy.snapshot()
        look = look_at(policy, batch)
        return finish_update(policy, look, begin_update(policy, look, scores), before)
    except BaseException as error:
        if before:
            policy.restore(before)
        if out_of_memory(error):
            raise StepSkipped(OUT_OF_MEMORY) from error
        raise


@dataclass(frozen=True)
class Look:
    """What reference and policy say of sampled answers, before any score is known."""

    batch: Batch
    ref_logprobs: "Tensor"  # (B, T)
    old: tuple["Tensor", "Tensor", "Tensor"]  # logprobs (B, T), values (B, T), logits (B, T, V) of the policy as it is
    first: tuple["Tensor", "Tensor", "Tensor"]  # the same from the first epoch's forward pass, with its graph
    kl: "Tensor"  # exact, from the reference, in nats an answer


@dataclass(frozen=True)
class Update:
    """The first epoch of an update: what the scores make of the answers, and the gradient, which is not applied yet."""

    scores: "Tensor"  # (B,)
    advantages: "Tensor"  # (B, T)
    returns: "Tensor"  # (B, T)
    metrics: dict[str, "Tensor"]
    gradients: list["Tensor"]


def look_at(policy: Policy, batch: Batch) -> Look:
    """The passes of an update that need no score: the reference's, and the policy's with its graph."""
    import torch

    from lora_ppo import ppo

    with torch.no_grad():
        ref_logprobs, _, ref_logits = token_logprobs_and_values(policy, batch, adapter=False)
        # With one epoch on a fresh sample the old policy is the current one: the gradient pass below yields its
        # logprobs, the ratio is exactly 1, and the clip does nothing. Dropout would make the two differ.
        old = token_logprobs_and_values(policy, batch) if policy.config.lora_dropout else None
    with gradient_dropout(policy):
        first = token_logprobs_and_values(policy, batch)
    old = old or tuple(x.detach() for x in first)
    kl = ppo.exact_kl(old[2], ref_logits, policy.config.temperature)
    return Look(batch, ref_logprobs, old, first, kl.masked_fill(~batch.response_mask, 0.0).sum(-1).mean())


def begin_update(policy: Policy, look: Look, scores: Sequence[float], keep_graph: bool = False) -> Update:
    """Advantages, and the gradient of the first epoch. `keep_graph`: other scores are to come. Raises StepSkipped."""
    import torch

    from lora_ppo import ppo

    config, mask, (old_logprobs, old_values, _) = policy.config, look.batch.response_mask, look.old
    scores = torch.tensor(scores, dtype=torch.float32, device=policy.device)
    rewards = ppo.compute_rewards(scores, old_logprobs, look.ref_logprobs, mask, policy.kl_coef)
    advantages, returns = ppo.gae(rewards, old_values, mask, config.gamma, config.lam)
    if len(scores) >= 8:  # in a small batch whitening erases or flips the reward
        advantages = ppo.whiten(advantages, mask)
    metrics, gradients = ppo_gradient(policy, look, look.first, advantages, returns, keep_graph)
    return Update(scores, advantages, returns, metrics, gradients)


def ppo_losses(
    config: Settings,
    mask: "Tensor",
    forward: tuple["Tensor", "Tensor", "Tensor"],
    old_logprobs: "Tensor",
    old_values: "Tensor",
    advantages: "Tensor",
    returns: "Tensor",
) -> dict[str, "Tensor"]:
    """PPO's loss of a forward pass and its parts, each a mean over the response tokens (`mask`); all else is (B, T)."""
    from lora_ppo import ppo

    logprobs, values, logits = forward
    pg_loss, clip_fraction = ppo.policy_loss(logprobs, old_logprobs, advantages, mask, config.cliprange)
    vf_loss, _ = ppo.value_loss(values, old_values, returns, mask, config.cliprange_value)
    mean_entropy = ppo.entropy(logits if config.entropy_coef else logits.detach(), mask, config.temperature)
    loss = pg_loss + config.vf_coef * vf_loss - config.entropy_coef * mean_entropy
    parts = {"loss": loss, "policy_loss": pg_loss, "value_loss": vf_loss, "entropy": mean_entropy}
    return parts | {"clip_fraction": clip_fraction}


def ppo_gradient(
    policy: Policy,
    look: Look,
    forward: tuple["Tensor", "Tensor", "Tensor"],
    advantages: "Tensor",
    returns: "Tensor",
    keep_graph: bool = False,
) -> tuple[dict[str, "Tensor"], list["Tensor"]]:
    """Metrics and clipped gradient of the PPO loss of one forward pass. Raises StepSkipped if they are not finite."""
    import torch

    config, mask, (old_logprobs, old_values, _) = policy.config, look.batch.response_mask, look.old
    parts = ppo_losses(config, mask, forward, old_logprobs, old_values, advantages, returns)
    loss = parts["loss"]
    policy.optimizer.zero_grad()
    loss.backward(retain_graph=keep_graph)
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters.values(), config.max_grad_norm)
    if not (torch.isfinite(loss) and torch.isfinite(grad_norm)):
        raise StepSkipped(f"the loss is not finite (loss {loss.item()}, gradient norm {grad_norm.item()})")
    metrics = parts | {"grad_norm": grad_norm}
    gradients = [p.grad for p in policy.parameters.values()]
    policy.optimizer.zero_grad()
    return {name: value.detach() for name, value in metrics.items()}, gradients


def finish_update(policy: Policy, look: Look, update: Update, before: Snapshot) -> dict[str, float]:
    """Takes the optimizer's steps, looks how far they went, and takes them back where that is beyond `target_kl`."""
    from lora_ppo import ppo

    config, mask, (old_logprobs, old_values, old_logits) = policy.config, look.batch.response_mask, look.old
    metrics, gradients = update.metrics, update.gradients
    for epoch in range(config.ppo_epochs):
        if epoch:
            with gradient_dropout(policy):
                forward = token_logprobs_and_values(policy, look.batch)
            metrics, gradients = ppo_gradient(policy, look, forward, update.advantages, update.returns)
        for parameter, gradient in zip(policy.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        policy.optimizer.step()
        policy.optimizer.zero_grad()
    kl_coef, kl = policy.kl_coef, look.kl.item()
    if config.adaptive_kl:
        policy.kl_coef = ppo.adapted_kl_coef(kl_coef, kl, config.kl_target, config.kl_horizon, len(update.scores))
    estimate = (old_logprobs - look.ref_logprobs).masked_fill(~mask, 0.0).sum(-1).mean()
    metrics = {"reward": update.scores.mean(), **metrics, "kl_estimate": estimate}
    metrics["value"] = ppo.masked_mean(old_values, mask)
    result = {name: value.item() for name, value in metrics.items()} | {"kl": kl, "kl_coef": kl_coef}
    result |= trust_region(policy, look.batch, old_logits, old_logprobs.masked_fill(~mask, 0.0).sum().item())
    if not result["step_kl"] <= (config.target_kl or math.inf):  # NaN included
        policy.restore(before)
        result["undone"] = True
    policy.step += 1
    return result


def trust_region(policy: Policy, batch: Batch, old_logits: "Tensor", old_logprob_sum: float) -> dict[str, float]:
    """How far an update went: `step_kl`, the exact KL(old || new) in nats per response token, and `likelihood_ratio`,
    how many times as likely the sampled answers are now."""
    import torch

    from lora_ppo import ppo

    with torch.no_grad():
        logprobs, _, logits = token_logprobs_and_values(policy, batch)
    kl = ppo.exact_kl(old_logits, logits, policy.config.temperature)
    step_kl = ppo.masked_mean(kl, batch.response_mask).item()
    logprob_sum = logprobs.masked_fill(~batch.response_mask, 0.0).sum().item()
    return {"step_kl": step_kl, "likelihood_ratio": math.exp(min(logprob_sum - old_logprob_sum, 700.0))}


class Foresight:
    """Both outcomes of a turn, computed while the person reads the quiz: their key only picks one.

    Reference and policy look at the answer once; then each reward has its own gradient, step and check, one after the
    other in a thread. The policy is nobody else's until `take` or `discard`, which leave it as the plain step would,
    bit for bit, or as it was.
    """

    REWARDS = (1.0, -1.0)

    def __init__(self, policy: Policy, batch: Batch, earlier: Sequence[float] = ()):
        self.policy, self.batch, self.earlier = policy, batch, earlier
        self.before = policy.snapshot()
        self.outcomes: dict[float, tuple[dict[str, float], Snapshot]] = {}
        self.seconds: dict[float, float] = {}  # that an outcome took to compute, or would have alone
        self.wanted = set(self.REWARDS)
        self.thread = threading.Thread(target=self.work, name="foresight", daemon=True)
        self.thread.start()

    def scores(self, reward: float) -> list[float]:
        """The rewards of the batch, its last answer's being `reward`."""
        return [*self.earlier, reward]

    def work(self) -> None:
        try:
            started = time.perf_counter()
            look = look_at(self.policy, self.batch)
            looked = time.perf_counter() - started
            rewards = [reward for reward in self.REWARDS if reward in self.wanted]
            updates = [begin_update(self.policy, look, self.scores(reward), keep_graph=True) for reward in rewards]
            begun = (time.perf_counter() - started - looked) / max(len(rewards), 1)
            for reward, update in zip(rewards, updates, strict=True):
                if reward in self.wanted:
                    started = time.perf_counter()
                    metrics = finish_update(self.policy, look, update, self.before)
                    self.seconds[reward] = looked + begun + time.perf_counter() - started
                    self.outcomes[reward] = metrics, self.policy.snapshot()
                    self.policy.restore(self.before)
        except Exception:  # `take` takes the plain step, which meets the same trouble and knows what to say
            self.policy.restore(self.before)

    def wait(self) -> None:
        """Until both outcomes are there."""
        self.thread.join()

    def take(self, reward: float) -> dict[str, float]:
        """Makes the outcome of `reward` the policy's state; returns its metrics. Raises what `ppo_step` raises."""
        self.wanted = {reward}
        self.wait()
        if reward not in self.outcomes:
            return ppo_step(self.policy, self.batch, self.scores(reward), self.before)
        metrics, after = self.outcomes[reward]
        self.policy.restore(after)
        return metrics

    def discard(self) -> None:
        """Leaves the policy as it was."""
        self.wanted = set()
        self.wait()
        self.policy.restore(self.before)
