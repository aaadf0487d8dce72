"""A warm start for shell tasks: fine-tuning on the ground truths of the training entries, by TRL's SFTTrainer.

    python tools/warm_start.py --config configs/os_smollm2.yaml warm_dir=runs/os_warm
    python train.py --config configs/os_smollm2.yaml resume_from=runs/os_warm

A small model does not write the actions of the conversation by itself, and where no episode earns anything nothing is
learned from rewards. So it is shown episodes first: each training entry, its ground truth as the one command, what that
printed in the sandbox, and `Act: finish`. The loss is on the replies alone, on the tokens that training would see. What
is written is a checkpoint at step 0, its value head untouched, which resume_from takes. Held-out entries are not shown.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lora_ppo.adapters import check_empty  # noqa: E402
from lora_ppo.chat import encode_chat, text_ids  # noqa: E402
from lora_ppo.checkpoint import save_checkpoint  # noqa: E402
from lora_ppo.episodes import environment_ids  # noqa: E402
from lora_ppo.loading import load_policy  # noqa: E402
from lora_ppo.policy import Policy  # noqa: E402
from lora_ppo.settings import ConfigError, from_command_line, setting  # noqa: E402
from lora_ppo.step import out_of_memory  # noqa: E402
from lora_ppo.streams import run_program  # noqa: E402
from lora_ppo.terminal import clean, program  # noqa: E402
from tasks.os_interaction import pin, ready, split  # noqa: E402
from tasks.os_interaction.episode import FINISH, ShellEpisode, bash_reply  # noqa: E402
from train import TrainConfig  # noqa: E402


@dataclass
class WarmConfig(TrainConfig):
    """Training's settings, so that one file serves both, and those of the warm start."""

    warm_dir: str = setting("runs/os_warm", "folder of the checkpoint that is written", group="the warm start")
    warm_epochs: int = setting(3, "passes over the training entries")
    warm_learning_rate: float = setting(2e-4, "learning rate of the warm start")
    warm_batch_size: int = setting(8, "entries in one step")


def truthful_replies(commands: str) -> list[str]:
    """What a model would say that does an entry's ground truth, then finishes."""
    return [bash_reply(commands.strip()), FINISH]


def conversation(policy: Policy, episode: ShellEpisode) -> dict[str, list[int]]:
    """The tokens of an episode that goes right, and which of them the model is to write.

    Raises ValueError, saying why, where it does not go as a model's would.
    """
    if episode.entry.files:
        raise ValueError("its truth is a file that no model can see")
    ids = encode_chat(policy.tokenizer, episode.reset())
    truth, finish = truthful_replies(episode.entry.truth)
    said = episode.step(truth)
    if said is None:
        raise ValueError(episode.broken or f"it ended with its truth: {episode.note or episode.reason}")
    episode.step(finish)
    outcome = episode.outcome()
    if outcome.verdict != "correct":
        raise ValueError(outcome.why)
    chosen = [0] * len(ids)
    for reply, between in ((truth, environment_ids(policy, said, ended=True)), (finish, [])):
        own = [*text_ids(policy.tokenizer, reply), policy.end_id]
        ids, chosen = ids + own + between, chosen + [1] * len(own) + [0] * len(between)
    if len(ids) > policy.context:
        raise ValueError(f"it takes {len(ids)} tokens, and the context has {policy.context}")
    return {"input_ids": ids, "completion_mask": chosen}


def conversations(
    policy: Policy, episodes: Sequence[ShellEpisode], notice: Callable[[str], None]
) -> list[dict[str, list[int]]]:
    """The tokens of the episodes that go right; the others are named. Raises ConfigError where none does."""
    rows = []
    for episode in episodes:
        try:
            rows.append(conversation(policy, episode))
        except ValueError as error:
            notice(f"left out: {episode.entry.name}: {error}")
        finally:
            episode.close()
    if not rows:
        raise ConfigError("entries: no ground truth can be shown to the model (left out, above): set other entries")
    return rows


def fine_tune(policy: Policy, rows: list[dict[str, list[int]]], config: WarmConfig) -> list[float]:
    """Trains the adapters on the rows; returns each epoch's mean loss, in nats a token."""
    import tempfile

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            num_train_epochs=config.warm_epochs,
            per_device_train_batch_size=config.warm_batch_size,
            learning_rate=config.warm_learning_rate,
            warmup_steps=2,
            completion_only_loss=True,
            max_length=None,
            bf16=False,
            gradient_checkpointing=config.gradient_checkpointing,
            seed=config.seed,
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            use_cpu=str(policy.device) == "cpu",
        )
        trainer = SFTTrainer(
            policy.model, arguments, train_dataset=Dataset.from_list(rows), processing_class=policy.tokenizer
        )
        trainer.train()
        policy.model.eval()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def warm_start(config: WarmConfig, notice: Callable[[str], None]) -> None:
    """Loads the model, fine-tunes it and writes the checkpoint. Raises ConfigError."""
    folder = Path(config.warm_dir)
    for name in ("warm_epochs", "warm_batch_size"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}={getattr(config, name)} is out of range: expected at least 1")
    if not 0 < config.warm_learning_rate <= 1:
        raise ConfigError(
            f"warm_learning_rate={config.warm_learning_rate:g} is out of range: expected above 0, at most 1"
        )
    check_empty(folder, "warm_dir")
    if config.task != "os_interaction":
        raise ConfigError(f"task={config.task} has no ground truths to start from: expected os_interaction")
    try:
        import datasets  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        needed = "pip install trl==1.16.0 datasets==5.2.0"
        raise ConfigError(f"a warm start needs a package ({error}): {needed}") from None
    entries, make, rules = ready(config)
    pin(config, entries)
    train = split(entries, config.test_share, config.entry_levels)["train"]
    policy, config = load_policy(config, notice)
    rules = replace(rules, record=None)
    rows = conversations(policy, [ShellEpisode(entry, make, rules) for entry in train], notice)
    notice(f"{len(rows)} episodes, {sum(map(len, (row['input_ids'] for row in rows))) / len(rows):.0f} tokens each")
    losses = fine_tune(policy, rows, config)
    state: dict[str, Any] = {"epoch": 0, "data_cursor": 0, "rng": {"seed": config.seed, "step": 0}, "log_offset": 0}
    save_checkpoint(folder, policy, state, f"Fine-tuned on {len(rows)} ground truths; loss {losses[-1]:.3f}.")
    told = ", ".join(f"{loss:.3f}" for loss in losses)
    notice(f"loss by epoch: {told}; wrote {folder}: train on with resume_from={folder}")


USAGE = """usage: python tools/warm_start.py [--config FILE] [name=value ...]

Fine-tunes adapters on the ground truths of shell tasks, for training to go on from.
"""


@program
def main() -> int:
    """The program. Exit status: 0; 2 for bad settings or data; 130 after Ctrl-C."""
    config = from_command_line(WarmConfig, USAGE)
    try:
        warm_start(config, lambda text: print(clean(text), file=sys.stderr, flush=True))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ConfigError(f"memory ran out: lower warm_batch_size={config.warm_batch_size}") from None
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
