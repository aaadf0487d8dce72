"""Mathematics: problems with a known number. Right is a reply that states it (`tasks/verify.py`), in whatever words.

The problems are made here (`tasks/arithmetic.py`), read from files in the form of GSM8K, loaded from the hub, or made
by reasoning-gym. Whatever they come from, base model and adapter get the same prompt (the role `maths`), the same
reader of answers and the same limit on tokens.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_ppo.chat import Message
from lora_ppo.episodes import Outcome, Task
from lora_ppo.loading import silence_libraries
from lora_ppo.policy import Policy
from lora_ppo.settings import ConfigError, Settings, setting
from tasks import verify
from tasks.arithmetic import LEVELS, sums
from tasks.heldout import held_out_of
from tasks.pairs import text

SPLITS = ("train", "test")
HUB_NAMES = {"gsm8k": ("openai/gsm8k", "main")}
GYM, GYM_SIZE, GYM_TESTS = "reasoning_gym:", 2000, 400
MARKS = re.compile(r"<<[^<>]*>>")  # of GSM8K's calculator: 48/2 = <<48/2=24>>24


@dataclass
class TaskSettings(Settings):
    problems: str = setting(
        "arithmetic",
        "arithmetic; a folder with train.jsonl and test.jsonl; FILE.jsonl; gsm8k, or another data set's name on the "
        "hub; reasoning_gym:NAME",
        group="the maths task",
        split=True,
    )
    levels: list[str] = setting(
        ["1", "2", "3"],
        f"levels of arithmetic, in turn ({'; '.join(f'{n}: {what}' for n, what in LEVELS.items())}); one that is named "
        "twice comes twice as often",
    )
    format_reward: float = setting(0.0, "what a right reply earns more where it has the form that is asked for")


@dataclass(frozen=True)
class Problem:
    """What is asked, the number that is right, and, where there are any, its level."""

    question: str
    gold: str
    level: str = ""

    @property
    def key(self) -> str:
        """The same for questions that differ in case and spaces alone."""
        return " ".join(self.question.casefold().split())


def prepare(config: Any) -> Callable[[Policy], Task]:
    """Reads the problems now, before any model is loaded; what it returns builds the task. Raises ConfigError."""
    if not 0 <= config.format_reward <= 1:
        raise ConfigError(f"format_reward={config.format_reward:g} is out of range: expected 0 to 1")
    splits = load_problems(config.problems, config.seed, config.levels, config.test_share)
    return lambda policy: MathsTask(policy, splits, config.format_reward, config.problems)


# ---------------------------------------------------------------------------------------------------------- the task


class MathsTask:
    """Problems, and what a right reply earns: 1, and `format_reward` more where it has the form that is asked for."""

    def __init__(
        self, policy: Policy, splits: dict[str, Sequence[Problem]], format_reward: float = 0.0, name: str = ""
    ):
        self.policy, self.splits, self.format_reward, self.name = policy, splits, format_reward, name

    def samples(self, split: Literal["train", "test"]) -> Sequence[Problem]:
        if not self.splits[split]:
            raise ConfigError(
                f"problems={self.name} has none to {split} on: name a folder or file that does (see docs/maths.md)"
            )
        return self.splits[split]

    def episode(self, sample: Problem) -> "MathsEpisode":
        return MathsEpisode(self, sample)


class MathsEpisode:
    """One reply to one problem."""

    def __init__(self, task: MathsTask, problem: Problem):
        self.task, self.problem, self.reply = task, problem, ""

    def reset(self) -> list[Message]:
        return self.task.policy.prompts.maths.messages(self.problem.question)

    def step(self, reply: str) -> None:
        self.reply = reply

    def outcome(self) -> Outcome:
        verdict = verify.check(self.reply, self.problem.gold)
        reward = verdict.lenient + self.task.format_reward * verdict.strict
        why = f"states {verdict.found or 'no number'}, right is {self.problem.gold}"
        details = {"strict": verdict.strict} | ({"level": self.problem.level} if self.problem.level else {})
        return Outcome("correct" if verdict.lenient else "incorrect", reward, why, details, label=why)


# ---------------------------------------------------------------------------------------------------------- problems


def load_problems(name: str, seed: int, levels: list[str], test_share: float) -> dict[str, Sequence[Problem]]:
    """The problems of both splits by the setting's `name`; raises ConfigError with one line where there are none."""
    if name == "arithmetic":
        return made_here(seed, levels, test_share)
    if name.startswith(GYM):
        return from_gym(name)
    path = Path(name)
    if path.is_dir():
        return from_folder(name, path)
    if path.suffix in (".jsonl", ".json") or path.is_file():
        return from_file(name, path, test_share)
    if name in HUB_NAMES or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return from_hub(name)
    raise ConfigError(
        f"problems={name}: there is no such folder; expected arithmetic, gsm8k, reasoning_gym:NAME, FILE.jsonl, or a "
        "folder with train.jsonl and test.jsonl"
    )


