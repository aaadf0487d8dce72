"""A tutor that learns from whether you understood.

    python lora_ppo_demo.py                        start, or go on with, the tutor
    python lora_ppo_demo.py --help                 every setting

You ask. A local language model answers, then quizzes you on your question. Right is a reward of +1, wrong of -1, and
one PPO step on that one answer trains the model's LoRA adapters and its value head. This file holds all of it, in
reading order: policy, generation, quiz, PPO, checkpoints and journal, session. Mathematics is batch-first; the tutor
is the case of a batch of one.

Left out on purpose: a reward model (the quiz is the reward), a second copy of the model (the reference policy is the
same model with the adapters off), and batched or unattended training (a companion's work).

Shapes: B samples, P prompt tokens, T response tokens, V vocabulary. `response_mask` (B, T) is True
exactly where the policy chose the token, its end-of-sequence token included.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config
from lora_ppo.chat import (
    LEARNER_PROMPT,
    QUIZMASTER_PROMPT,
    SOLVER_PROMPT,
    TUTOR_PROMPT,
    Message,
    chat,
    encode_chat,
    encode_text,
)
from lora_ppo.forward import Batch, collate, token_logprobs_and_values
from lora_ppo.generate import Request, replies
from lora_ppo.policy import Policy, Snapshot, base_name, gradient_dropout, load_policy
from lora_ppo.settings import (
    ConfigError,
    from_command_line,
    save_yaml,
)

if TYPE_CHECKING:  # torch takes seconds to import: `--help` answers without it
    from torch import Tensor


# ------------------------------------------------------------------------------------------------ roles and prompts

LETTERS = "ABCD"


@dataclass(frozen=True)
class Quiz:
    """A multiple-choice question. `key` is the index of the correct option; it is never shown, sent or stored."""

    question: str
    options: tuple[str, ...]
    key: int


def quiz_text(question: str, options: Sequence[str]) -> str:
    """The quiz as people and models read it: the question, then a line for each lettered option."""
    return "\n".join([question, *(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))])


def quiz_json(question: str, correct: str, wrong: Sequence[str]) -> str:
    """The quiz as the quizmaster writes it: compact JSON, the only form its grammar allows."""
    quiz = {"question": question, "correct": correct, "wrong": list(wrong)}
    return json.dumps(quiz, ensure_ascii=False, separators=(",", ":"))


def learner_text(explanation: str, question: str, options: Sequence[str]) -> str:
    """What the learner reads: the explanation, an empty line, the quiz."""
    return f"{explanation}\n\n{quiz_text(question, options)}"


# ------------------------------------------------------------------------------------------------------------ policy


# -------------------------------------------------------------------------------------------------------- generation


# -------------------------------------------------------------------------------------------------------------- quiz

QUIZ_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "question": {"type": "string", "minLength": 1, "maxLength": 200},
                "correct": {"type": "string", "minLength": 1, "maxLength": 80},
                "wrong": {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": 80},
                    "minItems": len(LETTERS) - 1,
                    "maxItems": len(LETTERS) - 1,
                },
            },
            "required": ["question", "correct", "wrong"],
            "additionalProperties": False,
        },
        {"type": "null"},
    ]
}
JSON_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


class QuizGrammar:
    """Allows only what continues a quiz in compact JSON (or `null`), and no option that repeats an earlier one.

    Made for one reply: call it with the ids so far (1, P + t) and the next token's scores (1, V), as transformers does.
    """

    def __init__(self, policy: Policy, prompt_length: int):
        import llguidance

        self.policy, self.prompt_length, self.consumed = policy, prompt_length, 0
        schema = llguidance.LLMatcher.grammar_from_json_schema(QUIZ_SCHEMA, overrides={"whitespace_flexible": False})
        self.matcher = llguidance.LLMatcher(policy.ll_tokenizer, schema)

    def __call__(self, ids: "Tensor", scores: "Tensor") -> "Tensor":
        import torch

        written = ids[0, self.prompt_length :].tolist()
        self.matcher.consume_tokens(written[self.consumed :])
        self.consumed = len(written)
        allowed = torch.zeros(scores.shape[-1], dtype=torch.bool)
        if self.matcher.is_stopped():
            allowed[self.policy.stop_ids] = True
        else:
            allowed |= self.next_tokens(scores.shape[-1])
            repeats = self.repeating_tokens(written, allowed)
            if allowed.sum() > len(repeats):  # else the quiz is thrown away when it is parsed
                allowed[repeats] = False
        return scores.masked_fill(~allowed.to(scores.device), -math.inf)

    def next_tokens(self, vocabulary: int) -> "Tensor":
        """Which tokens the grammar allows next: (V,), bool."""
        import llguidance.numpy
        import numpy as np
        import torch

        bits = llguidance.numpy.allocate_token_bitmask(1, vocabulary)
        llguidance.numpy.fill_next_token_bitmask(self.matcher, bits)
        return torch.from_numpy(np.unpackbits(bits.view(np.uint8), bitorder="little")[:vocabulary].astype(bool))

    def repeating_tokens(self, written: list[int], allowed: "Tensor") -> list[int]:
        """The allowed tokens that would end an option that an earlier one equals, or complete one of its words.

        Refused at its end alone, a word would go on as another that nobody knows; numbers may begin alike.
        """
        _, found, options = self.policy.tokenizer.decode(written).partition('"correct":')
        if not found:
            return []
        repeats = set()
        for token, text in self.policy.quote_tokens.items():
            if allowed[token]:
                options_then = option_keys(options + text)
                repeats |= {token} if len(set(options_then)) < len(options_then) else set()
        options = options.replace('"wrong":', "")
        _, unfinished, beginning = JSON_STRING.sub("", options).partition('"')
        for option in JSON_STRING.findall(options) if unfinished else ():
            if option.startswith(beginning) and not option.isdigit():
                last = self.policy.tokenizer.encode(option[len(beginning) :], add_special_tokens=False)
                repeats |= {token for token in last if len(last) == 1 and allowed[token]}
        return list(repeats)


def option_keys(options: str) -> list[str]:
    """The finished options in the JSON behind `"correct":`, in a form in which equal options are equal."""
    return [one_line(json.loads(f'"{raw}"')).casefold() for raw in JSON_STRING.findall(options.replace('"wrong":', ""))]


def one_line(text: str) -> str:
    """`text` with every run of white space, line breaks included, as one space: an option can't forge another line."""
    return " ".join(text.split())


