"""Entries: an instruction, a script that sets the scene, a check, and commands that pass it.

They are read from files in the form of LifelongAgentBench (JSON, a list or a mapping; parquet; fields that arrive as
Python literals in text) and from Harbor's task folders (instruction.md, task.toml, tests/test.sh, solution/), where
those need no image of their own.
"""

import ast
import hashlib
import io
import json
import re
import tarfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_ppo.settings import ConfigError
from lora_ppo.terminal import clean

OWN = Path(__file__).resolve().parent.parent.parent / "data" / "os_interaction"
REWARD = "/logs/verifier/reward.txt"  # where Harbor's tests leave their verdict


@dataclass(frozen=True)
class Entry:
    """One task. `start` and `truth` are bash scripts, `check` one that exits with 0 where the task is done.

    `check` reads the archive `files["tests"]` on its standard input, `truth` `files["solution"]`, where there are any.
    `unsupported` says why no sandbox can hold it.
    """

    name: str
    instruction: str
    start: str
    check: str
    truth: str
    skills: tuple[str, ...] = ()
    level: str = ""
    files: dict[str, bytes] = field(default_factory=dict, hash=False)
    unsupported: str = ""

    @property
    def key(self) -> str:
        """A fingerprint of all that decides how it runs."""
        files = (f"{name}{content.hex()}" for name, content in sorted(self.files.items()))
        parts = (self.start, self.check, self.truth, self.unsupported, *files)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def read_entries(place: str | Path) -> list[Entry]:
    """The entries in a file or folder. Raises ConfigError, naming file and entry, where something is missing."""
    path = Path(place)
    if path.is_dir() and (path / "instruction.md").is_file():
        return [harbor(path)]
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".parquet"))
        if (path / "entry_dict.json") in files:  # LifelongAgentBench's folder holds the same entries twice
            files = [path / "entry_dict.json"]
        folders = sorted(p.parent for p in path.glob("*/instruction.md"))
        if not files and folders:
            return [harbor(folder) for folder in folders]
    else:
        raise ConfigError(f"entries={place}: there is no such file or folder")
    entries = [entry for file in files for entry in read_file(file)]
    if not entries:
        raise ConfigError(f"entries={place} holds none: expected .json or .parquet files, or Harbor's task folders")
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"entries={place}: the name {twice[0]} stands twice, expected names that differ")
    return entries


def read_file(path: Path) -> list[Entry]:
    """The entries of one JSON or parquet file."""
    try:
        if path.suffix == ".parquet":
            try:
                import pyarrow.parquet
            except ImportError:
                raise ConfigError(f"{path}: parquet needs a package: pip install pyarrow") from None
            rows: Any = pyarrow.parquet.read_table(path).to_pylist()
        else:
            rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: can't be read: {' '.join(str(error).split())[:200]}") from None
    if isinstance(rows, dict):
        named: Iterable[tuple[str, Any]] = rows.items()
    elif isinstance(rows, list):
        named = (
            (str(row.get("sample_index", i)) if isinstance(row, dict) else str(i), row) for i, row in enumerate(rows)
        )
    else:
        raise ConfigError(f"{path}: found {type(rows).__name__}, expected a list or a mapping of entries")
    return [from_row(row, name, f"{path}, entry {name}") for name, row in named]


