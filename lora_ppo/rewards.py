"""Reward models: a second LoRA adapter with a scalar head on the policy's own base, or any sequence classifier.

The first shares its weights with policy and reference. One model is in memory: with the adapter "default" it is the
policy, with adapters off the reference, with the adapter "reward" the reward model. What it reads is a chat and its
reply, under the template of its own tokenizer; a score is read off the last token, as transformers' classifiers do.

`RunningScale` brings scores of whatever size to rewards.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ppo.chat import Message, behind_reply, encode, encode_chat, encode_text
from lora_ppo.checkpoint import SCALING, beyond_plain, other_base, sha256, tensors_in
from lora_ppo.episodes import Trajectory
from lora_ppo.files import utf8_path
from lora_ppo.policy import AdapterGate, Policy, gated_forward
from lora_ppo.processes import total
from lora_ppo.settings import ConfigError
from lora_ppo.stored import fingerprint

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor

ADAPTER, HEAD = "reward", "base_model.model.score.weight"  # as PEFT calls the head of a sequence classifier
REWARD_FILE = "reward.json"  # beside a reward adapter: the base that it belongs to
AT_ONCE = 16  # replies of one forward pass

Chat = tuple[Sequence[Message], str]  # what was asked, and the reply


def reply_ids(tokenizer, messages: Sequence[Message], reply: str) -> list[int]:
    """Token ids of a chat whose last message is `reply`, whole: with what the template puts behind a reply.

    An encoder (BERT) gets what was asked and the reply as its two sentences.
    """
    if takes_sentences(tokenizer):
        asked = "\n\n".join(message["content"] for message in messages)
        return tokenizer(asked, reply, split_special_tokens=True, verbose=False)["input_ids"]
    tail = encode(tokenizer, behind_reply(tokenizer, asked_again=False)) or [tokenizer.eos_token_id]
    return [*encode_chat(tokenizer, list(messages)), *encode_text(tokenizer, reply), *tail]


def context_of(model: Any, tokenizer: Any) -> float:
    """Tokens that a model can read; infinite where nobody says. Some encoders count two positions that are none."""
    told = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    return min(told, tokenizer.model_max_length) if takes_sentences(tokenizer) else told


def takes_sentences(tokenizer) -> bool:
    """Whether it is an encoder's, which reads two sentences and no chat."""
    return not tokenizer.chat_template and None not in (tokenizer.cls_token_id, tokenizer.sep_token_id)


def pad_id(tokenizer) -> int:
    """The token that pads; a score is read off the last token that is another one."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class RewardModel:
    """Scores replies. `model` is a classifier with one output, as transformers has them; `tokenizer` its own.

    `identity` tells its scores from those of others: a digest of the weights, or a classifier's name on the hub.
    """

    def __init__(self, model: Any, tokenizer: Any, device: "torch.device | str" = "cpu", identity: str = ""):
        self.model, self.tokenizer, self.device, self.identity = model, tokenizer, device, identity

    def score(self, chats: Sequence[Chat]) -> list[float]:
        """A score for each chat and reply, in float32; NaN for what is longer than the model's context."""
        import torch

        rows, most = [reply_ids(self.tokenizer, *chat) for chat in chats], self.context
        fit = [len(row) <= most for row in rows]
        rows = [row if fits else row[:1] for row, fits in zip(rows, fit, strict=True)]
        scores: list[float] = []
        for part in (rows[i : i + AT_ONCE] for i in range(0, len(rows), AT_ONCE)):
            width, pad = max(map(len, part)), pad_id(self.tokenizer)
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in part], device=self.device)
            real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part], device=self.device)
            with torch.no_grad():
                scores += self.forward(ids, real).float().tolist()
        return [score if fits else math.nan for score, fits in zip(scores, fit, strict=True)]

    @property
    def context(self) -> float:
        return context_of(self.model, self.tokenizer)

    def forward(self, ids: "Tensor", real: "Tensor") -> "Tensor":
        """Scores (B,) of padded rows (B, T); `real` is 1 on what is no padding."""
        types = {}
        if takes_sentences(self.tokenizer) and "token_type_ids" in self.tokenizer.model_input_names:
            ends = ids == self.tokenizer.sep_token_id
            types["token_type_ids"] = (ends.cumsum(-1) - ends.long()).clamp(max=1)  # 0 in the first sentence
        return self.model(input_ids=ids, attention_mask=real, **types).logits[:, 0]


