"""The quiz: how people and models read it, what makes one worthless, and the simulated learner who takes it."""

import json
import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_ppo.chat import Message, encode_chat, encode_text
from lora_ppo.forward import collate, token_logprobs_and_values
from lora_ppo.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor


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


PLACEHOLDER = re.compile(  # of an option's words
    r"(none|all) of (the )?(these|those|them|above)|(correct|wrong|right|other|another) (answer|option|choice)|"
    r"(option|answer|choice|wrong|correct)( (answer|option))? (\w|\d+)|not (given|available)|placeholder|tbd|etc"
)
ACCENTED = ("LATIN", "GREEK", "CYRILLIC")  # scripts in which a mark on a letter is an accent


def one_line(text: str) -> str:
    """`text` with every run of white space, line breaks included, as one space: an option can't forge another line."""
    return " ".join(text.split())


def bare(text: str) -> str:
    """`text` without case, punctuation, articles and accents: what is equal here, a person takes for the same."""
    letters: list[str] = []
    for c in unicodedata.normalize("NFKD", text).casefold():
        accent = letters and unicodedata.combining(c) and unicodedata.name(letters[-1], "").startswith(ACCENTED)
        letters += [] if accent else [c]
    words = re.findall(r"-?\d+(?:[.,:/]\d+)*|\w+", unicodedata.normalize("NFC", "".join(letters)).replace("_", " "))
    return " ".join(word for word in words if word not in ("a", "an", "the")) or " ".join(words)


def option_flaw(question: str, option: str) -> str:
    """What makes an option worthless in a quiz on `question`, in words; "" if nothing does."""
    text, words = bare(option), " ".join(re.findall(r"\w+", option.casefold()))
    if not text:
        return f"the option {option!r} has no letters or digits"
    if PLACEHOLDER.fullmatch(words) or re.fullmatch(r"[<[{].*[>\]}]|n/a", option.casefold()):
        return f"the option {option!r} is a placeholder"
    if f" {text} " in f" {bare(question)} " and not text.isdecimal():  # 2 + 4 = 6 may have 4 for a wrong option
        return f"the option {option!r} stands in the question"
    return ""


def flaw(question: str, options: Sequence[str]) -> str:
    """What makes a quiz worthless, whatever its key, in words; "" for one that has nothing of the kind."""
    if problem := next(filter(None, (option_flaw(question, option) for option in options)), ""):
        return problem
    if len(set(map(bare, options))) < len(options):
        return "two options say the same"
    *_, second, longest = sorted(map(len, options))
    if longest > 3 * max(second, 12):
        return "one option is several times as long as the others"
    return "" if bare(question) else "its question has no words"


def parse_quiz(text: str, why: list[str] | None = None) -> tuple[str, str, list[str]] | None:
    """(question, correct, wrong) from the quizmaster's JSON. None for broken JSON and for a worthless quiz.

    The reason is added to `why`.
    """
    why = [] if why is None else why
    try:
        quiz = json.loads(text)
        question, *options = (one_line(part) for part in (quiz["question"], quiz["correct"], *quiz["wrong"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        why.append("the quizmaster's reply was cut short")
        return None
    if len(options) != len(LETTERS) or (problem := flaw(question, options)):
        why.append(problem if len(options) == len(LETTERS) else f"it has {len(options)} options")
        return None
    return question, options[0], options[1:]


def shuffle_quiz(question: str, correct: str, wrong: Sequence[str]) -> Quiz:
    """The options in an order drawn from torch's global generator.

    A turn's seed is the same in every run. So the question decides, too: else all first ones had the same right letter.
    """
    import torch

    options = [correct, *wrong]
    order = torch.randperm(len(options)).tolist()
    turned = zlib.crc32(question.encode("utf-8", "surrogatepass")) % len(order)
    order = order[turned:] + order[:turned]
    return Quiz(question, tuple(options[i] for i in order), order.index(0))


def reshuffled(quiz: Quiz) -> Quiz:
    """The same quiz, its options in a new order."""
    wrong = [option for i, option in enumerate(quiz.options) if i != quiz.key]
    return shuffle_quiz(quiz.question, quiz.options[quiz.key], wrong)


def option_probabilities(policy: Policy, chats: Sequence[list[Message]], options: Sequence[Sequence[str]]) -> "Tensor":
    """How probable it is (B, 4) that the base model's reply to each of B chats is each of its options, if it is one.

    A reply is scored whole, its end token included, so that no option gains by beginning like another.
    """
    prompts = [encode_chat(policy.tokenizer, messages) for messages in chats]
    told = [[*encode_text(policy.tokenizer, text), policy.end_id] for texts in options for text in texts]
    asked = [prompt for prompt, texts in zip(prompts, options, strict=True) for _ in texts]
    return reply_logprobs(policy, asked, told).view(len(chats), -1).softmax(-1)


def reply_logprobs(policy: Policy, prompts: Sequence[list[int]], told: Sequence[list[int]]) -> "Tensor":
    """The log-probability (B,), in nats, that the base model replies to each of B prompts with exactly these tokens."""
    import torch

    batch = collate(prompts, told, policy.pad_id, policy.device)
    with torch.no_grad():
        logprobs, _, _ = token_logprobs_and_values(policy, batch, adapter=False, temperature=1.0)
    return logprobs.masked_fill(~batch.response_mask, 0.0).sum(-1)


def fits(policy: Policy, chats: Sequence[list[Message]], options: Sequence[Sequence[str]]) -> bool:
    """Whether the model's context holds each of B chats with any of its options, and an end token, as the reply."""
    replies = [1 + max(len(encode_text(policy.tokenizer, text)) for text in texts) for texts in options]
    prompts = (len(encode_chat(policy.tokenizer, messages)) for messages in chats)
    return all(prompt + reply <= policy.context for prompt, reply in zip(prompts, replies, strict=True))


def readable(policy: Policy, answer: str, quiz: Quiz) -> str | None:
    """As much of an answer as leaves a learner room for the quiz in the model's context; None where nothing does."""
    while not fits(policy, [learner_chat(policy, answer, quiz)], [quiz.options]):
        if not answer:
            return None
        answer = answer[: len(answer) * 3 // 4]
    return answer


def learner_chat(policy: Policy, answer: str, quiz: Quiz) -> list[Message]:
    return policy.prompts.learner.messages(learner_text(answer, quiz.question, quiz.options))


def learner_probabilities(policy: Policy, answers: Sequence[str], quizzes: Sequence[Quiz]) -> tuple["Tensor", "Tensor"]:
    """How probable each option is to a learner who has read the answer, and to one who has read none; both (B, 4).

    An answer is read as far as the model's context goes; each quiz alone has to fit (`readable`).
    """
    read_by_one = [readable(policy, answer, quiz) or "" for answer, quiz in zip(answers, quizzes, strict=True)]
    answers, quizzes = [*read_by_one, *[""] * len(quizzes)], [*quizzes, *quizzes]
    chats = [learner_chat(policy, answer, quiz) for answer, quiz in zip(answers, quizzes, strict=True)]
    read, unread = option_probabilities(policy, chats, [quiz.options for quiz in quizzes]).chunk(2)
    return read, unread


def learner_choices(read: "Tensor", unread: "Tensor") -> list[int]:
    """What the learner chooses, by its probabilities (B, 4) with the answer and without one.

    That is the option whose probability the answer raised most. A fondness for a place or a spelling is there without
    an answer too, and cancels (Zhao et al. 2021, https://arxiv.org/abs/2102.09690).
    """
    least = 1e-30  # below it a probability is rounding
    return (read.clamp(min=least) / unread.clamp(min=least)).argmax(-1).tolist()
