"""Roles and their prompts, and chats as token ids. What people and models write stays text, whatever it spells."""

import re
import uuid

from lora_ppo.settings import ConfigError

Message = dict[str, str]
TUTOR_PROMPT = "You are a tutor. Explain the answer in one or two clear sentences. If you do not know it, say so."
QUIZMASTER_PROMPT = (
    'Write a quiz about the question as JSON: {"question":"...","correct":"...","wrong":["...","...","..."]}. '
    "Write null if it has no clear answer."
)
SOLVER_PROMPT = "Solve the quiz. Reply with the correct option."
LEARNER_PROMPT = (
    "Read the explanation, then solve the quiz with what it says alone. Reply with one option. "
    "If it supports none, guess."
)


def chat(system: str, user: str) -> list[Message]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of untrusted text: where it spells a special token (`<|im_start|>`), that stays text."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if len(token.content) > 1]
    spelt = [token for token in special if token in text]
    pieces = [text]
    if spelt:  # cut in two after its first character, a token is none
        pieces = re.split("|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in spelt), text)
    return [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False).input_ids]


def encode_chat(tokenizer, messages: list[Message]) -> list[int]:
    """Token ids of a chat, up to where the assistant's reply begins. What stands in the messages is untrusted.

    Where it spells no special token the chat is encoded whole, as the model was trained. A template without a system
    role, or that drops it, gets the system prompt at the head of the user's message. Raises ConfigError if the template
    renders something else than the messages.
    """
    from jinja2 import TemplateError

    def render(contents: list[str]) -> str:
        rows = [message | {"content": content} for message, content in zip(messages, contents, strict=True)]
        if tokenizer.chat_template is None:
            return "".join(f"{row['content']}\n\n" for row in rows)
        return tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True, enable_thinking=False)

    contents = [message["content"] for message in messages]
    places = [f"\ue000{uuid.uuid4().hex}\ue001" for _ in messages]
    try:
        rendered = render(places)
    except TemplateError:
        rendered = ""
    if any(place not in rendered for place in places):
        if messages[0]["role"] != "system" or len(messages) < 2:
            raise ConfigError("this model's chat template does not render the messages: try another model_name")
        merged = [{"role": messages[1]["role"], "content": f"{contents[0]}\n\n{contents[1]}"}, *messages[2:]]
        return encode_chat(tokenizer, merged)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    if not any(token in content for content in contents for token in added):
        return tokenizer(render(contents), add_special_tokens=False).input_ids
    by_place = dict(zip(places, contents, strict=True))
    ids: list[int] = []
    for part in re.split("(" + "|".join(places) + ")", rendered):
        untrusted = part in by_place
        ids += (
            encode_text(tokenizer, by_place[part]) if untrusted else tokenizer(part, add_special_tokens=False).input_ids
        )
    return ids
