"""Roles and their prompts, and chats as token ids. What people and models write stays text, whatever it spells."""

import difflib
import json
import re
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_ppo.settings import ConfigError

Message = dict[str, str]
PLAIN = "plain"  # the role of a first message after which no chat template is used

# ----------------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Role:
    """What a model is told before it is asked: a system text, and example turns (what was asked, the reply).

    It is told so in a chat, by the model's template; where it is `plain`, in a transcript, as a base model reads it.
    """

    system: str
    examples: tuple[tuple[str, str], ...] = ()
    plain: bool = False

    def messages(self, text: str) -> list[Message]:
        """The chat that asks this role `text`, which may be anybody's."""
        turns = [
            {"role": speaker, "content": said}
            for example in self.examples
            for speaker, said in zip(("user", "assistant"), example, strict=True)
        ]
        first = {"role": PLAIN if self.plain else "system", "content": self.system}
        return [first, *turns, {"role": "user", "content": text}]


@dataclass(frozen=True)
class Prompts:
    """The roles that a model plays here."""

    tutor: Role
    quizmaster: Role
    solver: Role
    learner: Role
    maths: Role

    def as_yaml(self) -> str:
        """What `load_prompts` reads back."""
        import yaml

        roles = {}
        for name, role in asdict(self).items():
            examples = [{"user": asked, "assistant": reply} for asked, reply in role["examples"]]
            roles[name] = {"system": role["system"]} | ({"examples": examples} if examples else {})
            roles[name] |= {"plain": True} if role["plain"] else {}
        # Letters stay readable, unless there are characters that YAML takes for line breaks: then all are escaped.
        readable = not re.search("[\x85\u2028\u2029\ufeff]", json.dumps(roles, ensure_ascii=False))
        return yaml.safe_dump(roles, allow_unicode=readable, sort_keys=False, width=120)

    def differing(self, others: "Prompts") -> list[str]:
        """The roles whose prompts are others."""
        return [name for name in ROLES if getattr(self, name) != getattr(others, name)]


ROLES = tuple(field.name for field in fields(Prompts))


def load_prompts(*files: str | Path) -> Prompts:
    """Each role's prompts from the first of the files that has them. Raises ConfigError, by file, line and role."""
    roles: dict[str, Role] = {}
    for file in files:
        if len(roles) < len(ROLES):
            roles = PromptsFile(file).roles() | roles
    if missing := [name for name in ROLES if name not in roles]:
        raise ConfigError(f"{files[-1]}: found no {', '.join(missing)}, expected all of {', '.join(ROLES)}")
    return Prompts(**roles)


