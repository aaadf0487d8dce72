"""The roles that a model plays, and what it is told in each: prompts, and the YAML files that hold them."""

import difflib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lora_ppo.chat import PLAIN, Message
from lora_ppo.settings import ConfigError


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
