"""The quiz: its grammar, how it is written and parsed, the gate that confirms its key, and the simulated learner."""

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_ppo.chat import Message, encode_chat, encode_text
from lora_ppo.forward import collate, token_logprobs_and_values
from lora_ppo.generate import Request, replies
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
PLACEHOLDER = re.compile(  # of an option's words
    r"(none|all) of (the )?(these|those|them|above)|(correct|wrong|right|other|another) (answer|option|choice)|"
    r"(option|answer|choice|wrong|correct)( (answer|option))? (\w|\d+)|not (given|available)|placeholder|tbd|etc"
)
ACCENTED = ("LATIN", "GREEK", "CYRILLIC")  # scripts in which a mark on a letter is an accent
JSON_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


class QuizGrammar:
    """Allows only what continues a quiz in compact JSON (or `null`), and no option that repeats an earlier one.

    Made for one reply: call it with the ids so far (1, P + t) and the next token's scores (1, V), as transformers does.
    """

    def __init__(self, policy: Policy, prompt_length: int):
        import llguidance

        self.policy, self.prompt_length, self.consumed = policy, prompt_length, 0
        schema = llguidance.LLMatcher.grammar_from_json_schema(QUIZ_SCHEMA, overrides={"whitespace_flexible": False})
        self.matcher = llguidance.LLMatcher(policy.ll_tokenizer, schema, log_level=0)

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

        bits = llguidance.numpy.allocate_token_bitmask(1, self.policy.ll_tokenizer.vocab_size)
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


def bare(text: str) -> str:
    """`text` without case, punctuation, articles and accents: what is equal here, a person takes for the same."""
    letters: list[str] = []
    for c in unicodedata.normalize("NFKD", text).casefold():
        accent = letters and unicodedata.combining(c) and unicodedata.name(letters[-1], "").startswith(ACCENTED)
        letters += [] if accent else [c]
    words = re.findall(r"-?\d+(?:[.,:/]\d+)*|\w+", unicodedata.normalize("NFC", "".join(letters)).replace("_", " "))
    return " ".join(word for word in words if word not in ("a", "an", "the")) or " ".join(words)


def flaw(question: str, options: Sequence[str]) -> str:
    """What makes a quiz worthless, whatever its key, in words; "" for one that has nothing of the kind."""
    bares, asked = [bare(option) for option in options], f" {bare(question)} "
    for option, text in zip(options, bares, strict=True):
        if not text:
            return f"the option {option!r} has no letters or digits"
        words = " ".join(re.findall(r"\w+", option.casefold()))
        if PLACEHOLDER.fullmatch(words) or re.fullmatch(r"[<[{].*[>\]}]|n/a", option.casefold()):
            return f"the option {option!r} is a placeholder"
        if f" {text} " in asked and not text.isdecimal():  # 2 + 4 = 6 may have 4 for a wrong option
            return f"the option {option!r} stands in the question"
    if len(set(bares)) < len(bares):
        return "two options say the same"
    *_, second, longest = sorted(map(len, options))
    if longest > 3 * max(second, 12):
        return "one option is several times as long as the others"
    return "" if asked.strip() else "its question has no words"


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


def quiz_request(policy: Policy, question: str) -> Request:
    """Asks the quizmaster for the JSON of a quiz on `question`, or `null`.

    It is the base model and sees the question alone: the policy can't learn to make easy quizzes.
    """
    prompt = encode_chat(policy.tokenizer, policy.prompts.quizmaster.messages(question))
    grammar = QuizGrammar(policy, len(prompt))
    return Request(prompt, policy.config.quiz_temperature, adapter=False, grammar=grammar)


def make_quiz(
    policy: Policy, question: str, written: list[int] | None = None, why: list[str] | None = None
) -> Quiz | None:
    """A quiz on `question` whose key the base model confirms; None if there is nothing to quiz, or none survives.

    `written` is the quizmaster's reply where it was written already, beside the answer: then it is the first try. To
    `why` is added what was wrong with each try that failed.
    """
    why = [] if why is None else why
    for _ in range(policy.config.quiz_tries):
        ids = written or replies(policy, [quiz_request(policy, question)])[0]
        text, written = policy.tokenizer.decode(ids, skip_special_tokens=True), None
        if text == "null":
            why.append("the quizmaster found nothing to ask")
            return None
        if parts := parse_quiz(text, why):
            if survives(policy, quiz := shuffle_quiz(*parts)):
                return quiz
            why.append("the base model, asked without the key, did not agree with it")
    return None


def shuffle_quiz(question: str, correct: str, wrong: Sequence[str]) -> Quiz:
    """The options in an order drawn from torch's global generator."""
    import torch

    options = [correct, *wrong]
    order = torch.randperm(len(options)).tolist()
    return Quiz(question, tuple(options[i] for i in order), order.index(0))


def reshuffled(quiz: Quiz) -> Quiz:
    """The same quiz, its options in a new order."""
    wrong = [option for i, option in enumerate(quiz.options) if i != quiz.key]
    return shuffle_quiz(quiz.question, quiz.options[quiz.key], wrong)


def survives(policy: Policy, quiz: Quiz) -> bool:
    """Whether the base model, blind to the key, picks it in more than half of the four rotations of the options."""
    n = len(quiz.options)
    rotations = [[quiz.options[(i + shift) % n] for i in range(n)] for shift in range(n)]
    chats = [policy.prompts.solver.messages(quiz_text(quiz.question, options)) for options in rotations]
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


def learner_probabilities(policy: Policy, answers: Sequence[str], quizzes: Sequence[Quiz]) -> tuple["Tensor", "Tensor"]:
    """How probable each option is to a learner who has read the answer, and to one who has read none; both (B, 4)."""
    answers, quizzes = [*answers, *[""] * len(quizzes)], [*quizzes, *quizzes]
    pairs = zip(answers, quizzes, strict=True)
    texts = [learner_text(answer, quiz.question, quiz.options) for answer, quiz in pairs]
    chats = [policy.prompts.learner.messages(text) for text in texts]
    read, unread = option_probabilities(policy, chats, [quiz.options for quiz in quizzes]).chunk(2)
    return read, unread


def learner_choices(read: "Tensor", unread: "Tensor") -> list[int]:
    """What the learner chooses, by its probabilities (B, 4) with the answer and without one.

    That is the option whose probability the answer raised most. A fondness for a place or a spelling is there without
    an answer too, and cancels (Zhao et al. 2021, https://arxiv.org/abs/2102.09690).
    """
    least = 1e-30  # below it a probability is rounding
    return (read.clamp(min=least) / unread.clamp(min=least)).argmax(-1).tolist()