class SharedReward(RewardModel):
    """The reward adapter of `folder` on the policy's base. Raises ConfigError where it does not belong there."""

    def __init__(self, policy: Policy, folder: Path):
        import torch

        told, tensors = read_reward_adapter(folder)
        identity = sha256(folder / "adapter_model.safetensors")
        super().__init__(policy.model.get_base_model().base_model, policy.tokenizer, policy.device, identity)
        if difference := other_base(read_json(folder / REWARD_FILE), policy):
            raise ConfigError(f"reward_model={folder} was trained {difference}")
        add_adapter(policy, folder, told, {name: x for name, x in tensors.items() if name != HEAD})
        head = tensors[HEAD].float().to(policy.device)  # (1, H)
        if head.shape != (1, width := policy.head.in_features):
            raise ConfigError(f"reward_model={folder}: its head is {tuple(head.shape)}, expected (1, {width})")
        self.head = torch.nn.Parameter(head, requires_grad=False)
        self.policy, self.gate = policy, AdapterGate()
        with self.active():  # raises where the adapter is on more than linear layers
            pass

    def forward(self, ids: "Tensor", real: "Tensor") -> "Tensor":
        import torch

        with self.active():
            hidden = self.model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state  # (B, T, H)
        places = torch.arange(ids.shape[1], device=ids.device)
        last = (places * (ids != pad_id(self.tokenizer))).argmax(-1)  # (B,)
        chosen = hidden[torch.arange(len(ids), device=ids.device), last]
        return torch.nn.functional.linear(chosen.float(), self.head)[:, 0]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """In here the adapter "reward" acts, and no other, be it one that was put on later and on other layers."""
        layers = self.policy.layers
        before, own = [x.forward for x in layers], [gated_forward(x, ADAPTER, self.gate) for x in layers]
        for layer, forward in zip(layers, own, strict=True):
            layer.forward = forward
        try:
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                layer.forward = forward


def add_adapter(policy: Policy, folder: Path, told: dict[str, Any], tensors: "dict[str, Tensor]") -> None:
    """Puts the low-rank parts of a reward adapter beside the policy's own, frozen. Raises ConfigError."""
    from peft import LoraConfig, set_peft_model_state_dict

    from lora_ppo.caches import sharded

    if sharded(policy):
        raise ConfigError(f"reward_model={folder} shares the base, which is sharded: name a classifier of its own")
    trained = {name: parameter.requires_grad for name, parameter in policy.model.named_parameters()}
    options = {name: told[name] for name in (*SCALING, "target_modules") if name in told}
    try:
        policy.model.add_adapter(ADAPTER, LoraConfig(**options))
        found = set_peft_model_state_dict(policy.model, tensors, adapter_name=ADAPTER)
    except (RuntimeError, ValueError, TypeError) as error:  # other shapes, layers that are not there, no numbers
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"reward_model={folder} does not fit the base model: {reason}") from None
    missing = [name for name in found.missing_keys if f".{ADAPTER}." in name]
    if missing or found.unexpected_keys:
        name = (missing or found.unexpected_keys)[0]
        raise ConfigError(f"reward_model={folder} {'lacks' if missing else 'has, and nothing takes,'} {name}")
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_(trained.get(name, False))
    policy.model.eval()
    policy.use_adapter()


def read_reward_adapter(folder: Path) -> tuple[dict[str, Any], "dict[str, Tensor]"]:
    """A reward adapter's config and tensors, head included. Raises ConfigError, also where the head was lost."""
    told = read_json(folder / "adapter_config.json")
    try:
        tensors = tensors_in(folder, "adapter_model")
    except Exception as error:  # the file, or what safetensors says of it
        raise ConfigError(f"reward_model={folder}: adapter_model.safetensors can't be read ({error})") from None
    if HEAD not in tensors:
        raise ConfigError(
            f"reward_model={folder} has no scalar head ({HEAD}): an adapter of a causal model, or its head was lost "
            "when it was saved; train it with tools/train_reward_model.py"
        )
    if told.get("peft_type") != "LORA":
        raise ConfigError(f"reward_model={folder} has peft_type {told.get('peft_type')}: expected LORA")
    if more := {name: value for name, value in beyond_plain(told).items() if name != "modules_to_save"}:  # the head
        name, value = min(more.items())
        raise ConfigError(f"reward_model={folder} has {name}={str(value)[:60]}: expected plain LoRA on linear layers")
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ConfigError(f"reward_model={folder}: {broken[0]} has values that are not finite: train it anew")
    return told, tensors