class PromptsFile:
    """A YAML file of prompts while it is read. Whatever YAML makes of a text (4, yes, null), here it is that text."""

    def __init__(self, path: str | Path):
        self.path, self.role = path, ""

    def error(self, line: int, found: str, expected: str) -> ConfigError:
        place = f"line {line}, {self.role}" if self.role else f"line {line}"
        return ConfigError(f"{self.path}, {place}: found {found}, expected {expected}")

    def roles(self) -> dict[str, Role]:
        """The roles in the file, one at least."""
        roles = {}
        for name, node in self.mapping(self.root(), ROLES, "a role").items():
            self.role = name
            parts = self.mapping(node, ("system", "examples", "plain"), "a field", needed=("system",))
            system, turns = self.text(parts["system"]), parts.get("examples")
            if turns and turns.id != "sequence":
                expected = "a list of examples, each with user and assistant"
                raise self.error(turns.start_mark.line + 1, called(turns), expected)
            examples = tuple(self.example(turn) for turn in turns.value) if turns else ()
            roles[name] = Role(system, examples, self.truth(parts["plain"]) if "plain" in parts else False)
            self.role = ""
        return roles

    def root(self):
        """The file as YAML nodes, which know their lines."""
        import yaml

        try:
            text = Path(self.path).read_bytes().decode("utf-8-sig")
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except OSError as error:
            raise ConfigError(f"prompts={self.path}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise self.error(error.object[: error.start].count(b"\n") + 1, "bytes", "text in UTF-8") from None
        except yaml.reader.ReaderError as error:
            line = text[: error.position].count("\n") + 1
            raise self.error(line, f"the control character {chr(error.character)!r}", "text") from None
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1
            above = re.findall(rf"^({'|'.join(ROLES)})\s*:", "\n".join(text.split("\n")[:line]), re.MULTILINE)
            self.role = above[-1] if above else ""
            raise self.error(line, f"broken YAML ({error.problem})", "YAML; texts with a colon need quotes") from None
        except RecursionError:
            raise self.error(1, "lists in lists without end", "a mapping of roles") from None
        if root is None or not root.value:
            raise self.error(1, "nothing", f"roles: {', '.join(ROLES)}")
        return root

    def mapping(self, node, names: tuple[str, ...], kind: str, needed: tuple[str, ...] = ()) -> dict:
        """The nodes of a mapping by their names, each of `names` at most once, those `needed` at least."""
        if node.id != "mapping":
            raise self.error(node.start_mark.line + 1, called(node), f"a mapping with {' and '.join(needed or names)}")
        found = {}
        for key, value in node.value:
            name, line = key.value if key.id == "scalar" else called(key), key.start_mark.line + 1
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                raise self.error(line, f"{kind} called {name!r}", repr(near[0]) if near else " or ".join(names))
            if name in found:
                raise self.error(line, f"{name} a second time", "it once")
            found[name] = value
        for name in needed:
            if name not in found:
                raise self.error(node.start_mark.line + 1, f"no {name}", f"a mapping with {' and '.join(needed)}")
        return found

    def text(self, node) -> str:
        """A text that is not blank. Unquoted JSON is YAML's own syntax: the quizmaster's replies need quotes."""
        line = node.start_mark.line + 1
        if node.id != "scalar":
            hint = " (put JSON in single quotes)" if node.flow_style else ""
            raise self.error(line, called(node), f"text{hint}")
        if not node.value.strip():
            raise self.error(line, "an empty text", "what is said")
        if re.search("[\ud800-\udfff]", node.value):
            raise self.error(line, "half a character (a lone surrogate)", "text")
        return node.value.strip()

    def truth(self, node) -> bool:
        if node.id != "scalar" or node.value not in ("true", "false"):
            raise self.error(node.start_mark.line + 1, called(node), "true or false")
        return node.value == "true"

    def example(self, node) -> tuple[str, str]:
        """What is asked and the reply. A quizmaster's that the grammar does not allow would mislead the model."""
        sides = ("user", "assistant")
        parts = self.mapping(node, sides, "a side", needed=sides)
        asked, reply = (self.text(parts[side]) for side in sides)
        if self.role == "quizmaster" and not is_quiz(reply):
            quiz = '{"question":"...","correct":"...","wrong":["...","...","..."]}, with no spaces between its parts'
            raise self.error(parts["assistant"].start_mark.line + 1, called(parts["assistant"]), f"null or {quiz}")
        return asked, reply


def called(node) -> str:
    """What a person would call this part of a YAML file."""
    if node.id != "scalar":
        return "a mapping" if node.id == "mapping" else "a list"
    return repr(node.value[:60]) if node.value else "nothing"


def is_quiz(reply: str) -> bool:
    """Whether a quizmaster may reply so: with null, or a quiz in JSON that has no spaces between its parts."""
    try:
        quiz = json.loads(reply)
    except (ValueError, RecursionError):
        return False
    whole = isinstance(quiz, dict) and list(quiz) == ["question", "correct", "wrong"]
    return (whole or quiz is None) and reply == json.dumps(quiz, ensure_ascii=False, separators=(",", ":"))


# ------------------------------------------------------------------------------------------------------------- tokens


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


def reply_end(tokenizer) -> int | None:
    """The special token that the chat template puts behind a reply, be it the next turn's first; None without one."""
    asked, reply, place = {"role": "user"}, {"role": "assistant"}, "\ue000reply\ue001"
    for chat in ([asked, reply], [asked, reply, asked]):
        for form in (str, as_parts):
            try:
                contents = [form("?"), form(place), form("?")][: len(chat)]
                after = render(tokenizer, chat, contents, ask=False).partition(place)[2]
            except Exception:  # as above; `encode_chat` says it
                continue
            ids = tokenizer(after.lstrip(), add_special_tokens=False).input_ids
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
