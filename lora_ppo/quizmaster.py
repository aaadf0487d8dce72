"""How a quiz is written: its grammar, and the gate that lets it through or not. All by the base model, adapters off.

The question alone decides it, never the answer, so the policy can't learn to make easy quizzes. A model that knows
something says the same when it is asked again and again, also in other words; so the key is what several short answers
agree on, each written blind to any option. Wrong options are asked for afterwards. From how much agreement on a model
can be trusted is measured on that very model (gate.py). The bundled model was trained to write whole quizzes, and to
solve them.
"""

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_ppo.chat import Message, encode_chat, encode_text
from lora_ppo.generate import Request, replies
from lora_ppo.policy import Policy
from lora_ppo.quiz import (
    LETTERS,
    Quiz,
    bare,
    fits,
    one_line,
    option_flaw,
    option_probabilities,
    parse_quiz,
    quiz_json,
    quiz_text,
    reply_logprobs,
    shuffle_quiz,
)

if TYPE_CHECKING:
    from torch import Tensor


ANSWERS = 16  # short answers to a question, of which the most frequent is the key; half of them to a rewording of it
WRITINGS = 8  # times that the wrong options are asked for
VARIETY = 0.7  # the sampling temperature of both: at a lower one, agreement says less
LIKELIEST = 0.01  # that of the rewording
NEARLY = 0.7  # of two words that are spelt alike, what difflib's ratio is above
LONGEST, ANSWER_LENGTH = 3, 40  # words of an option; characters of a short answer, after which it is given up