def parse_quiz(text: str) -> tuple[str, str, list[str]] | None:
    """(question, correct, wrong) from the quizmaster's JSON; None for `null`, broken JSON or options that repeat."""
    try:
        quiz = json.loads(text)
        question, *options = (one_line(part) for part in (quiz["question"], quiz["correct"], *quiz["wrong"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    if len({option.casefold() for option in options}) != len(LETTERS) or not all((question, *options)):
        return None
    return question, options[0], options[1:]


def quiz_request(policy: Policy, question: str) -> Request:
    """Asks the quizmaster for the JSON of a quiz on `question`, or `null`.

    It is the base model and sees the question alone: the policy can't learn to make easy quizzes.
    """
    prompt = encode_chat(policy.tokenizer, chat(QUIZMASTER_PROMPT, question))
    grammar = QuizGrammar(policy, len(prompt))
    return Request(prompt, policy.config.quiz_temperature, adapter=False, grammar=grammar)


def make_quiz(policy: Policy, question: str, written: list[int] | None = None) -> Quiz | None:
    """A quiz on `question` whose key the base model confirms; None if there is nothing to quiz, or none survives.

    `written` is the quizmaster's reply where it was written already, beside the answer: then it is the first try.
    """
    for _ in range(policy.config.quiz_tries):
        ids = written or replies(policy, [quiz_request(policy, question)])[0]
        text, written = policy.tokenizer.decode(ids, skip_special_tokens=True), None
        if text == "null":
            return None
        parts = parse_quiz(text)
        if parts and survives(policy, quiz := shuffle_quiz(*parts)):
            return quiz
    return None


def shuffle_quiz(question: str, correct: str, wrong: Sequence[str]) -> Quiz:
    """The options in an order drawn from torch's global generator."""
    import torch

    options = [correct, *wrong]
    order = torch.randperm(len(options)).tolist()
    return Quiz(question, tuple(options[i] for i in order), order.index(0))


def survives(policy: Policy, quiz: Quiz) -> bool:
    """Whether the base model, blind to the key, picks it in more than half of the four rotations of the options."""
    n = len(quiz.options)
    rotations = [[quiz.options[(i + shift) % n] for i in range(n)] for shift in range(n)]
    chats = [chat(SOLVER_PROMPT, quiz_text(quiz.question, options)) for options in rotations]
    picks = option_probabilities(policy, chats, rotations).argmax(-1).tolist()
    right = sum((pick + shift) % n == quiz.key for shift, pick in enumerate(picks))
    return right > n // 2


def option_probabilities(policy: Policy, chats: Sequence[list[Message]], options: Sequence[Sequence[str]]) -> "Tensor":
    """How probable it is (B, 4) that the base model's reply to each of B chats is each of its options, if it is one.

    A reply is scored whole, its end token included, so that no option gains by beginning like another.
    """
    import torch

    prompts = [encode_chat(policy.tokenizer, messages) for messages in chats]
    told = [[*encode_text(policy.tokenizer, text), policy.end_id] for texts in options for text in texts]
    asked = [prompt for prompt, texts in zip(prompts, options, strict=True) for _ in texts]
    batch = collate(asked, told, policy.pad_id, policy.device)
    with torch.no_grad():
        logprobs, _, _ = token_logprobs_and_values(policy, batch, adapter=False, temperature=1.0)
    scores = logprobs.masked_fill(~batch.response_mask, 0.0).sum(-1)
    return scores.view(len(chats), -1).softmax(-1)


# The simulated learner: the base model in a learner's role, blind to the key, reads an answer and takes the quiz.


def learner_probabilities(policy: Policy, answers: Sequence[str], quizzes: Sequence[Quiz]) -> tuple["Tensor", "Tensor"]:
    """How probable each option is to a learner who has read the answer, and to one who has read none; both (B, 4)."""
    answers, quizzes = [*answers, *[""] * len(quizzes)], [*quizzes, *quizzes]
    pairs = zip(answers, quizzes, strict=True)
    chats = [chat(LEARNER_PROMPT, learner_text(answer, quiz.question, quiz.options)) for answer, quiz in pairs]
    read, unread = option_probabilities(policy, chats, [quiz.options for quiz in quizzes]).chunk(2)
    return read, unread


def learner_choices(read: "Tensor", unread: "Tensor") -> list[int]:
    """What the learner chooses, by its probabilities (B, 4) with the answer and without one.

    That is the option whose probability the answer raised most. A fondness for a place or a spelling is there without
    an answer too, and cancels (Zhao et al. 2021, https://arxiv.org/abs/2102.09690).
    """
    least = 1e-30  # below it a probability is rounding
    return (read.clamp(min=least) / unread.clamp(min=least)).argmax(-1).tolist()


# --------------------------------------------------------------------------------------------------------------- PPO


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
    config: Config,
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


# ------------------------------------------------------------------------------------------ checkpoints, journal, log


CHECKPOINT_FILES = {"adapter_model.safetensors", "value_head.safetensors", "optimizer.safetensors", "state.json"}


class Damaged(Exception):
    """A checkpoint that can't be used; the message says what is wrong with it."""


def fsync(path: Path) -> None:
    """Forces a file, or where the system can a folder, to disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(
    folder: Path, policy: Policy, state: dict[str, Any], result: str, extra: dict[str, str] | None = None
):
    """Writes a checkpoint: all of it becomes visible at once, under `folder`, or nothing does.

    `state` is what the caller wants back; `result` is a sentence for the model card; `extra` are further text files by
    name. Raises OSError, and leaves what stood at `folder` in place, where the disk refuses.
    """
    from safetensors.torch import save_file

    new, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        policy.model.save_pretrained(new, safe_serialization=True, save_embedding_layers=False)
        save_file(policy.value_head.state_dict(), new / "value_head.safetensors")
        tensors = {n.removeprefix("optimizer."): t for n, t in policy.tensors().items() if n.startswith("optimizer.")}
        save_file(tensors, new / "optimizer.safetensors")
        config = policy.config
        kept = {"step": policy.step, "kl_coef": policy.kl_coef, "base_model": base_name(config)}
        kept |= {"lora_r": config.lora_r, "lora_alpha": config.lora_alpha}
        state = kept | {"target_modules": policy.targets, "config": asdict(config)} | state
        texts = {"state.json": json.dumps(state, indent=1), "README.md": model_card(policy, result)} | (extra or {})
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        files = {p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in sorted(new.iterdir())}
        (new / "manifest.json").write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
        for path in (*new.iterdir(), new):
            fsync(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        fsync(folder.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def model_card(policy: Policy, result: str) -> str:
    """The README.md of a checkpoint. The tutor's task is the quiz and its algorithm PPO; others name theirs."""
    config = policy.config
    task, algorithm = getattr(config, "task", "quiz"), getattr(config, "algorithm", "ppo")
    return (
        f"---\nbase_model: {base_name(config)}\nlibrary_name: peft\ntags: [lora, {algorithm}]\n---\n"
        f"# LoRA adapters after {policy.step} {algorithm.upper()} step{'' if policy.step == 1 else 's'}\n\n"
        f"Rank {config.lora_r} on {', '.join(policy.targets)} of `{base_name(config)}`; task: `{task}`. {result}\n\n"
        "`adapter_model.safetensors` loads in PEFT and vLLM as it is. `value_head.safetensors` and\n"
        "`optimizer.safetensors` are needed only to train on.\n"
    )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """The `state.json` of a whole checkpoint. Raises Damaged if a file is missing, cut short or altered."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        if lacking := CHECKPOINT_FILES - files.keys():
            raise Damaged(f"its manifest.json does not list {', '.join(sorted(lacking))}")
        for name, expected in files.items():
            path = folder / Path(name).name
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise Damaged(f"{name} has {size} bytes, expected {expected['bytes']}")
            if sha256(path) != expected["sha256"]:
                raise Damaged(f"{name} is not what was written")
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"unreadable: {error}") from None


def load_checkpoint(folder: Path, policy: Policy) -> dict[str, Any]:
    """Verifies a checkpoint, puts it into `policy`, and returns its state.

    Raises Damaged, or ConfigError where it belongs to another base model, rank or set of layers.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    state = verify_checkpoint(folder)
    here = {"base_model": base_name(policy.config), "target_modules": policy.targets}
    here |= {name: getattr(policy.config, name) for name in ("lora_r", "lora_alpha")}
    for name, value in here.items():
        if state.get(name) != value:
            setting = {"base_model": "model_name"}.get(name, name)
            raise ConfigError(
                f"{folder} was trained with {setting}={state.get(name)}, now it is {value}: "
                f"set {setting} back, or begin a new run"
            )
    set_peft_model_state_dict(policy.model, load_file(folder / "adapter_model.safetensors"))
    policy.value_head.load_state_dict(load_file(folder / "value_head.safetensors"))
    slots = {f"optimizer.{name}": tensor for name, tensor in load_file(folder / "optimizer.safetensors").items()}
    own = {name: tensor for name, tensor in policy.tensors().items() if name.startswith("optimizer.")}
    if {name: x.shape for name, x in slots.items()} != {name: x.shape for name, x in own.items()}:
        raise ConfigError(f"{folder} holds the state of another optimizer: set optimizer back, or begin a new run")
    for name, tensor in own.items():
        tensor.copy_(slots[name])
    policy.step, policy.kl_coef = state["step"], state["kl_coef"]
    return state


def remove_folder(folder: Path) -> None:
    """Removes a checkpoint, all of it at once for whoever looks."""
    gone = folder.with_name(f".{folder.name}.gone")
    folder.rename(gone)
    shutil.rmtree(gone)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints `step_N` of a run, newest first."""
    found = [(int(m[1]), p) for p in run.glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))]
    return [path for _, path in sorted(found, reverse=True)]


class LineFile:
    """A file of JSON lines to which one is added durably: written, flushed and fsynced, or kept until that works."""

    def __init__(self, path: Path):
        self.path = path
        self.unwritten: list[bytes] = []

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line. Raises OSError if it can't be written now; it is then written before the next one."""
        self.unwritten.append(json.dumps(record).encode("ascii") + b"\n")
        self.flush()

    def flush(self) -> None:
        """Writes what could not be written before. Raises OSError if it still can't be."""
        if not self.unwritten:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = b"".join(self.unwritten)
        with self.path.open("ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) < len(data):
                    raise OSError("no space left for a whole line")
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, start)
                raise
        self.unwritten.clear()

    def read(self, offset: int = 0) -> list[dict[str, Any]]:
        """The records from byte `offset` on. A last line that was not finished is cut off the file and not returned."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with contextlib.suppress(OSError):  # in a folder that can't be written to nothing is appended either
                os.truncate(self.path, whole)
        records = []
        for number, line in enumerate(data[:whole].splitlines(keepends=True), 1):
            offset -= len(line)
            if offset < 0:
                try:
                    records.append(json.loads(line))
                except ValueError:
                    raise Damaged(f"{self.path} is damaged in line {number}") from None
        return records

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


@dataclass
class Turn:
    """A finished turn: what was said, and the reward it earned."""

    number: int
    prompt_ids: list[int]
    response_ids: list[int]
    reward: float


# The settings on which the outcome of a PPO step depends; the journal keeps them for taking steps again.
STEP_SETTINGS = (
    "temperature learning_rate batch_size ppo_epochs cliprange cliprange_value vf_coef entropy_coef gamma lam "
    "lora_dropout kl_coef adaptive_kl kl_target kl_horizon target_kl max_grad_norm seed"
).split()


class Run:
    """A policy in training and its life on disk: turns, steps, undo, checkpoints, journal and log.

    Every finished turn is in the journal before it is acknowledged; a checkpoint says up to where the journal is in it.
    So after a crash the newest whole checkpoint, and the turns after it taken again, give the state that was.
    `notice` is told what a person should know; a disk that refuses costs a notice, never the session.
    """

    def __init__(self, policy: Policy, config: Config, notice: Callable[[str], None]):
        self.policy, self.config, self.notice = policy, config, notice
        self.root = Path(config.checkpoint_dir)
        self.log = LineFile(Path(config.log_dir) / "run.log")
        self.turn = 0  # the number of the turn to come
        self.pending: list[Turn] = []  # answered, waiting for batch_size of them
        self.undo_snapshot: Snapshot | None = None
        self.foresight: Foresight | None = None
        self.taken_turns = 0  # by the step that the snapshot precedes
        self.saved_step = -1
        self.covered = 0  # bytes of the journal that the policy's weights contain
        self.lock = None
        with self.surviving("open the checkpoint folder"):
            self.take_lock()
        self.folder = self.newest_run()
        self.journal = LineFile(self.folder / "journal.jsonl")
        self.resume()

    def take_lock(self) -> None:
        """Keeps a second tutor out of the same folder. Raises ConfigError if there is one."""
        import filelock

        self.root.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(self.root / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ConfigError(
                f"another tutor is using {self.root}: stop it, or set checkpoint_dir to another folder"
            ) from None

    def newest_run(self) -> Path:
        """The first run lives in checkpoint_dir itself, later ones in `run_2`, `run_3`, ... beneath it."""
        numbers = [int(m[1]) for p in self.root.glob("run_*") if (m := re.fullmatch(r"run_(\d+)", p.name))]
        return self.root / f"run_{max(numbers)}" if numbers else self.root

    def begin_new_run(self) -> None:
        """Moves on to a folder where no run has been, so that no earlier one is touched."""
        if checkpoints(self.folder) or self.journal.size:
            number = int(self.folder.name[4:]) + 1 if self.folder != self.root else 2
            self.folder = self.root / f"run_{number}"
            self.journal = LineFile(self.folder / "journal.jsonl")

    def resume(self) -> None:
        """Puts the policy where `config.resume` says, and starts what comes: the old run goes on, or a new one."""
        if self.config.resume == "auto":
            if checkpoints(self.folder) or self.journal.size:
                self.resume_newest()
        else:
            if self.config.resume != "none":
                try:
                    self.turn = load_checkpoint(Path(self.config.resume), self.policy).get("turn", 0)
                except Damaged as error:
                    expected = "expected auto, none, or the folder of a whole checkpoint"
                    raise ConfigError(f"resume={self.config.resume}: {error}; {expected}") from None
            self.begin_new_run()
        self.policy.configure(self.config)
        if not checkpoints(self.folder):
            self.save()  # what the journal starts from
        settings = {name: getattr(self.config, name) for name in STEP_SETTINGS}
        self.record({"type": "settings", "settings": settings})

    def resume_newest(self) -> None:
        """Loads the newest whole checkpoint from which the journal can be replayed, and replays it."""
        with self.surviving("clear up after a crash"):
            for hidden in self.folder.glob(".step_*"):  # what a crash in the middle of a save left
                if hidden.suffix == ".old" and not (whole := self.folder / hidden.stem[1:]).exists():
                    hidden.rename(whole)
                shutil.rmtree(hidden, ignore_errors=True)
        reasons = []
        for folder in checkpoints(self.folder):
            try:
                state = load_checkpoint(folder, self.policy)
                self.turn, self.covered = state["turn"], state["journal_offset"]
                self.saved_step = self.policy.step
                then = {name: value for name, value in state["config"].items() if name in STEP_SETTINGS}
                self.policy.configure(replace(self.config, **then))
                self.replay(state["journal_offset"])
                break
            except Damaged as error:
                reasons.append(f"{folder.name}: {error}")
                self.notice(f"{folder.name} is not used ({error}); trying the one before it.")
        else:
            raise ConfigError(
                f"{self.folder} holds no whole checkpoint ({'; '.join(reasons) or 'none at all'}): "
                "set resume=none for a new run beside it"
            )

    def replay(self, offset: int) -> None:
        """Takes the journal's turns from byte `offset` on again, each under the settings it was taken with."""
        size = self.journal.size
        records = self.journal.read(offset)
        if self.journal.size < max(size, offset):
            self.notice("The journal's last line was half-written and is dropped: that turn had not been acknowledged.")
        if self.journal.size < offset:
            raise Damaged("the journal is shorter than the checkpoint says")
        self.pending.clear()
        self.undo_snapshot = None
        turns = sum(record["type"] == "turn" for record in records)
        if turns:
            self.notice(f"Taking {turns} turn{'s' * (turns > 1)} again from the journal.")
        for record in records:
            if record["type"] == "settings":
                self.policy.configure(replace(self.config, **record["settings"]))
            elif record["type"] == "undo":
                if not self.take_back():
                    raise Damaged("its last step was taken back later")
            elif record["type"] == "passed":
                self.turn = record["number"] + 1
            else:
                turn = Turn(**{name: record[name] for name in ("number", "prompt_ids", "response_ids", "reward")})
                self.pending.append(turn)
                self.turn = turn.number + 1
                if record["outcome"] != "pending":
                    self.replay_step(record["outcome"])
        self.settle()
        self.complete_log([record["log"] for record in records if "log" in record])

    def replay_step(self, outcome: str) -> None:
        """What a turn's step did, done again: `taken` steps are computed, the others left no trace in the weights."""
        self.undo_snapshot = None if outcome == "skipped" else self.policy.snapshot()
        if outcome == "taken":
            try:
                self.take_step()
            except StepSkipped as skipped:
                raise ConfigError(f"a step of {self.journal.path} can't be taken again: {skipped}") from None
        elif outcome == "undone":
            self.policy.step += 1
        self.taken_turns = len(self.pending)
        self.pending.clear()

    def complete_log(self, lines: list[dict[str, Any]]) -> None:
        """Adds the lines that a crash kept from the log."""
        with self.surviving("complete the log"):
            there = {line.get("timestamp") for line in self.log.read()}
            for line in lines:
                if line["timestamp"] not in there:
                    self.log.append(line)

    def batch(self, turns: Sequence[Turn]) -> Batch:
        prompts, responses = ([getattr(turn, name) for turn in turns] for name in ("prompt_ids", "response_ids"))
        return collate(prompts, responses, self.policy.pad_id, self.policy.device)

    def take_step(self) -> dict[str, float]:
        """One PPO step on the pending turns, from the state in `undo_snapshot`."""
        import torch

        torch.manual_seed(turn_seed(self.policy.config.seed, self.pending[-1].number) ^ 1)  # for dropout
        scores = [turn.reward for turn in self.pending]
        return ppo_step(self.policy, self.batch(self.pending), scores, self.undo_snapshot)

    def foresee(self, turn: Turn) -> None:
        """Begins to compute both outcomes of a turn whose reward is not known yet, if it is to lead to a step."""
        config = self.config
        if config.precompute and not config.lora_dropout and len(self.pending) + 1 >= config.batch_size:
            with contextlib.suppress(MemoryError, RuntimeError):  # no memory for it: the plain step will do
                earlier = [turn.reward for turn in self.pending]
                self.foresight = Foresight(self.policy, self.batch([*self.pending, turn]), earlier)

    def forget(self) -> None:
        """Ends `foresee` where no step came of it."""
        if self.foresight:
            self.foresight.discard()
            self.foresight = None

    def finish_turn(self, turn: Turn, line: dict[str, Any]) -> dict[str, Any]:
        """Learns from a turn and makes it durable; returns its log line, completed with the step's metrics.

        `outcome` in it is `taken`, `undone` (beyond the trust region), `skipped` (with `why`) or `pending`.
        """
        started, foreseen = time.perf_counter(), None
        self.pending.append(turn)
        metrics: dict[str, Any] = {}
        outcome = "pending"
        if len(self.pending) >= self.config.batch_size:
            self.undo_snapshot = None
            try:
                self.undo_snapshot = self.foresight.before if self.foresight else self.policy.snapshot()
                metrics = self.foresight.take(turn.reward) if self.foresight else self.take_step()
                foreseen = self.foresight.seconds.get(turn.reward) if self.foresight else None
                self.foresight = None
                outcome = "undone" if metrics.pop("undone", False) else "taken"
            except StepSkipped as skipped:
                outcome, metrics, self.undo_snapshot = "skipped", {"why": str(skipped)}, None
            except BaseException as error:  # a second Ctrl-C: the turn has not been
                self.undo_snapshot = None
                if not out_of_memory(error):
                    self.pending.pop()
                    raise
                outcome, metrics = "skipped", {"why": OUT_OF_MEMORY}
        self.turn = turn.number + 1
        seconds = round(foreseen or time.perf_counter() - started, 4)  # of computing, not of waiting for it
        line = {"timestamp": now(), "step": self.policy.step, "turn": turn.number} | line | metrics
        line |= {"reward": turn.reward, "seconds": seconds, "outcome": outcome}
        self.record({"type": "turn"} | asdict(turn) | {"outcome": outcome, "log": line})
        if outcome != "pending":
            self.taken_turns = len(self.pending)
            self.pending.clear()
        self.settle()
        with self.surviving("write the log"):
            self.log.append(line)
        if outcome in ("taken", "undone") and self.policy.step % self.config.save_every == 0:
            self.save()
        return line

    def take_back(self) -> int:
        """Takes the last waiting turn, or else the last step, back in memory; how many turns that were."""
        if self.pending:
            self.pending.pop()
            return 1
        if self.undo_snapshot is None:
            return 0
        self.policy.restore(self.undo_snapshot)
        self.policy.configure(self.policy.config)  # settings that changed since then stay changed
        self.undo_snapshot = None
        return self.taken_turns

    def pass_over(self, number: int) -> None:
        """Notes that a turn has ended without a choice, so that the next has another number in every session."""
        self.turn = number + 1
        self.record({"type": "passed", "number": number})
        self.settle()

    def undo(self) -> bool:
        """Takes the last step back, exactly, in memory and on disk; False if there is none."""
        step = self.policy.step
        turns = self.take_back()
        if not turns:
            return False
        line = {"timestamp": now(), "step": step, "undo": turns}
        self.record({"type": "undo", "log": line})
        self.settle()
        with self.surviving("write the log"):
            self.log.append(line)
        with self.surviving("replace the checkpoint that holds the step taken back"):
            stale = [p for p in checkpoints(self.folder) if int(p.name[5:]) > self.policy.step]
            if stale and self.save():
                for folder in stale:
                    remove_folder(folder)
        return True

    def settle(self) -> None:
        """Notes that the weights contain the journal up to here, unless turns are waiting for their step."""
        if not self.pending:
            self.covered = self.journal.size

    def save(self) -> bool:
        """Writes a checkpoint and removes those beyond keep_checkpoints, oldest first."""
        if self.foresight:  # interrupted while it worked on the weights: the journal has every turn
            return False
        with self.surviving("save a checkpoint"):
            state = {"turn": self.turn, "journal_offset": self.covered, "log_offset": self.log.size}
            state["rng"] = {"seed": self.config.seed, "turn": self.turn}  # every turn's generator is seeded from these
            self.journal.flush()
            save_checkpoint(self.folder / f"step_{self.policy.step}", self.policy, state, self.result())
            self.saved_step = self.policy.step
            save_yaml(self.config, self.folder / "effective_config.yaml")
            for folder in checkpoints(self.folder)[self.config.keep_checkpoints :]:
                remove_folder(folder)
            return True
        return False

    def result(self) -> str:
        """How the run went, in a sentence, for the model card."""
        rewards = [line["reward"] for line in self.history()]
        right = sum(reward > 0 for reward in rewards)
        return f"{right} of {len(rewards)} quizzes were answered right." if rewards else "No quiz was answered yet."

    def history(self) -> list[dict[str, Any]]:
        """The log lines of this run's turns, in order, without those taken back."""
        lines: list[dict[str, Any]] = []
        with contextlib.suppress(OSError, Damaged):
            for line in [*self.log.read(), *map(json.loads, self.log.unwritten)]:
                if line.get("undo"):
                    del lines[-line["undo"] :]
                else:
                    if lines and line["turn"] <= lines[-1]["turn"]:  # a new run begins
                        lines.clear()
                    lines.append(line)
        return lines

    def record(self, record: dict[str, Any]) -> None:
        with self.surviving("write the journal"):
            self.journal.append(record)

    @contextlib.contextmanager
    def surviving(self, task: str) -> Iterator[None]:
        """The disk's refusals become notices in here."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError, Damaged) as error:
            self.notice(f"Could not {task} ({error}). The session goes on; what can't be written is kept in memory.")

    def close(self) -> None:
        if self.lock:
            self.lock.release()


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a turn's random draws: a session that was stopped goes on as if it had not been."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{turn}".encode()).digest()[:7], "big")


def now() -> str:
    return datetime.now(UTC).isoformat()


# ----------------------------------------------------------------------------------------------------------- session

BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
HELP = """Ask a question, read the answer, then choose A to D on the quiz: right is +1, wrong is -1; the tutor learns.
At the quiz:     A B C D, or the option's text, then Enter; s skips (no reward, no step).
At the question: /help       this text
                 /progress   how the quizzes went so far
                 /undo       take the last step back, exactly
                 /save       write a checkpoint now
                 /config     every setting as it is in force
                 /quit       save and leave (so do Ctrl-D and Ctrl-C)"""


def clean(text: str) -> str:
    """Untrusted text as a terminal may show it: no control, escape or bidirectional-override characters."""
    keep = (c for c in text if c in "\n\t" or (unicodedata.category(c) != "Cc" and c not in BIDI_CONTROLS))
    return "".join(keep)


class Terminal:
    """Reads lines (with history and editing at a terminal, plainly from a pipe) and writes untrusted text safely."""

    waits_for_a_person = True

    def __init__(self, history: Path | None):
        from rich.console import Console

        class PlainConsole(Console):
            def on_broken_pipe(self) -> None:
                raise BrokenPipeError  # for `main`; rich would exit with status 1

        for stream in (sys.stdin, sys.stdout):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(encoding="utf-8", errors="replace")
        self.console = PlainConsole(highlight=False, markup=False, emoji=False)
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.prompter = None
        if self.interactive and history:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.history import FileHistory, InMemoryHistory

            try:
                history.parent.mkdir(parents=True, exist_ok=True)
                history.touch()
                self.prompter = PromptSession(history=FileHistory(str(history)))
            except OSError:
                self.prompter = PromptSession(history=InMemoryHistory())

    @contextlib.contextmanager
    def keys_kept(self) -> Iterator[None]:
        """What is typed while the tutor speaks, Ctrl-D too, waits in here for the next prompt, and does not show."""
        try:
            import termios
        except ImportError:  # Windows
            yield
            return
        if not self.interactive:
            yield
            return
        before = termios.tcgetattr(sys.stdin)
        kept = [*before[:3], before[3] & ~(termios.ICANON | termios.ECHO), *before[4:]]
        termios.tcsetattr(sys.stdin, termios.TCSANOW, kept)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(clean(text), style=style, soft_wrap=not self.interactive)  # in a pipe no line is broken

    def write(self, text: str) -> None:
        """Text without a line's end, shown at once."""
        self.console.print(clean(text), end="", soft_wrap=True)
        self.console.file.flush()

    def ask(self, prompt: str, remember: bool = True) -> str:
        """A line from the person. Raises EOFError at the end of input and KeyboardInterrupt on Ctrl-C."""
        if self.prompter is None:
            self.write(prompt)
            line = sys.stdin.readline()
            if not line:
                self.say("")
                raise EOFError
            self.say(line.strip())  # the pipe's text is part of the transcript
            return line.strip()
        if remember:
            return self.prompter.prompt(prompt).strip()
        from prompt_toolkit import prompt as ask_once

        return ask_once(prompt).strip()

    def choose(self, quiz: Quiz, answer: str) -> int | str:
        """The person's choice: an option's index, or "skip"."""
        while True:
            choice = parse_choice(self.ask("Your choice (A-D, s skips): ", remember=False), quiz.options)
            if choice is not None:
                return choice
            self.say("Please choose A, B, C or D, type the option's text, or s to skip.")

    def busy(self, text: str):
        """A context that shows `text` and a spinner at a terminal."""
        return self.console.status(text) if self.interactive else contextlib.nullcontext()


def parse_choice(text: str, options: Sequence[str]) -> int | str | None:
    """The index of the chosen option, "skip", or None if `text` is no choice. Letters come before options' texts."""
    text = text.strip().casefold()
    if text == "s":
        return "skip"
    letter = text.rstrip(").") if len(text) < 3 else text
    if len(letter) == 1 and letter in LETTERS.casefold():
        return LETTERS.casefold().index(letter)
    texts = [option.strip().casefold() for option in options]
    return texts.index(text) if text in texts else None


class SecondInterrupt(KeyboardInterrupt):
    """Ctrl-C while the first one was still waiting: the program ends now."""


class SimulatedLearner(Terminal):
    """Sits at the tutor in a person's place: asks the questions of a list, and chooses by what the answers say."""

    waits_for_a_person = False  # it thinks with the policy's own base model

    def __init__(self, policy: Policy, questions: Sequence[str], steps: int):
        super().__init__(None)
        self.policy, self.questions, self.last = policy, questions, policy.step + steps
        self.asked, self.chosen, self.chosen_then = 0, 0, -1

    def ask(self, prompt: str, remember: bool = True) -> str:
        """The next question, over and over, until the steps are taken; then EOFError, as when a person leaves."""
        if self.asked % len(self.questions) == 0:
            if self.chosen == self.chosen_then:
                self.say("\nNot one of the questions led to a quiz.", "yellow")
                raise EOFError
            self.chosen_then = self.chosen
        if self.policy.step >= self.last:
            raise EOFError
        question = self.questions[self.asked % len(self.questions)]
        self.asked += 1
        self.say(f"{prompt}{question}")
        return question

    def choose(self, quiz: Quiz, answer: str) -> int:
        (choice,) = learner_choices(*learner_probabilities(self.policy, [answer], [quiz]))
        self.say(f"The learner chooses {LETTERS[choice]}.")
        self.chosen += 1
        return choice


def read_questions(path: str) -> list[str]:
    """The questions of a text file, one a line; empty lines don't count. Raises ConfigError naming file and line."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"questions={path}: {error.strerror or error}") from None
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            questions.append(line.decode("utf-8-sig" if number == 1 else "utf-8").strip())
        except UnicodeDecodeError:
            raise ConfigError(f"questions={path}: line {number} is not UTF-8 text") from None
        if clean(questions[-1]) != questions[-1]:
            raise ConfigError(f"questions={path}: line {number} holds a control character")
    questions = [question for question in questions if question]
    if not questions:
        raise ConfigError(f"questions={path} holds no question: write one a line")
    return questions


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """A Ctrl-C in here takes effect at the end; a second one, also after one that is on its way, ends the program."""
    seen: list[int] = []
    another = isinstance(sys.exception(), KeyboardInterrupt)

    def note(number: int, frame: Any) -> None:
        if seen or another:
            raise SecondInterrupt
        seen.append(number)

    try:
        previous = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: no signal arrives here
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if seen:
        raise KeyboardInterrupt


def banner(policy: Policy, config: Config, run: Run) -> str:
    """What a person sees first."""
    size = sum(p.numel() for p in policy.parameters.values())
    total = sum(p.numel() for n, p in policy.model.named_parameters() if n not in policy.parameters)
    precision = "4-bit NF4" if config.load_in_4bit == "true" else config.dtype
    return "\n".join(
        [
            f"model    {base_name(config)} ({total / 1e6:,.1f} M parameters, {precision}, on {config.device})",
            f"adapter  LoRA rank {config.lora_r} on {len(policy.targets)} layer types, {size / 1e6:.2f} M trainable",
            f"step     {policy.step}, saved every {config.save_every} steps in {run.folder}",
            f"log      {run.log.path}",
            "help     /help lists the commands; an empty line asks again; Ctrl-D leaves",
        ]
    )


def session(policy: Policy, run: Run, terminal: Terminal) -> int:
    """Questions, answers, quizzes and steps, until the person leaves. Returns the exit status."""
    interrupted = False
    while True:
        try:
            question = terminal.ask("\nYou: ")
            interrupted = False
        except EOFError:
            return 0
        except KeyboardInterrupt:
            return 130 if interrupted else 0
        try:
            if question.startswith("/"):
                if command(question, policy, run, terminal):
                    return 0
            elif question:
                take_turn(question, policy, run, terminal)
        except EOFError:
            return 0
        except SecondInterrupt:
            return 130
        except KeyboardInterrupt:
            interrupted = True
            terminal.say("\nInterrupted. Finished turns are kept.", "yellow")
        except Exception as error:
            if not out_of_memory(error):
                raise
            terminal.say(f"\nThe turn ended: {OUT_OF_MEMORY}", "yellow")


def take_turn(question: str, policy: Policy, run: Run, terminal: Terminal) -> None:
    """One question: the answer, the quiz, the choice, and the step it earns."""
    config, tokenizer = run.config, policy.tokenizer
    prompt = encode_chat(tokenizer, chat(TUTOR_PROMPT, question))
    longest = max(len(prompt), len(encode_chat(tokenizer, chat(QUIZMASTER_PROMPT, question))))
    if longest + config.max_new_tokens > policy.context:
        room = policy.context - config.max_new_tokens
        terminal.say(
            f"That question takes {longest} tokens with its instructions; the model has room for {room}.", "yellow"
        )
        return
    number = run.turn
    try:
        answer_and_quiz(question, prompt, policy, run, terminal)
    finally:
        with interrupts_deferred():
            run.forget()
            if run.turn == number:
                run.pass_over(number)


def answer_and_quiz(question: str, prompt: list[int], policy: Policy, run: Run, terminal: Terminal) -> None:
    """The turn from the answer on."""
    import torch

    config, tokenizer, number = run.config, policy.tokenizer, run.turn
    torch.manual_seed(turn_seed(config.seed, number))
    terminal.write("Tutor: ")
    answering = Request(prompt, config.temperature, on_text=terminal.write)
    response, written = replies(policy, [answering, quiz_request(policy, question)])
    answer = tokenizer.decode(response, skip_special_tokens=True)
    terminal.say("" if answer.strip() else "(no answer)")
    with terminal.busy("making a quiz"):
        quiz = make_quiz(policy, question, written)
    if quiz is None:
        terminal.say("No sound quiz could be made on this question, so it earns no reward and no step.", "yellow")
        return
    terminal.say(f"\nQuiz: {quiz_text(quiz.question, quiz.options)}", "bold")
    turn = Turn(number, prompt, response, math.nan)
    if terminal.waits_for_a_person:
        with interrupts_deferred():
            run.foresee(turn)
    choice = terminal.choose(quiz, answer)
    if choice == "skip":
        terminal.say("Skipped: no reward, no step.")
        return
    turn.reward = 1.0 if choice == quiz.key else -1.0
    line = {"question": question, "answer": answer, "quiz_id": f"quiz-{number}", "user_answer": LETTERS[choice]}
    with interrupts_deferred():
        line = run.finish_turn(turn, line)
        show_outcome(line, run, terminal)


def show_outcome(line: dict[str, Any], run: Run, terminal: Terminal) -> None:
    """Right or wrong, and what the step did."""
    right = line["reward"] > 0
    terminal.say(f"{'Right' if right else 'Wrong'}. Reward {line['reward']:+g}.", "green" if right else "red")
    if line["outcome"] == "pending":
        terminal.say(f"{len(run.pending)} of {run.config.batch_size} answers for the next step.")
    elif line["outcome"] == "skipped":
        terminal.say(f"No step was taken: {line['why']}. The weights are as they were.", "yellow")
    elif line["outcome"] == "undone":
        terminal.say(
            f"Step {line['step']} was undone: it moved the policy by {line['step_kl']:.3f} nats per token, "
            f"more than target_kl={run.config.target_kl:g}.",
            "yellow",
        )
    else:
        those = "this answer is" if run.config.batch_size == 1 else "these answers together are"
        terminal.say(
            f"Step {line['step']} took {line['seconds']:.2f} s and moved the policy by {line['step_kl']:.2g} nats per "
            f"token: {those} now {line['likelihood_ratio']:.3g} times as likely.",
            "dim",
        )


def command(text: str, policy: Policy, run: Run, terminal: Terminal) -> bool:
    """Carries out a /command; True if the session ends."""
    name = text.split()[0].lower()
    if name == "/quit":
        return True
    if name == "/help":
        terminal.say(HELP)
    elif name == "/progress":
        terminal.say(progress_chart([line["reward"] for line in run.history()]))
    elif name == "/undo":
        step = policy.step
        with interrupts_deferred():
            undone = run.undo()
        if undone and policy.step == step:
            terminal.say("The last answer was taken back before its step.")
        else:
            terminal.say(
                f"Step {step} was taken back; the tutor is at step {policy.step}." if undone else "No step to undo."
            )
    elif name == "/save":
        with interrupts_deferred():
            saved = run.save()
        if saved:
            terminal.say(f"Saved {run.folder / f'step_{policy.step}'}.")
    elif name == "/config":
        terminal.say("\n".join(f"{key}: {value}" for key, value in asdict(run.config).items()))
    else:
        terminal.say(f"There is no command {name}; /help lists them.")
    return False


def progress_chart(rewards: Sequence[float], columns: int = 60, rows: int = 5, window: int = 10) -> str:
    """Accuracy over the last `window` quizzes, drawn over all of them, and the totals."""
    if not rewards:
        return "No quiz was answered yet."
    right = [float(reward > 0) for reward in rewards]
    means = [sum(right[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(right))]
    width = min(columns, len(means))
    points = [means[(i + 1) * len(means) // width - 1] for i in range(width)]
    lines = []
    for row in reversed(range(rows)):
        least = 0 if row else 1  # a share of 0 is to be seen too
        cells = [" ▁▂▃▄▅▆▇█"[max(round(min(max(p * rows - row, 0.0), 1.0) * 8), least)] for p in points]
        share = (row + 1) / rows
        lines.append(f"{100 * share:>4.0f} % {2 * share - 1:+5.1f} {''.join(cells)}".rstrip())
    mean_reward = sum(rewards) / len(rewards)
    last = rewards[-window:]
    return "\n".join(
        [
            f"right answers and mean reward, running over {window} quizzes",
            *lines,
            "             1" + (f"{len(rewards):>{width - 1}}" if width > 4 else ""),
            f"accuracy {sum(right) / len(right):.0%} of {len(right)}, mean reward {mean_reward:+.2f}; "
            f"last {len(last)}: {sum(right[-window:]) / len(last):.0%}, {sum(last) / len(last):+.2f}",
        ]
    )


USAGE = """usage: python lora_ppo_demo.py [--config FILE] [name=value ...]

A tutor that learns from whether you understood: ask, read the answer, take the quiz; each result trains it."""


def main() -> int:
    """The program. Exit status: 0; 2 for a setting that can't be used; 130 after a second Ctrl-C."""
    run, status = None, 0
    try:
        config = from_command_line(Config, USAGE)
        questions = read_questions(config.questions) if config.learner == "simulated" else []
        terminal = Terminal(Path(config.log_dir) / "history")

        def notice(text: str) -> None:
            terminal.say(text, "yellow")

        try:
            policy, config = load_policy(config, notice)
            run = Run(policy, config, notice)
            if questions:
                terminal = SimulatedLearner(policy, questions, config.steps)
            terminal.say(banner(policy, config, run), "cyan")
            with terminal.keys_kept():
                status = session(policy, run, terminal)
        except KeyboardInterrupt:  # while loading
            terminal.say("\nInterrupted.")
        # After a second Ctrl-C nothing is saved: the journal has every turn, and the weights may be half of a step.
        if run and status == 0 and run.policy.step > run.saved_step and run.save():
            terminal.say(f"Saved step {policy.step} in {run.folder}. Goodbye.")
        if run and run.journal.unwritten:
            terminal.say(f"{run.folder} could not be written to: what was learnt since step {run.saved_step} is lost.")
        return status
    except ConfigError as error:
        print(f"error: {clean(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        if run:
            run.close()


if __name__ == "__main__":
    raise SystemExit(main())
