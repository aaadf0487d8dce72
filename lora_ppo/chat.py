"""Chats as token ids. What people and models write stays text, whatever it spells."""

import re
import uuid
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from lora_ppo.settings import ConfigError

Message = dict[str, str]
PLAIN = "plain"  # the role of a first message after which no chat template is used


@lru_cache(maxsize=8)
def control_ids(tokenizer) -> frozenset[int]:
    """Ids that no text may spell: special tokens, others that were added by name (`<think>`), and bytes (`<0x0A>`).

    A run of spaces or a single character that was added for its own sake is text.
    """
    added = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special or len(t.content.strip()) > 1}
    in_bytes = {i for token, i in tokenizer.get_vocab().items() if re.fullmatch("<0x[0-9A-F]{2}>", token)}
    return frozenset({*added, *in_bytes, *tokenizer.all_special_ids})


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of trusted text."""
    return tokenizer(text, add_special_tokens=False).input_ids


@lru_cache(maxsize=1024)  # most of a prompt is the same every time
def text_ids(tokenizer, text: str, trusted: bool = False) -> tuple[int, ...]:
    """`encode_text`; of trusted text, `encode`."""
    ids, control = encode(tokenizer, text), control_ids(tokenizer)
    if trusted or control.isdisjoint(ids):
        return tuple(ids)
    steps = getattr(tokenizer, "backend_tokenizer", None)
    if steps is None:  # a tokenizer written in Python
        return tuple(i for i in ids if i not in control)

    def encode_word(word: str) -> list[int]:
        ids = [token.id for token in steps.model.tokenize(word)]
        # Vocabularies hold the names of control tokens as words. An unknown character, or its bytes, is not their name.
        if not any(steps.id_to_token(i) in word for i in control.intersection(ids)):
            return ids
        half = len(word) // 2
        return encode_word(word[:half]) + encode_word(word[half:]) if half else []

    # The tokenizer's own steps, less its search for added tokens.
    normal = steps.normalizer.normalize_str(text) if steps.normalizer else text
    words = steps.pre_tokenizer.pre_tokenize_str(normal) if steps.pre_tokenizer else [(normal, None)]
    return tuple(i for word, _ in words for i in encode_word(word))


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of untrusted text: what the tokenizer would make a special token of (`<|im_start|>`) stays text.

    Its ids are looked at, not its spelling: a normalizer may make `<|im_start|>` of other characters.
    """
    return list(text_ids(tokenizer, text))


def encode_chat(tokenizer, messages: list[Message]) -> list[int]:
    """Token ids of a chat, up to where the assistant's reply begins. What stands in the messages is untrusted.

    Where it makes no special token the chat is encoded whole, as the model was trained. A template without a system
    role, or that drops it, gets the system prompt at the head of the first user message. Raises ConfigError if the
    template renders something else than the messages.
    """
    if is_plain(tokenizer, messages):
        messages = indented(messages)
    contents = [message["content"] for message in messages]
    places = [f"\ue000{uuid.uuid4().hex}\ue001" for _ in messages]
    try:
        rendered, form = render_whole(tokenizer, messages, places)
    except ConfigError:
        if messages[0]["role"] != "system" or len(messages) < 2:
            raise
        merged = [{"role": messages[1]["role"], "content": f"{contents[0]}\n\n{contents[1]}"}, *messages[2:]]
        return encode_chat(tokenizer, merged)
    # Some templates open a thought, whatever they are told. Closed at once, it leaves the reply its place.
    opened = re.search(r"<((?:\w+:)?(?:think|thinking|thought|reasoning))>\s*$", rendered)
    closing = f"\n</{opened[1]}>\n\n" if opened else ""
    whole = encode(tokenizer, render(tokenizer, messages, list(map(form, contents))) + closing)
    control, by_place = control_ids(tokenizer), dict(zip(places, contents, strict=True))
    pieces = re.split("(" + "|".join(places) + ")", rendered + closing)
    parts = [text_ids(tokenizer, by_place.get(piece, piece), trusted=piece not in by_place) for piece in pieces]
    piecewise = [i for ids in parts for i in ids]
    text_only = all(text_ids(tokenizer, content) == text_ids(tokenizer, content, trusted=True) for content in contents)
    same = text_only and [i for i in whole if i in control] == [i for i in piecewise if i in control]
    # A transcript begins as the tokenizer begins every text, with its BOS token if it has one.
    return (opening_ids(tokenizer) if is_plain(tokenizer, messages) else []) + (whole if same else piecewise)


def as_parts(text: str) -> list[dict[str, str]]:
    """A content as templates of models that see, too, want it: a list of parts."""
    return [{"type": "text", "text": text}]


def render_whole(tokenizer, messages: list[Message], contents: list[str]) -> tuple[str, Callable[[str], Any]]:
    """The chat as text with all of `contents` in it, and in which form the template took them.

    Raises ConfigError where it takes them in none.
    """
    reasons = []
    for form in (str, as_parts):
        try:
            rendered = render(tokenizer, messages, list(map(form, contents)))
            if all(content in rendered for content in contents):
                return rendered, form
            reasons.append("does not render the messages")
        except Exception as error:  # a template is a program, and raises what it likes
            reasons.append(f"can't be used ({' '.join(str(error).split())[:200] or type(error).__name__})")
    raise ConfigError(
        f"this model's chat template {reasons[0]}: try prompts=FILE without examples, or another model_name"
    )


def render(tokenizer, messages: list[Message], contents: list[Any], ask: bool = True) -> str:
    """The chat as text, with these contents; `ask`: up to where a reply begins. Raises whatever the template raises.

    As a transcript it is the contents between empty lines; where there are replies among them, with who speaks.
    """
    rows = [message | {"content": content} for message, content in zip(messages, contents, strict=True)]
    if is_plain(tokenizer, messages):
        user = "Question: {}\nAnswer:\n" if has_replies(messages) else "{}\n\n"
        return "".join((user if row["role"] == "user" else "{}\n\n").format(row["content"]) for row in rows)
    return tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=ask, enable_thinking=False)


def opening_ids(tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text."""
    whole, bare = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def behind_reply(tokenizer, asked_again: bool) -> str:
    """What the chat template puts behind a reply, at the end or before another question; "" where it puts nothing."""
    roles, place = ("user", "assistant", "user")[: 2 + asked_again], "\ue000reply\ue001"
    for form in (str, as_parts) if tokenizer.chat_template else ():
        contents = [form(place if role == "assistant" else "?") for role in roles]
        try:
            rendered = render(tokenizer, [{"role": role} for role in roles], contents, ask=False)
        except Exception:  # as above; `encode_chat` says it
            continue
        if after := rendered.partition(place)[2]:
            return after
    return ""


def reply_end(tokenizer) -> int | None:
    """The special token that the chat template puts behind a reply, be it the next turn's first; None without one."""
    for asked_again in (False, True):
        ids = encode(tokenizer, behind_reply(tokenizer, asked_again).lstrip())
        if ids and ids[0] in tokenizer.added_tokens_decoder:
            return ids[0]
    return None


def is_plain(tokenizer, messages: list[Message]) -> bool:
    """Whether a chat is written as a transcript: its model has no template, or is not to use it."""
    return not tokenizer.chat_template or messages[0]["role"] == PLAIN


def has_replies(messages: list[Message]) -> bool:
    return any(message["role"] == "assistant" for message in messages)


def indented(messages: list[Message]) -> list[Message]:
    """For a plain transcript: every line of a turn but its first is indented, so that no text can forge a turn."""
    if not has_replies(messages):
        return messages
    return [m | {"content": "\n  ".join(m["content"].splitlines())} for m in messages]