QUESTION_LENGTH, OPTION_LENGTH = 200, 80  # characters
QUIZ_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "question": {"type": "string", "minLength": 1, "maxLength": QUESTION_LENGTH},
                "correct": {"type": "string", "minLength": 1, "maxLength": OPTION_LENGTH},
                "wrong": {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": OPTION_LENGTH},
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

    With a `question` it ends behind the correct option, which may not be a word of that question; with `rewording` it
    ends behind the quiz's question. Made for one reply: call it with the ids so far (1, P + t) and the next token's
    scores (1, V), as transformers does.
    """

    def __init__(self, policy: Policy, prompt_length: int, question: str = "", rewording: bool = False):
        import llguidance

        self.policy, self.prompt_length, self.consumed, self.rewording = policy, prompt_length, 0, rewording
        self.asked = sorted({form for w in re.findall(r"[^\W\d_]+", question) for form in (w, w.lower(), w.title())})
        schema = llguidance.LLMatcher.grammar_from_json_schema(QUIZ_SCHEMA, overrides={"whitespace_flexible": False})
        self.matcher = llguidance.LLMatcher(policy.ll_tokenizer, schema, log_level=0)

    def __call__(self, ids: "Tensor", scores: "Tensor") -> "Tensor":
        import torch

        written = ids[0, self.prompt_length :].tolist()
        self.matcher.consume_tokens(written[self.consumed :])
        self.consumed = len(written)
        allowed = torch.zeros(scores.shape[-1], dtype=torch.bool)
        text = self.policy.tokenizer.decode(written)
        options = text.partition('"correct":')[2]
        answered = self.asked and (option_keys(options) or len(options) > ANSWER_LENGTH)
        reworded = self.rewording and len(JSON_STRING.findall(text)) > 1
        if self.matcher.is_stopped() or answered or reworded:
            allowed[self.policy.stop_ids] = True
        else:
            allowed |= self.next_tokens(scores.shape[-1])
            repeats = self.repeating_tokens(options, allowed) if options else []
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

    def repeating_tokens(self, options: str, allowed: "Tensor") -> list[int]:
        """The allowed tokens that would end an option that an earlier one equals, or complete a word of one.

        `options` is the JSON behind `"correct":`. Refused at its end alone, a word would go on as another that nobody
        knows; numbers may begin alike.
        """
        repeats = set()
        for token, text in self.policy.quote_tokens.items():
            if allowed[token]:
                options_then = option_keys(options + text)
                repeats |= {token} if len(set(options_then)) < len(options_then) else set()
        options = options.replace('"wrong":', "")
        _, unfinished, beginning = JSON_STRING.sub("", options).partition('"')
        words = self.asked or JSON_STRING.findall(options)
        if self.asked:  # each word of the option by itself
            beginning = re.split(r"[\W_]", beginning)[-1]
        for word in words if unfinished else ():
            if word.startswith(beginning) and word != beginning and not word.isdigit():
                rest = word[len(beginning) :]
                for ending in (rest,) if beginning or not self.asked else (rest, f" {rest}"):
                    last = self.policy.tokenizer.encode(ending, add_special_tokens=False)
                    repeats |= {token for token in last if len(last) == 1 and allowed[token]}
        return list(repeats)


def option_keys(options: str) -> list[str]:
    """The finished options in the JSON behind `"correct":`, in a form in which equal options are equal."""
    return [one_line(json.loads(f'"{raw}"')).casefold() for raw in JSON_STRING.findall(options.replace('"wrong":', ""))]


# ---------------------------------------------------------------------------------------------------- asked and made


def first_requests(policy: Policy, question: str) -> list[Request]:
    """What a quiz on `question` begins with, to be written beside the answer: `make_quiz` takes the replies."""
    if policy.quiz_gate.signal == "agreement":
        return [*answer_requests(policy, question), rewording_request(policy, question)]
    return [quiz_request(policy, question)] if policy.quiz_gate.signal else []


def make_quiz(
    policy: Policy, question: str, written: Sequence[list[int]] = (), why: list[str] | None = None
) -> Quiz | None:
    """A quiz on `question` that gets through the model's gate; None if there is nothing to quiz, or none is sound.

    `written` are the replies to `first_requests` where there are some already. To `why` is added what stood in the way.
    """
    why, gate = [] if why is None else why, policy.quiz_gate
    if not gate.signal:
        why.append("this model makes no quizzes: " + gate.worth().removeprefix("none: "))
        return None
    written = written or replies(policy, first_requests(policy, question))
    if gate.signal == "agreement":
        return agreed_quiz(policy, question, written, why)
    return solved_quiz(policy, question, written[0], why, policy.config.quiz_tries)


# ------------------------------------------------------------------------------------------------------ by agreement


@dataclass(frozen=True)
class Draft:
    """A quiz before its gate: how many of ANSWERS agree on its key, and by how much that is likelier than each other.

    `wrong` are options and the key's leads over them (nats).
    """

    question: str
    key: str
    agreement: int
    wrong: tuple[tuple[str, float], ...] = ()

    def options(self, lead: float) -> list[str]:
        """The key, then those three of the wrong options that come nearest to it, but for `lead`."""
        wrong = sorted((nats, option) for option, nats in self.wrong if nats >= lead)
        return [self.key, *[option for _, option in wrong[: len(LETTERS) - 1]]]


def agreed_quiz(policy: Policy, question: str, written: Sequence[list[int]], why: list[str]) -> Quiz | None:
    """A quiz whose key is what independent short answers agree on."""
    gate = policy.quiz_gate
    if len(question) > QUESTION_LENGTH:
        why.append(f"the question has {len(question)} characters, that of a quiz at most {QUESTION_LENGTH}")
        return None
    # 1. The key: what most of the answers say, if enough of them do. Where they still can, the other half is asked for.
    *written, rewording = written
    draft = agree(policy, question, written)
    if (draft.agreement if draft else 0) + ANSWERS - len(written) >= gate.agreement:
        again = reworded(policy, rewording) or question
        room = policy.context - policy.config.max_new_tokens
        written += replies(policy, answer_requests(policy, again if len(opening(policy, again)) <= room else question))
        draft = agree(policy, question, written)
    if not draft:
        why.append("none of the model's short answers can be a quiz's key")
        return None
    if draft.agreement < gate.agreement:
        agreed = f"only {draft.agreement} of {len(written)} short answers agree, on {draft.key!r}"
        why.append(f"{agreed}; {gate.agreement} of {ANSWERS} must")
        return None
    # 2. Wrong options, and how much less likely each is as an answer. Too few are asked for again.
    for _ in range(policy.config.quiz_tries):
        draft = with_wrong_options(policy, draft)
        options = draft.options(gate.lead)
        if len(options) == len(LETTERS):
            return shuffle_quiz(draft.question, options[0], options[1:])
    why.append(f"for {draft.key!r} the model found {len(options) - 1} wrong options that it holds wrong; 3 are needed")
    return None


def begun(policy: Policy, question: str, key: str | None = None) -> tuple[list[int], list[int]]:
    """The quizmaster's prompt, and the JSON that is begun for it: up to where the key, or the wrong options, follow."""
    prompt = encode_chat(policy.tokenizer, policy.prompts.quizmaster.messages(question))
    if key is None:
        beginning = quiz_json(one_line(question), "", []).removesuffix('","wrong":[]}')
    else:
        beginning = quiz_json(one_line(question), key, []).removesuffix("]}") + '"'
    return prompt, encode_text(policy.tokenizer, beginning)


def opening(policy: Policy, question: str) -> list[int]:
    """What the quizmaster reads before it writes: its prompt, and the JSON that is begun where its key is agreed on."""
    prompt, beginning = begun(policy, question)
    return prompt + beginning if policy.quiz_gate.signal == "agreement" or not policy.quiz_gate.asked else prompt


def answer_requests(policy: Policy, question: str) -> list[Request]:
    """Asks for half of the short answers: each the `correct` of a quiz that is begun."""
    prompt, beginning = begun(policy, question)
    grammars = [QuizGrammar(policy, len(prompt), one_line(question)) for _ in range(ANSWERS // 2)]
    return [Request(prompt + beginning, VARIETY, adapter=False, grammar=grammar) for grammar in grammars]


def rewording_request(policy: Policy, question: str) -> Request:
    """Asks for the question in the model's own words: the `question` of a quiz that is begun."""
    prompt, _ = begun(policy, question)
    beginning = encode_text(policy.tokenizer, '{"question":"')
    grammar = QuizGrammar(policy, len(prompt), rewording=True)
    return Request(prompt + beginning, LIKELIEST, adapter=False, grammar=grammar)


def reworded(policy: Policy, ids: Sequence[int]) -> str:
    """The question that a reply to `rewording_request` puts; "" for one that was cut off."""
    found = JSON_STRING.match('"' + policy.text(ids))
    return one_line(json.loads(found[0])) if found else ""


def agree(policy: Policy, question: str, written: Sequence[list[int]]) -> Draft | None:
    """What most of the short answers say. Those that can't be a key, too long or from the question, are against it."""
    spellings: dict[str, Counter[str]] = {}
    for whole in (JSON_STRING.match('"' + policy.text(ids)) for ids in written):
        if whole and usable(text := one_line(json.loads(whole[0])), question) and not echoes(text, question):
            spellings.setdefault(bare(text), Counter())[text] += 1
    if not spellings:
        return None
    agreed = max(spellings.values(), key=Counter.total)
    return Draft(one_line(question), agreed.most_common(1)[0][0], agreed.total())


def with_wrong_options(policy: Policy, draft: Draft) -> Draft:
    """The draft with more wrong options, each compared with its key."""
    prompt, beginning = begun(policy, draft.question, draft.key)
    if len(prompt) + len(beginning) + policy.config.max_new_tokens > policy.context:
        return draft
    asked = [
        Request(prompt + beginning, VARIETY, adapter=False, grammar=QuizGrammar(policy, len(prompt)))
        for _ in range(WRITINGS)
    ]
    counts: Counter[str] = Counter()
    for ids in replies(policy, asked):
        text = '"' + policy.text(ids)
        counts.update(one_line(json.loads(f'"{raw}"')) for raw in JSON_STRING.findall(text))
    found: list[str] = []
    for option, count in counts.most_common():
        others = [draft.key, *(known for known, _ in draft.wrong), *found]
        if usable(option, draft.question) and not any(alike(option, other) for other in others):
            if count == 1 and len(found) >= len(LETTERS) - 1:
                break  # what was written once is often no word at all
            found.append(option)
    if not found:
        return draft
    key, *others = answer_logprobs(policy, draft.question, [draft.key, *found])
    wrong = [(option, key - logprob) for option, logprob in zip(found, others, strict=True)]
    return Draft(draft.question, draft.key, draft.agreement, (*draft.wrong, *wrong))


def usable(option: str, question: str) -> bool:
    """Whether `option` may stand in a quiz on the question: short, and not worthless."""
    return len(option.split()) <= LONGEST and not option_flaw(question, option)


def alike(option: str, other: str) -> bool:
    """Whether a person may take two options for the same: one holds the other, or is spelt nearly so."""
    a, b = bare(option), bare(other)
    if a.isdecimal() or b.isdecimal():
        return a == b
    short, long = sorted((a, b), key=len)
    held = f" {short} " in f" {long} " or (len(short) > 3 and short in long)
    return held or difflib.SequenceMatcher(None, a, b).ratio() > NEARLY


def echoes(answer: str, question: str) -> bool:
    """Whether an answer says a longer word of the question again, or nearly so: "lions" for "What is a young lion?"

    Or its one number. A model that knows nothing agrees with itself on that best of all. "Lithuanian" for Lithuania's
    language is lost.
    """
    words, answered = bare(question).split(), bare(answer).split()
    if answered == [word for word in words if word.isdecimal()]:
        return True
    asked = [word for word in words if len(word) > 3 and not word.isdecimal()]
    return any(alike(said, word) for said in answered for word in asked)


def answer_logprobs(policy: Policy, question: str, options: Sequence[str]) -> list[float]:
    """How likely each option is as the whole short answer to the question: its log-probability in nats."""
    prompt, beginning = begun(policy, question)
    closing = '","wrong":["'
    told = []
    for option in options:
        written = json.dumps(option, ensure_ascii=False)[1:-1]
        ids, quotes, end = encode_text(policy.tokenizer, written + closing), written.count('"'), 0
        while quotes >= 0:  # up to the token with the quote that ends it
            quotes -= policy.quote_tokens.get(ids[end], "").count('"')
            end += 1
        told.append(ids[:end])
    return reply_logprobs(policy, [prompt + beginning] * len(told), told).tolist()


# ------------------------------------------------------------------------------- written whole, solved by its options


def quiz_request(policy: Policy, question: str) -> Request:
    """Asks the quizmaster for the JSON of a quiz on `question`, or `null`."""
    prompt = encode_chat(policy.tokenizer, policy.prompts.quizmaster.messages(question))
    grammar = QuizGrammar(policy, len(prompt))
    return Request(prompt, policy.config.quiz_temperature, adapter=False, grammar=grammar)


def solved_quiz(policy: Policy, question: str, ids: list[int], why: list[str], tries: int = 1) -> Quiz | None:
    """A quiz that the quizmaster wrote whole and the solver confirms. `ids` is the first of so many tries."""
    for i in range(tries):
        if i:
            ids = replies(policy, [quiz_request(policy, question)])[0]
        text = policy.text(ids)
        if text == "null":
            why.append("the quizmaster found nothing to ask")
            return None
        if parts := parse_quiz(text, why):
            quiz = shuffle_quiz(*parts)
            if not fits(policy, *solver_chats(policy, quiz)):
                why.append("the quiz is too long for the model's context")
            elif survives(policy, quiz):
                return quiz
            else:
                why.append("the base model, asked without the key, did not agree with it")
    return None


def survives(policy: Policy, quiz: Quiz) -> bool:
    """Whether the base model, blind to the key, picks it in more than half of the four rotations of the options."""
    n = len(quiz.options)
    picks = option_probabilities(policy, *solver_chats(policy, quiz)).argmax(-1).tolist()
    right = sum((pick + shift) % n == quiz.key for shift, pick in enumerate(picks))
    return right > n // 2


def solver_chats(policy: Policy, quiz: Quiz) -> tuple[list[list[Message]], list[list[str]]]:
    """How a solver is asked the quiz, once for each rotation of its options, and these."""
    n = len(quiz.options)
    rotations = [[quiz.options[(i + shift) % n] for i in range(n)] for shift in range(n)]
    return [policy.prompts.solver.messages(quiz_text(quiz.question, options)) for options in rotations], rotations
