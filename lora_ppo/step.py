"""One PPO update on sampled answers: `ppo_step`, from top to bottom, and `Foresight`, which takes it ahead of time.

Read it beside ppo.py, which holds the equations. The papers: PPO, Schulman et al. 2017
(https://arxiv.org/abs/1707.06347); advantages, Schulman et al. 2016 (https://arxiv.org/abs/1506.02438); the KL penalty
in the reward, Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593). Mathematics is batch-first: the tutor's step is
the case of one answer. Batches in minibatches, GRPO and several processes are training.py's.

Shapes: B samples, T response tokens, V vocabulary. `response_mask` (B, T) is True exactly where the policy chose the
token, its end-of-sequence token included.
"""

import math
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_ppo.forward import Batch, token_logprobs_and_values
from lora_ppo.policy import Policy, Snapshot, gradient_dropout

if TYPE_CHECKING:
    from torch import Tensor

OUT_OF_MEMORY = "out of memory: try a smaller max_new_tokens, a smaller lora_r, load_in_4bit=true or bf16_copy=false"


class StepSkipped(Exception):
    """A step that could not be taken; the weights are as they were."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or, in torch's various words, on a CPU."""
    import torch

    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def ppo_step(policy: Policy, batch: Batch, scores: Sequence[float], before: Snapshot | None = None) -> dict[str, Any]:
    """One PPO update on B sampled answers with their `scores`; returns the metrics of the log.

    All or nothing. Beyond the trust region it is taken back, and `undone` in the metrics says so; it still counts as a
    step. A reward or loss that is not finite, memory that runs out, or an interruption leaves weights and optimizer as
    they were: StepSkipped, or whatever was raised. `before` is a snapshot of the policy as it is, if there is one.
    """
    import torch

    from lora_ppo import ppo

    config, mask = policy.config, batch.response_mask  # (B, T)
    if not all(map(math.isfinite, scores)):
        raise StepSkipped(f"the reward is not finite ({', '.join(map(str, scores))})")
    try:
        before = before or policy.snapshot()

        # 1. What the reference policy says of the answers. It is the same model with its adapters off.
        with torch.no_grad():
            ref_logprobs, _, ref_logits = token_logprobs_and_values(policy, batch, adapter=False)  # (B, T), (B, T, V)

        # 2. What the policy says of them. It is the one that sampled them, so the pass that step 5 takes the gradient
        #    of yields the old log-probabilities, too: the first ratio is exactly 1. Dropout would make the two differ.
        with torch.no_grad():
            old = token_logprobs_and_values(policy, batch) if config.lora_dropout else None
        with gradient_dropout(policy):
            forward = token_logprobs_and_values(policy, batch)
        old_logprobs, old_values, old_logits = old or tuple(x.detach() for x in forward)

        # 3. Rewards (B, T): at each token kl_coef times the log-ratio to the reference is paid; the score comes at the
        #    last token (Ziegler et al. 2019, eq. 2).
        scores = torch.tensor(scores, dtype=torch.float32, device=policy.device)  # (B,)
        rewards = ppo.compute_rewards(scores, old_logprobs, ref_logprobs, mask, policy.kl_coef)

        # 4. Advantages and returns (B, T): GAE (Schulman et al. 2016, eq. 16). Whitening needs company: among few
        #    answers it would erase or flip the reward.
        advantages, returns = ppo.gae(rewards, old_values, mask, config.gamma, config.lam)
        if len(scores) >= 8:
            advantages = ppo.whiten(advantages, mask)

        # 5. ppo_epochs times: the loss (Schulman et al. 2017, eq. 7 and 9), its gradient, a step of AdamW.
        def gradients() -> "dict[str, Tensor]":
            nonlocal forward
            if forward is None:  # the weights have moved: a new pass, a new ratio
                with gradient_dropout(policy):
                    forward = token_logprobs_and_values(policy, batch)
            parts = ppo.ppo_losses(*forward, old_logprobs, old_values, advantages, returns, mask, config)
            parts["loss"].backward()
            forward = None  # the graph: step 7 needs the memory
            return parts

        for _ in range(config.ppo_epochs):
            parts = ppo.minibatch_update(gradients, policy.optimizer, config.max_grad_norm)
            if not (torch.isfinite(parts["loss"]) and torch.isfinite(parts["grad_norm"])):
                loss, norm = parts["loss"].item(), parts["grad_norm"].item()
                raise StepSkipped(f"the loss is not finite (loss {loss}, gradient norm {norm})")
        policy.optimizer.zero_grad()
        metrics = {"reward": scores.mean().item()} | {name: value.item() for name, value in parts.items()}

        # 6. How far the policy is from the reference, in nats an answer: estimated from the sample, as the rewards have
        #    it, and exactly, summed over the vocabulary. The price of it may follow (Ziegler et al. 2019, section 2.2).
        metrics["kl_estimate"] = (old_logprobs - ref_logprobs).masked_fill(~mask, 0.0).sum(-1).mean().item()
        metrics["value"] = ppo.masked_mean(old_values, mask).item()
        kl = ppo.exact_kl(old_logits, ref_logits, config.temperature).masked_fill(~mask, 0.0)
        metrics |= {"kl": kl.sum(-1).mean().item(), "kl_coef": policy.kl_coef}
        if config.adaptive_kl:
            policy.kl_coef = ppo.adapted_kl_coef(
                policy.kl_coef, metrics["kl"], config.kl_target, config.kl_horizon, len(scores)
            )

        # 7. The trust region: how far the step went. What went further than target_kl is taken back.
        metrics |= trust_region(policy, batch, old_logits, old_logprobs.masked_fill(~mask, 0.0).sum().item())
        if not metrics["step_kl"] <= (config.target_kl or math.inf):  # NaN included
            policy.restore(before)
            metrics["undone"] = True
        policy.step += 1
        return metrics
    except BaseException as error:
        if before:
            policy.restore(before)
        if out_of_memory(error):
            raise StepSkipped(OUT_OF_MEMORY) from error
        raise


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
    """Both outcomes of a turn, computed in a thread while the person reads the quiz: their choice only picks one.

    Each is `ppo_step` itself, from the same snapshot. The policy is nobody else's until `take` or `discard`, which
    leave it as the plain step would, bit for bit, or as it was.
    """

    def __init__(
        self, policy: Policy, batch: Batch, earlier: Sequence[float] = (), rewards: Sequence[float] = (1.0, -1.0)
    ):
        self.policy, self.batch, self.earlier, self.rewards = policy, batch, earlier, rewards
        self.before = policy.snapshot()
        self.outcomes: dict[float, tuple[dict[str, Any], Snapshot]] = {}
        self.seconds: dict[float, float] = {}  # that an outcome took to compute
        self.wanted = set(rewards)
        self.thread = threading.Thread(target=self.work, name="foresight", daemon=True)
        self.thread.start()

    def scores(self, reward: float) -> list[float]:
        """The rewards of the batch, its last answer's being `reward`."""
        return [*self.earlier, reward]

    def work(self) -> None:
        try:
            for reward in self.rewards:
                if reward in self.wanted:
                    started = time.perf_counter()
                    metrics = ppo_step(self.policy, self.batch, self.scores(reward), self.before)
                    self.seconds[reward] = time.perf_counter() - started
                    self.outcomes[reward] = metrics, self.policy.snapshot()
                    self.policy.restore(self.before)
        except Exception:  # `take` takes the plain step, which meets the same trouble and knows what to say
            self.policy.restore(self.before)

    def wait(self) -> None:
        """Until both outcomes are there."""
        self.thread.join()

    def take(self, reward: float) -> dict[str, Any]:
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