def read_json(file: Path) -> dict[str, Any]:
    """The object in a reward adapter's file. Raises ConfigError."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"reward_model={file.parent}: {file.name} can't be read ({error})") from None


def check_reward_model(name: str) -> None:
    """Raises ConfigError for what is certainly no reward model, before any model is loaded."""
    if not name:
        raise ConfigError("reward_model=FOLDER is missing: train one with tools/train_reward_model.py (docs/voice.md)")
    folder = Path(name)
    on_disk = name.startswith((".", "/")) or name.count("/") > 1 or ("/" in name and folder.parent.is_dir())
    if (folder / "adapter_config.json").exists():
        read_reward_adapter(folder)
        read_json(folder / REWARD_FILE)
    elif on_disk and not (folder / "config.json").exists():  # what else has a slash is a name on the hub
        raise ConfigError(f"reward_model={name}: found no adapter_config.json and no config.json there")


def load_reward_model(policy: Policy, name: str) -> RewardModel:
    """The reward model by folder or name: an adapter on the policy's base, or a model of its own."""
    if (Path(name) / "adapter_config.json").exists():
        return SharedReward(policy, Path(name))
    return load_classifier(name, policy.device)


def load_classifier(name: str, device: "torch.device | str" = "cpu") -> RewardModel:
    """A sequence classifier with one output, as it is stored. Raises ConfigError."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        with utf8_path(Path(name)) as place:
            where = str(place) if Path(name).exists() else name
            options = {"use_safetensors": True, "trust_remote_code": False}
            model, found = AutoModelForSequenceClassification.from_pretrained(
                where, output_loading_info=True, dtype="auto", **options
            )
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # hub, files, architecture: the libraries raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"reward_model={name} can't be loaded ({reason})") from None
    if found["missing_keys"]:
        raise ConfigError(f"reward_model={name} has no {min(found['missing_keys'])}: its head was never trained")
    if model.config.num_labels != 1:
        raise ConfigError(f"reward_model={name} has {model.config.num_labels} outputs: expected one, the score")
    text = model.config.get_text_config()
    tokenizer.model_max_length = min(tokenizer.model_max_length, getattr(text, "max_position_embeddings", math.inf))
    text.use_cache, text.pad_token_id = False, pad_id(tokenizer)  # the score is read off the last other token
    identity = fingerprint(sorted(Path(name).glob("*.safetensors"))) or name
    return RewardModel(model.to(device).eval().requires_grad_(False), tokenizer, device, identity)


def normalize(
    scale: "RunningScale", accelerator: "Accelerator", trajectories: Sequence[Trajectory]
) -> dict[str, float]:
    """Takes the scores of all processes' trajectories into `scale`, and makes them rewards; returns what they were."""
    known = [t for t in trajectories if t.outcome.verdict != "unknown"]
    scores = [t.outcome.reward for t in known]
    sums = total(accelerator, len(scores), sum(scores), sum((score - scale.mean) ** 2 for score in scores))
    scale.update(*sums)
    for trajectory in known:
        trajectory.outcome = replace(trajectory.outcome, reward=scale(trajectory.outcome.reward))
    return ({"score": sums[1] / sums[0]} if sums[0] else {}) | {"score_deviation": scale.deviation}


class RunningScale:
    """Mean and standard deviation of all scores so far; scores in units of it, clipped (Chan et al. 1979).

    The scores are those of one reward model, whose identity is `of`.
    """

    def __init__(self, clip: float, of: str = ""):
        self.clip, self.of, self.count, self.mean, self.squares = clip, of, 0, 0.0, 0.0

    def update(self, count: float, total: float, squares: float) -> None:
        """Takes in `count` scores by their sum and their sum of squares about the present mean."""
        if not count:
            return
        shift = (total - count * self.mean) / count  # of their mean from the present one
        own = squares - count * shift**2  # their sum of squares about their own mean
        self.squares += max(own, 0.0) + shift**2 * self.count * count / (self.count + count)
        self.mean += shift * count / (self.count + count)
        self.count += int(count)

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def __call__(self, score: float) -> float:
        rounding = 1e-6 * abs(self.mean) + 1e-30  # the last bits of equal scores are no difference
        scaled = (score - self.mean) / max(self.deviation, rounding)
        return min(max(scaled, -self.clip), self.clip)

    def state(self) -> dict[str, Any]:
        return {"of": self.of, "count": self.count, "mean": self.mean, "squares": self.squares}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave. Raises ConfigError where that was of another reward model's scores."""
        if state.get("of", self.of) != self.of:
            raise ConfigError(
                f"the run's reward model was {state['of'][:40]}, now it is {self.of[:40]}: set reward_model back, or "
                "start a new run in another output_dir"
            )
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])
