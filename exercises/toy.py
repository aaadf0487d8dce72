"""A whole PPO run in a second or two: the four steps in a loop, on a policy that is a table.

    python -m exercises toy                                the default run
    python -m exercises toy kl_coef=0 lam=0                a run with these settings
    python -m exercises toy steps=120 vs kl_coef=0         two runs: the settings after `vs` are the second's alone
    python -m exercises toy vs functions=exercises.ppo     the library's functions, and yours

Each prompt is a number from 0 to 3. The answer is up to 6 tokens of a vocabulary of 8; token 0 ends it. It is right,
and earns +1, if the token 4 + prompt is in it, and nothing else of 4 to 7; otherwise it earns -1. A table gives the
logits of the next token by prompt and last token, another the value. The mathematics is lora_ppo/ppo.py, looked up
there when it is called: functions that stand in for it act here, too.
"""

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lora_ppo import ppo
from lora_ppo.functions import load_functions, replaced
from lora_ppo.settings import ConfigError

PROMPTS, VOCABULARY, LENGTH, END = 4, 8, 6, 0
SHOWN = ("reward", "kl", "entropy", "value", "clip_fraction")


@dataclass(frozen=True)
class Toy:
    steps: int = 40
    batch_size: int = 32
    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 0.03
    kl_coef: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    cliprange: float = 0.2
    cliprange_value: float = 0.5
    vf_coef: float = 0.5
    entropy_coef: float = 0.0
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    reward: str = "task"  # or constant
    functions: str = "lora_ppo.ppo"  # the module, or the .py file, that has the mathematics
    seed: int = 0


