"""Trains a reward model on pairs of replies: a LoRA adapter with a scalar head, by TRL's RewardTrainer.

    python tools/train_reward_model.py pairs=data/voice/train.jsonl held_out=data/voice/test.jsonl \
        output_dir=runs/voice/reward model_name=smollm2
    python tools/train_reward_model.py --help

The folder is a plain PEFT adapter of a sequence classifier, its head inside: `tasks/voice.py` puts it beside the policy
on one base. `evaluation.json` has the accuracy on pairs that were held out, by topic, and all scores. RewardTrainer's
loss is that of Bradley and Terry: -log sigmoid(chosen - rejected).
"""

import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora_ppo.chat import Message, encode_chat
from lora_ppo.evaluation import write_json
from lora_ppo.files import utf8_path
from lora_ppo.loading import base_name, load_base, silence_libraries, weight_files
from lora_ppo.policy import Policy
from lora_ppo.prompts import Role, load_prompts
from lora_ppo.rewards import REWARD_FILE, RewardModel, context_of, pad_id, reply_ids
from lora_ppo.settings import BUNDLED_MODEL, DEFAULT_PROMPTS, ConfigError, Settings, from_command_line, parse, setting
from lora_ppo.statistics import wilson_interval
from lora_ppo.step import out_of_memory
from lora_ppo.stored import fingerprint
from lora_ppo.streams import run_program
from lora_ppo.terminal import program
from tasks.pairs import MADE, Pair, apart, harder, read_pairs

AT_ONCE = 32  # of the base's own replies
BINS = 10  # of the margins' histogram
SIDES = ("chosen", "rejected")


@dataclass
class RewardSettings(Settings):
    pairs: str = setting("", "pairs to train on: JSON lines with prompt, chosen, rejected, and topic", "the data")
    held_out: str = setting("", "pairs to measure on; empty: those of a test_share of the topics of `pairs`")
    more_pairs: list[str] = setting(
        [],
        "pairs made of them, to train on, too: mismatched (the worse side is the chosen reply to another prompt), "
        "crossed (it begins as the chosen reply and ends as the rejected one)",
    )
    own_replies: int = setting(
        0, "replies of the base itself to each prompt, as the worse sides of more pairs: what a policy begins with"
    )
    prompts: str = setting("", "YAML file of prompts with the role under which it replies (tutor), as the policy's")
    better_prompts: str = setting(
        "",
        "YAML file with a role under which it replies better: such replies are then the other sides (contrast "
        "distillation, arXiv 2307.12950); empty: the chosen replies are",
    )
    temperature: float = setting(0.7, "sampling temperature of its replies")
    max_new_tokens: int = setting(56, "longest of its replies, in tokens")
    test_share: float = setting(0.2, "share of the topics that are held out; without topics, of the pairs")
    output_dir: str = setting("runs/reward", "where the reward adapter is written")
    model_name: str = setting("auto", "the base, as the policy names it; auto: the bundled model", "the model")
    load_in_4bit: str = setting("auto", "NF4 base weights: auto (on CUDA, from a billion parameters on), true, false")
    device: str = setting("auto", "auto (cuda, then cpu), or a torch device")
    dtype: str = setting("auto", "precision of the base: auto, float32, bfloat16")
    lora_r: int = setting(8, "rank of the adapter")
    lora_alpha: float = setting(16.0, "LoRA scale: updates are multiplied by lora_alpha / lora_r")
    lora_dropout: float = setting(0.05, "LoRA dropout")
    target_modules: list[str] = setting(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "linear layers that get adapters"
    )
    learning_rate: float = setting(3e-4, "AdamW's, down to 0 at the end", "training")
    num_epochs: int = setting(3, "passes over the pairs")
    batch_size: int = setting(8, "pairs of a step")
    center: float = setting(0.01, "weight of the squared sum of both scores: keeps them around 0; 0: off")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    seed: int = setting(0, "seed of the head, of dropout and of the order of pairs")


USAGE = "usage: python tools/train_reward_model.py pairs=FILE output_dir=DIR [name=value ...]"