def made_here(seed: int, levels: list[str], test_share: float) -> dict[str, Sequence[Problem]]:
    if not levels or not set(levels) <= set(LEVELS):
        raise ConfigError(f"levels={','.join(levels)} is unknown: expected some of {', '.join(LEVELS)}")
    found = {
        split: [Problem(one.question, str(one.value), one.level) for one in sums(split, seed, levels, test_share)]
        for split in SPLITS
    }
    for split, change in (("test", "raise it"), ("train", "lower it")):
        if not found[split]:
            raise ConfigError(f"test_share={test_share:g} leaves a level without {split} problems: {change}")
    return found


def from_folder(name: str, folder: Path) -> dict[str, Sequence[Problem]]:
    """GSM8K's form: a file for each split. Raises ConfigError where a test problem is in the training file, too."""
    lines = {split: read_lines(name, folder / f"{split}.jsonl", split) for split in SPLITS}
    trained = {problem.key: number for number, problem, _ in reversed(lines["train"])}
    for number, problem, _ in lines["test"]:
        if problem.key in trained:
            raise ConfigError(
                f"problems={name}: line {number} of test.jsonl is line {trained[problem.key]} of train.jsonl, too: "
                "take it out of one of them"
            )
    return {split: [problem for _, problem, _ in found] for split, found in lines.items()}


def from_file(name: str, path: Path, test_share: float) -> dict[str, Sequence[Problem]]:
    """A file's problems: each in the split that it names, or else about a `test_share` of them held out."""
    lines = read_lines(name, path)
    splits: dict[str, list[Problem]] = {split: [] for split in SPLITS}
    for _, problem, split in lines:
        if split:
            splits[split].append(problem)
    if any(split for _, _, split in lines):
        if missing := next((number for number, _, split in lines if not split), None):
            raise ConfigError(f"problems={name}, line {missing}: found no split, and other lines have one")
        return splits
    keys = {problem.key for _, problem, _ in lines}
    tests = held_out_of(keys, test_share)
    if len(tests) == len(keys):
        raise ConfigError(f"problems={name} with test_share={test_share:g} leaves none to train on: write more")
    for _, problem, _ in lines:
        splits["test" if problem.key in tests else "train"].append(problem)
    return splits


