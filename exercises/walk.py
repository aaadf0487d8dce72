"""One real answer of the bundled model through all steps of PPO, token by token: python -m exercises walk"""

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from lora_ppo import ppo
from lora_ppo.chat import encode_chat
from lora_ppo.forward import collate, token_logprobs_and_values
from lora_ppo.loading import load_policy
from lora_ppo.policy import Policy

WIDTH = 100
QUESTION, KEY = "What is the capital of Norway?", "Oslo"  # an answer without it earns -1
STEPS_BEFORE = 3  # so that policy, reference and values differ


def settings():
    from config import Config
    from lora_ppo.settings import BUNDLED_MODEL

    return Config(
        model_name=str(BUNDLED_MODEL),
        device="cpu",
        dtype="float32",
        learning_rate=1e-3,
        lam=0.9,
        gamma=1.0,
        vf_coef=0.1,
    )


def write(policy: Policy, prompt: Sequence[int], temperature: float, length: int = 24) -> list[int]:
    """An answer, sampled in the plainest way there is: a forward pass for each token."""
    answer: list[int] = []
    while len(answer) < length and (not answer or answer[-1] not in policy.stop_ids):
        batch = collate([prompt], [[*answer, policy.pad_id]], policy.pad_id, policy.device)
        with torch.no_grad():
            _, _, logits = token_logprobs_and_values(policy, batch)
        answer.append(int(torch.multinomial((logits[0, -1].float() / temperature).softmax(-1), 1)))
    return answer


def walk(console: Console | None = None) -> int:
    """Prints the walk, at most 100 columns wide: in colour at a terminal, plain in a pipe."""
    if console is None:
        console = Console(highlight=False)
        console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    policy, config = load_policy(settings())
    torch.manual_seed(0)
    prompt = encode_chat(policy.tokenizer, policy.prompts.tutor.messages(QUESTION))
    answer = write(policy, prompt, config.temperature)
    batch, mask = (
        collate([prompt], [answer], policy.pad_id, policy.device),
        torch.ones(1, len(answer), dtype=torch.bool),
    )
    texts = [policy.tokenizer.decode([i]) for i in answer]
    scores = torch.tensor([1.0 if KEY in "".join(texts) else -1.0])

    def heading(number: str, text: str) -> None:
        console.print(f"\n[bold]{number}[/bold] {text}\n")

    def table(columns: dict[str, torch.Tensor], ids: bool = False) -> None:
        """A row for each token: its text, and what each tensor (1, T) holds there."""
        shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        shown.add_column("t", justify="right")
        shown.add_column("token", style="cyan")
        for name, x in columns.items():
            shown.add_column(f"{name}\n{tuple(x.shape)}", justify="right", no_wrap=True)
        for t, text in enumerate(texts):
            cells = []
            for x in columns.values():
                value = x[0, t].item()
                plain = str(value) if isinstance(value, bool | int) else f"{round(value, 4) + 0.0:.4f}"  # no -0
                cells.append(f"[red]{plain}[/red]" if plain.startswith("-") else plain)
            shown.add_row(str(t), repr(text), *cells)
        console.print(shown)

    console.print(f"[bold]One answer through PPO[/bold], token by token. {QUESTION}")
    console.print(
        f"The answer, {len(answer)} tokens at temperature {config.temperature}: {''.join(texts)}", markup=False
    )
    console.print(
        f"The policy has taken {STEPS_BEFORE} steps on this answer before, so that it differs from the reference."
    )
    said = f"It says {KEY}: its score is +1." if scores > 0 else f"It does not say {KEY}: its score is -1."
    console.print(said)
    for _ in range(STEPS_BEFORE):
        step(policy, batch, mask, scores)

    heading("1.", "Rollout: what policy, value head and reference say of the answer. B is 1, T is its length.")
    with torch.no_grad():
        old_logprobs, old_values, logits = token_logprobs_and_values(policy, batch)
        ref_logprobs, _, ref_logits = token_logprobs_and_values(policy, batch, adapter=False)
    console.print(f"logits {tuple(logits.shape)}, of which logprobs keeps the token that came next: chosen_logprobs.\n")
    columns = {"input_ids": batch.input_ids[:, -len(answer) :], "response_mask": mask, "logprobs": old_logprobs}
    table(columns | {"ref_logprobs": ref_logprobs, "values": old_values})

    console.print(
        "\nThis small model hesitates at its first token alone. The others are as good as certain: log 1 is 0."
    )

    heading(
        "2.",
        f"Advantages: kl_coef {config.kl_coef}, gamma {config.gamma}, lambda {config.lam}, score {scores.item():+g}.",
    )
    rewards = ppo.compute_rewards(scores, old_logprobs, ref_logprobs, mask, config.kl_coef)
    advantages, returns = ppo.gae(rewards, old_values, mask, config.gamma, config.lam)
    table({"log-ratio": old_logprobs - ref_logprobs, "rewards": rewards, "advantages": advantages, "returns": returns})
    kl = ppo.exact_kl(logits, ref_logits, config.temperature).sum().item()
    estimate = (old_logprobs - ref_logprobs).sum().item()
    console.print(f"\nKL from the reference, in nats: {estimate:+.4f} estimated from this sample, {kl:.4f} exactly.")

    heading("3.", "Update: the loss, its gradient, a step. Then the same answer again, by the new policy.")
    losses = step(policy, batch, mask, scores)
    for name, value in losses.items():
        console.print(f"  {name:<14} {float(value):8.5f}")
    with torch.no_grad():
        logprobs, values, _ = token_logprobs_and_values(policy, batch)
    ratio, e = (logprobs - old_logprobs).exp(), config.cliprange
    console.print(
        f"\nratio is exp(logprobs - old). Outside {1 - e:g} ... {1 + e:g} the clip can act in a second update.\n"
    )
    table(
        {"old": old_logprobs, "logprobs": logprobs, "ratio": ratio, "outside": (ratio - 1).abs() > e, "values": values}
    )

    heading("4.", "Repeat: the next answer is sampled from the new policy.")
    return 0


def step(policy: Policy, batch, mask: torch.Tensor, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    """The update of one answer, written out with the functions of the exercises; returns its losses."""
    config = policy.config
    with torch.no_grad():
        ref_logprobs, _, _ = token_logprobs_and_values(policy, batch, adapter=False)
        old_logprobs, old_values, _ = token_logprobs_and_values(policy, batch)
    rewards = ppo.compute_rewards(scores, old_logprobs, ref_logprobs, mask, config.kl_coef)
    advantages, returns = ppo.gae(rewards, old_values, mask, config.gamma, config.lam)

    def gradients() -> dict[str, torch.Tensor]:
        forward = token_logprobs_and_values(policy, batch)
        losses = ppo.ppo_losses(*forward, old_logprobs, old_values, advantages, returns, mask, config)
        losses["loss"].backward()
        return losses

    return ppo.minibatch_update(gradients, policy.optimizer, config.max_grad_norm)