def load(config: RewardSettings) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on and those held out. Raises ConfigError, before any model is loaded."""
    if not config.pairs:
        raise ConfigError("pairs=FILE is missing: JSON lines with prompt, chosen and rejected")
    if not 0 < config.test_share < 1:
        raise ConfigError(f"test_share={config.test_share:g} is out of range: expected above 0 and below 1")
    for name, least in {"num_epochs": 1, "center": 0, "own_replies": 0, "max_new_tokens": 1}.items():
        if getattr(config, name) < least:
            raise ConfigError(f"{name}={getattr(config, name):g} is out of range: expected at least {least}")
    if not config.temperature > 0:
        raise ConfigError(f"temperature={config.temperature:g} is out of range: expected above 0")
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed={config.seed} is out of range: expected 0 to {2**32 - 1}, for NumPy")
    if unknown := set(config.more_pairs) - set(MADE):
        raise ConfigError(f"more_pairs={','.join(sorted(unknown))} is unknown: expected some of {', '.join(MADE)}")
    for name in ("prompts", "better_prompts"):
        if getattr(config, name) and not config.own_replies:
            raise ConfigError(f"{name} is for replies of the base itself: set own_replies to 1 or more")
    for name in ("prompts", "better_prompts"):
        try:
            load_prompts(*filter(None, [getattr(config, name)]), DEFAULT_PROMPTS)
        except ConfigError as error:
            raise ConfigError(f"{name}={str(error).removeprefix('prompts=')}") from None
    if Path(config.output_dir).exists() and any(Path(config.output_dir).iterdir()):
        raise ConfigError(f"output_dir={config.output_dir} is not empty: name another folder")
    train = read_pairs("pairs", config.pairs)
    if config.held_out:
        held_out = read_pairs("held_out", config.held_out)
    else:
        train, held_out = split(train, config.test_share)
    train += harder(train, config.more_pairs)
    apart(train, held_out)
    return train, held_out


def split(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """Some topics for measuring, always the same; without topics some prompts."""

    def group(pair: Pair) -> str:
        return pair.topic or " ".join(message["content"] for message in pair.messages)

    groups = sorted({group(pair) for pair in pairs})
    random.Random("pairs").shuffle(groups)
    tests = set(groups[: max(1, round(share * len(groups)))])
    if len(tests) == len(groups):
        raise ConfigError(f"pairs holds {len(groups)} topics, and test_share={share:g} leaves none to train on")
    return [p for p in pairs if group(p) not in tests], [p for p in pairs if group(p) in tests]


def own(config: RewardSettings, pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs with the base's own replies to the prompts of `pairs`, under the tutor's role, as the worse sides.

    The better ones are the chosen replies, or with better_prompts more of the base's, under that file's role. Pairs
    with an empty side or equal ones are left out. Raises ConfigError.
    """
    import torch

    from lora_ppo.loading import load_policy
    from train import TrainConfig

    names = "model_name device load_in_4bit dtype prompts max_new_tokens seed".split()
    values = {name: getattr(config, name) for name in names}
    values |= {"top_p": 1.0, "task": "voice"}  # a task that asks the tutor's role alone
    policy, _ = load_policy(parse(TrainConfig, [], values))
    roles = {"rejected": policy.prompts.tutor}
    if config.better_prompts:
        roles["chosen"] = load_prompts(config.better_prompts, DEFAULT_PROMPTS).tutor
    torch.manual_seed(config.seed)
    made = [pair for pair in {pair.line: pair for pair in pairs}.values() for _ in range(config.own_replies)]
    for side, role in roles.items():
        said = replies_under(role, policy, [pair.messages for pair in made], config.temperature)
        made = [replace(pair, **{side: text}) for pair, text in zip(made, said, strict=True)]
    return [pair for pair in made if pair.chosen and pair.rejected and pair.chosen != pair.rejected]


def replies_under(role: Role, policy: Policy, chats: Sequence[Sequence[Message]], temperature: float) -> list[str]:
    """A policy's replies to chats, whose system texts a role's system text and examples take the place of."""
    from lora_ppo.generate import Request, replies

    opening, said = role.messages("")[:-1], []
    asked = [[*opening, *(message for message in chat if message["role"] != "system")] for chat in chats]
    requests = [Request(encode_chat(policy.tokenizer, messages), temperature) for messages in asked]
    for start in range(0, len(requests), AT_ONCE):
        said += replies(policy, requests[start : start + AT_ONCE])
    return [policy.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]