def from_row(row: Any, name: str, place: str) -> Entry:
    """An entry in LifelongAgentBench's form. Raises ConfigError."""

    def part(parent: Any, key: str, kind: type) -> Any:
        value = literal(parent.get(key)) if isinstance(parent, dict) else None
        if not isinstance(value, kind):
            found = "nothing" if value is None else type(value).__name__
            raise ConfigError(f"{place}: {key}: found {found}, expected {'text' if kind is str else kind.__name__}")
        return value

    def script(parent: Any, key: str) -> str:
        item = part(parent, key, dict)
        if item.get("command_name", "bash") != "bash":
            raise ConfigError(f"{place}: {key}: found the command {item['command_name']!r}, expected bash")
        if not isinstance(item.get("script"), str):  # a script that looks like a literal stays the script that it is
            raise ConfigError(f"{place}: {key}: found no script, expected text")
        if "\0" in item["script"]:  # no program can be given it
            raise ConfigError(f"{place}: {key}: found a zero byte in the script, expected text")
        return item["script"]

    instruction = row.get("instruction") if isinstance(row, dict) else None
    if not isinstance(instruction, str) or not instruction.strip():
        raise ConfigError(f"{place}: found no instruction, expected text")
    information, level = part(row, "evaluation_info", dict), row.get("level")
    entry = Entry(
        name,
        instruction,
        script(row, "initialization_command_item"),
        script(information, "evaluation_command_item"),
        script(information, "ground_truth_command_item"),
        texts(part(row, "skill_list", list), f"{place}: skill_list"),
        "" if level is None else str(level),
    )
    for told in (name, instruction, entry.start, entry.check, entry.truth, *entry.skills, entry.level):
        require_text(told, place)
    return entry


def require_text(found: str, place: str) -> None:
    """Raises ConfigError for half a character, which JSON can say and no file can hold."""
    if half := re.search("[\ud800-\udfff]", found):
        raise ConfigError(f"{clean(place)}: found {half[0]!a}, half a character, expected text")


def texts(found: Any, place: str) -> tuple[str, ...]:
    """A list of texts. Raises ConfigError."""
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ConfigError(f"{place}: found {clean(repr(found))[:100]}, expected a list of texts")
    return tuple(found)


def literal(value: Any) -> Any:
    """A value that arrived as a Python literal in text; anything else as it is."""
    if isinstance(value, str):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return value
    return value


# ------------------------------------------------------------------------------------------------------------ harbor


def harbor(folder: Path) -> Entry:
    """A Harbor task folder; one that needs an image of its own is unsupported. Raises ConfigError."""
    needed = ("instruction.md", "task.toml", "tests/test.sh", "solution/solve.sh")
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise ConfigError(f"{folder}: found no {', '.join(missing)}, which a Harbor task has")
    try:
        settings = tomllib.loads((folder / "task.toml").read_text(encoding="utf-8"))
        instruction = (folder / "instruction.md").read_text(encoding="utf-8").strip()
        steps = image_steps(folder / "environment" / "Dockerfile")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder}: can't be read: {' '.join(str(error).split())[:200]}") from None
    environment, about = settings.get("environment", {}), settings.get("metadata", {})
    for name, table in (("environment", environment), ("metadata", about)):
        if not isinstance(table, dict):
            raise ConfigError(f"{folder}/task.toml: {name}: found {type(table).__name__}, expected a table")
    levels = {"easy": "1", "medium": "2", "hard": "3"}
    return Entry(
        folder.name,
        instruction,
        steps or "true",
        "rm -rf /logs /tests && tar -x -C / && mkdir -p /logs/verifier || exit 1; "  # whatever the episode left there
        f"bash /tests/test.sh </dev/null; done=$?; [ -f {REWARD} ] || exit $done; awk '{{ exit !($1 >= 1) }}' {REWARD}",
        "tar -x -C / && bash /solution/solve.sh </dev/null",
        texts(about.get("tags", []), f"{folder}/task.toml: tags"),
        levels.get(str(about.get("difficulty", "")), ""),
        {name: packed(folder / name) for name in ("tests", "solution")},
        "it needs an image of its own" if steps is None or environment.get("docker_image") else "",
    )


def image_steps(dockerfile: Path) -> str | None:
    """What a Dockerfile does as a start script, where it only makes folders on a plain Debian or Ubuntu; else None."""
    if not dockerfile.is_file():
        return ""
    lines = dockerfile.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    script = []
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if word == "FROM" and rest.split(":")[0].strip() in ("ubuntu", "debian"):
            continue
        if word == "WORKDIR":
            script.append(f"mkdir -p {rest.strip()}")
        elif word and not word.startswith("#"):
            return None
    return "\n".join(script)


def packed(folder: Path) -> bytes:
    """A folder as a tar archive, owned by root, always the same bytes for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder)}")
                content = path.read_bytes()
                entry.size, entry.mode = len(content), 0o755
                tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