def read_lines(name: str, path: Path, split: str = "") -> list[tuple[int, Problem, str]]:
    """(line number, problem, split or "") of a file with an object a line. Raises ConfigError naming the line.

    `split` is that of all lines, where they are of one. A problem may come again where it is trained on.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"problems={name}: {path}: {error.strerror or error}") from None
    found, seen = [], {}
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            try:
                problem, its = parsed(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"problems={name}: {path.name}, line {number}: {error}") from None
            its = split or its
            first, other, where = seen.setdefault(problem.key, (number, problem, its))
            if first != number and (other.gold != problem.gold or not where == its == "train"):
                raise ConfigError(
                    f"problems={name}: line {number} of {path.name} repeats the problem of line {first}"
                    + (f" and says {problem.gold} for {other.gold}" if other.gold != problem.gold else "")
                    + (" in another split" if where != its else "")
                    + ": take one out"
                )
            found.append((number, problem, its))
    if not found:
        raise ConfigError(f"problems={name}: {path.name} is empty, expected an object with question and answer a line")
    return found


def parsed(line: bytes) -> tuple[Problem, str]:
    """The problem of a line, and the split that it names. Raises ValueError saying what was found."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("found bytes that are no UTF-8, expected JSON") from None
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"found {line[:40].decode('utf-8', 'replace')!r}, expected an object in JSON") from None
    if not isinstance(row, dict):
        raise ValueError(f"found {str(row)[:40]!r}, expected an object with question and answer")
    question, level, split = row.get("question"), row.get("level", ""), row.get("split", "")
    question = text(question, "the question")
    level = "" if level in (None, "") else text(str(level), "the level")
    if split not in ("", *SPLITS):
        raise ValueError(f"found {str(split)[:40]!r} as the split, expected train or test")
    return Problem(question, gold_of(row.get("answer")), level), split


def gold_of(answer: Any) -> str:
    """The number that an answer states, in GSM8K's form (behind ####) or alone. Raises ValueError if it is none."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"found {str(answer)[:40]!r} as the answer, expected a number, or a text that ends in #### 42")
    gold = MARKS.sub("", str(answer)).rpartition("####")[2].strip()
    if verify.number(gold) is None:
        raise ValueError(
            f"found no number as the answer ({gold[-40:]!r}), expected one, or a text that ends in #### 42"
        )
    return gold


def from_hub(name: str) -> dict[str, Sequence[Problem]]:
    """A data set of the hub, with splits train and test, and columns question and answer."""
    repository, *configuration = HUB_NAMES.get(name, (name,))
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"problems={name} needs a package: pip install datasets, or set problems=DIR") from None
    datasets.disable_progress_bars()
    silence_libraries()  # each try to reach the hub would have a line
    try:
        rows = {split: list(datasets.load_dataset(repository, *configuration, split=split)) for split in SPLITS}
    except Exception as error:  # the hub, the network, the name: the library raises anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConfigError(
            f"problems={name}: tried {repository} on the hub ({reason}); check name and network, or set problems=DIR, "
            "a folder with its train.jsonl and test.jsonl"
        ) from None
    splits: dict[str, Sequence[Problem]] = {}
    for split, found in rows.items():
        try:
            splits[split] = [parsed(json.dumps(row, default=str).encode())[0] for row in found]
        except ValueError as error:
            raise ConfigError(f"problems={name}: {repository}, split {split}: {error}") from None
    trained = {problem.key for problem in splits["train"]}
    if shared := next((problem for problem in splits["test"] if problem.key in trained), None):
        raise ConfigError(f"problems={name}: {shared.question[:60]!r} is in both splits: set problems=DIR without it")
    return splits


def from_gym(name: str) -> dict[str, Sequence[Problem]]:
    """Problems of a generator of reasoning-gym, the same with every seed; our own judgement of the answers."""
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError(f"problems={name} needs a package: pip install reasoning-gym==0.1.25") from None
    try:
        rows = list(reasoning_gym.create_dataset(name.removeprefix(GYM), size=GYM_SIZE, seed=0))
    except ValueError as error:
        raise ConfigError(f"problems={name}: {' '.join(str(error).split())[:200]}") from None
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(Problem(row["question"].strip(), gold_of(row["answer"])))
        except ValueError as error:
            raise ConfigError(f"problems={name}: problem {number}: {error}; choose a generator of numbers") from None
    tests = list({problem.key: problem for problem in found[:GYM_TESTS]}.values())
    held_out = {problem.key for problem in tests}
    train = [problem for problem in found[GYM_TESTS:] if problem.key not in held_out]
    if not train:
        raise ConfigError(f"problems={name} has too few different problems to hold some out: choose another generator")
    return {"train": train, "test": tests}