def measure(reward: RewardModel, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Accuracy on pairs with its interval, in all and by topic, and the margins with their histogram.

    A pair is right whose chosen reply has the higher score: equal ones are not told apart. Raises ConfigError where
    scores are not finite.
    """
    import numpy as np

    scores = reward.score([(pair.messages, side) for pair in pairs for side in (pair.chosen, pair.rejected)])
    if not np.isfinite(scores).all():
        raise ConfigError("training diverged, scores are not finite: lower learning_rate; nothing was written")
    margins = np.array(scores[::2]) - np.array(scores[1::2])

    def told(some: "np.ndarray") -> dict[str, Any]:
        right = int((some > 0).sum())
        return {"pairs": len(some), "accuracy": right / len(some), "interval": wilson_interval(right, len(some))}

    topics = np.array([pair.topic for pair in pairs])
    counts, edges = np.histogram(margins, BINS)
    return told(margins) | {
        "by_topic": {topic: told(margins[topics == topic]) for topic in sorted(set(topics) - {""})},
        "margin": {"mean": margins.mean(), "deviation": margins.std(), "lowest": margins.min()},
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "scores": [
            {"line": p.line, "chosen": a, "rejected": b}
            for p, a, b in zip(pairs, scores[::2], scores[1::2], strict=True)
        ],
    }


def train(config: RewardSettings) -> dict[str, Any]:
    """Trains, measures and writes a reward adapter; returns what was measured. Raises ConfigError."""
    train_pairs, held_out = load(config)
    folder = Path(config.output_dir).resolve()
    try:
        from datasets import Dataset, disable_progress_bars
        from trl import RewardConfig, RewardTrainer
    except ImportError as error:
        raise ConfigError(f"training a reward model needs a package ({error}): pip install trl==1.16.0") from None
    import torch
    from peft import LoraConfig

    silence_libraries()
    disable_progress_bars()
    cuda = torch.cuda.is_available()
    device = config.device if config.device != "auto" else "cuda" if cuda else "cpu"
    name = str(BUNDLED_MODEL) if config.model_name == "auto" else config.model_name
    config = replace(config, device=device, model_name=name)
    if config.own_replies:
        train_pairs += own(config, train_pairs)
    torch.manual_seed(config.seed)  # of the head's first weights
    model, tokenizer = load_base(config, classifier=True)
    rows, context = [], context_of(model, tokenizer)
    for number, pair in enumerate([*train_pairs, *held_out]):
        row = {f"{side}_ids": reply_ids(tokenizer, pair.messages, getattr(pair, side)) for side in SIDES}
        if (longest := max(map(len, row.values()))) > context:
            file = "held_out" if config.held_out and number >= len(train_pairs) else "pairs"
            raise ConfigError(f"line {pair.line} of {file} has {longest} tokens, the context {context:g}: shorten it")
        rows.append(row)
    data = Dataset.from_list(rows[: len(train_pairs)])
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    arguments = RewardConfig(
        output_dir=str(new),
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=config.num_epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        center_rewards_coefficient=config.center or None,
        max_grad_norm=config.max_grad_norm,
        max_length=None,
        disable_dropout=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not device.startswith("cuda"),
        seed=config.seed,
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=False,
        pad_token=tokenizer.convert_ids_to_tokens(pad_id(tokenizer)),
    )
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        task_type="SEQ_CLS",  # PEFT then trains the head, too, and saves it with the adapter
    )
    try:
        trainer = RewardTrainer(
            model=model, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora
        )
    except ValueError as error:  # PEFT, of layers that the model does not have
        raise ConfigError(f"model_name={name}, target_modules: {' '.join(str(error).split())[:200]}") from None
    trainer.train()
    reward = RewardModel(trainer.model.eval(), tokenizer, trainer.model.device)
    found = measure(reward, held_out) | {"trained_on": len(train_pairs), "log": trainer.state.log_history}
    new.mkdir(parents=True, exist_ok=True)
    with utf8_path(new) as place:
        trainer.model.save_pretrained(place, save_embedding_layers=False)
        tokenizer.save_pretrained(place)
    same = {"base_model": base_name(config), "base_fingerprint": fingerprint(weight_files(config))}
    write_json(new / REWARD_FILE, same)
    write_json(new / "evaluation.json", found)
    (new / "README.md").write_text(card(config, found), encoding="utf-8")
    if folder.exists():
        folder.rmdir()
    new.rename(folder)
    return found


def card(config: RewardSettings, found: dict[str, Any]) -> str:
    """The README.md of the folder."""
    return (
        f"---\nbase_model: {base_name(config)}\nlibrary_name: peft\ntags: [lora, reward-model]\n---\n"
        f"# Reward adapter on `{base_name(config)}`\n\n"
        f"Trained on {found['trained_on']} pairs; {summary(found)}. A LoRA adapter of rank {config.lora_r} with a\n"
        "scalar head, for AutoModelForSequenceClassification with num_labels=1 and PEFT; its head is saved with it.\n"
    )


def summary(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"held-out accuracy {found['accuracy']:.1%} ({low:.1%} to {high:.1%}) on {found['pairs']} pairs"


def show(found: dict[str, Any]) -> None:
    print(summary(found))
    for topic, one in found["by_topic"].items():
        print(
            f"  {topic}: {one['accuracy']:.1%} of {one['pairs']} ({one['interval'][0]:.0%} to {one['interval'][1]:.0%})"
        )
    print("margins (chosen less rejected):")
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        print(f"  {low:+7.2f} to {high:+7.2f} {'#' * round(40 * count / max(counts))} {count}")


@program
def main() -> int:
    """The program. Exit status: 0; 2 for a setting or data that can't be used; 130 after Ctrl-C."""
    config = from_command_line(RewardSettings, USAGE)
    try:
        show(train(config))
    except OSError as error:
        raise ConfigError(f"output_dir={config.output_dir}: {error.strerror or error}") from None
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ConfigError(f"memory ran out: lower batch_size={config.batch_size}, or take a smaller model") from None
    print(f"wrote {config.output_dir}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