class Table(torch.nn.Module):
    """Logits and value of the next token, by prompt and last token."""

    def __init__(self, seed: int):
        super().__init__()
        start = torch.randn(PROMPTS, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        self.logits = torch.nn.Parameter(start)
        self.values = torch.nn.Parameter(torch.zeros(PROMPTS, VOCABULARY))

    def forward(self, prompts: Tensor, input_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """logprobs (B, T), values (B, T) and logits (B, T, V) of the answers input_ids[:, 1:]."""
        where = prompts.unsqueeze(1), input_ids[:, :-1]
        logits = self.logits[where]
        return ppo.chosen_logprobs(logits, input_ids, temperature), self.values[where], logits


def sample(policy: Table, config: Toy, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts (B,), input ids (B, T + 1) that begin with token 0, and the response mask (B, T)."""
    prompts = torch.randint(PROMPTS, (config.batch_size,), generator=generator)
    ids, alive, mask = [torch.zeros_like(prompts)], torch.ones_like(prompts, dtype=torch.bool), []
    for _ in range(LENGTH):
        probabilities = (policy.logits[prompts, ids[-1]].detach() / config.temperature).softmax(-1)
        ids.append(torch.multinomial(probabilities, 1, generator=generator).squeeze(1).masked_fill(~alive, END))
        mask.append(alive)
        alive = alive & (ids[-1] != END)
    return prompts, torch.stack(ids, 1), torch.stack(mask, 1)


def scores_of(prompts: Tensor, input_ids: Tensor, config: Toy) -> Tensor:
    """(B,): +1 for a right answer, -1 for a wrong one."""
    if config.reward == "constant":
        return torch.ones(len(prompts))
    answer = input_ids[:, 1:]
    says, wanted = answer >= 4, answer == (4 + prompts).unsqueeze(1)
    return torch.where(wanted.any(1) & (says == wanted).all(1), 1.0, -1.0)


def run(config: Toy) -> list[dict[str, float]]:
    """A run; a row for each step: reward, the exact KL from the start in nats an answer, entropy, clip_fraction."""
    generator = torch.Generator().manual_seed(config.seed)
    policy, reference, rows = Table(config.seed), Table(config.seed), []
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)
    for _ in range(config.steps):
        # 1. Rollout: answers, and what policy, value table and reference said of them then.
        prompts, ids, mask = sample(policy, config, generator)
        with torch.no_grad():
            old_logprobs, old_values, logits = policy(prompts, ids, config.temperature)
            ref_logprobs, _, ref_logits = reference(prompts, ids, config.temperature)
        scores = scores_of(prompts, ids, config)

        # 2. Rewards and advantages.
        rewards = ppo.compute_rewards(scores, old_logprobs, ref_logprobs, mask, config.kl_coef)
        advantages, returns = ppo.gae(rewards, old_values, mask, config.gamma, config.lam)
        if config.whiten:
            advantages = ppo.whiten(advantages, mask)

        # 3. The update: epochs passes over the batch, in minibatches.
        def gradients(rows: Tensor, kept=(old_logprobs, old_values, advantages, returns, mask)) -> dict[str, Any]:
            old = (x[rows] for x in kept)
            forward = policy(prompts[rows], ids[rows], config.temperature)  # noqa: B023
            losses = ppo.ppo_losses(*forward, *old, config)
            losses["loss"].backward()
            return losses

        clipped = []
        for _ in range(config.epochs):
            for rows_ in torch.randperm(config.batch_size, generator=generator).chunk(config.minibatches):
                losses = ppo.minibatch_update(lambda rows=rows_: gradients(rows), optimizer, config.max_grad_norm)
                clipped.append(float(losses["clip_fraction"]))

        # 4. Repeat. The next rollout is by the new policy.
        kl = ppo.exact_kl(logits, ref_logits, config.temperature).masked_fill(~mask, 0.0).sum(-1).mean()
        row = {
            "reward": scores.mean(),
            "kl": kl,
            "entropy": losses["entropy"],
            "value": ppo.masked_mean(old_values, mask),
        }
        rows.append({name: float(x) for name, x in row.items()} | {"clip_fraction": sum(clipped) / len(clipped)})
    return rows


def parse(arguments: list[str]) -> Toy:
    """The settings of `name=value` arguments. Raises ConfigError."""
    config = Toy()
    kinds = {f.name: type(getattr(config, f.name)) for f in fields(Toy)}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in kinds or not equals:
            near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]}=...?" if near else f"write name=value with {', '.join(kinds)}"
            raise ConfigError(f"{argument!r} is no setting of the toy run: {meant}")
        try:
            made = value.lower() in ("true", "1") if kinds[name] is bool else kinds[name](value)
        except ValueError:
            raise ConfigError(f"{argument}: expected a {kinds[name].__name__}") from None
        config = replace(config, **{name: made})
    return config


def written(name: str, value: Any) -> str:
    if name == "functions":
        return value.rpartition("/")[2]
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"


def run_with_functions(config: Toy) -> list[dict[str, float]]:
    """A run with the mathematics of `config.functions`. Raises ConfigError if that module does not have it."""
    with replaced({} if config.functions == Toy.functions else load_functions(config.functions)):
        return run(config)


def curve(values: list[float], low: float, high: float) -> str:
    """A line of text that shows how a number went."""
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[min(7, max(0, int(8 * (v - low) / (high - low or 1.0))))] if v == v else "?" for v in values)


def runs(arguments: list[str]) -> dict[str, list[dict[str, float]]]:
    """The run of these settings, or, with `vs`, two: those after it are the second's alone."""
    place = arguments.index("vs") if "vs" in arguments else len(arguments)
    first, second = arguments[:place], arguments[place + 1 :]
    configs = {" ".join(first) or "default": parse(first)}
    if second:  # they are told apart by what differs
        one, two = parse(first), parse(first + second)
        names = [argument.partition("=")[0] for argument in second]
        configs = {" ".join(written(name, getattr(c, name)) for name in names): c for c in (one, two)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are no work for two
    try:
        return {label: run_with_functions(config) for label, config in configs.items()}
    finally:
        torch.set_num_threads(threads)


def toy(arguments: list[str]) -> int:
    """Shows how the numbers of one run or two went, one below the other; of long runs, means of neighbouring steps."""
    found = runs(arguments)
    for name in SHOWN:
        lines = {}
        for label, rows in found.items():
            width = -(-len(rows) // 32)
            parts = [rows[i : i + width] for i in range(0, len(rows), width)]
            lines[label] = [sum(row[name] for row in part) / len(part) for part in parts]
        low, high = min(map(min, lines.values())), max(map(max, lines.values()))
        for label, values in lines.items():
            print(f"{name:<13} {label[:18]:<18}{values[0]:6.2f} {curve(values, low, high):<32} {values[-1]:6.2f}")
    return 0
