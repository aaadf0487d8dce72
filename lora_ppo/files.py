"""Files and their names: any name works, a text is replaced whole or not at all, and the umask decides who may read."""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a name may hold and YAML, or OmegaConf, takes for more than text: bytes that are no UTF-8 (surrogates to Python),
# the beginning of an interpolation, a missing value. They are hidden behind characters for private use.
BYTES = {0xDC80 + i: 0x10FF00 + i for i in range(128)}
MARKS = {"${": "\U0010ff80", "???": "\U0010ff81"}


def hidden(value: Any) -> Any:
    """A value, or a list of values, whose texts OmegaConf and YAML take for nothing but text."""
    if isinstance(value, list):
        return [hidden(item) for item in value]
    if isinstance(value, str):
        for mark, instead in MARKS.items():
            value = value.replace(mark, instead)
        value = value.translate(BYTES)
    return value


def shown(value: Any) -> Any:
    """Takes `hidden` back."""
    if isinstance(value, list):
        return [shown(item) for item in value]
    if isinstance(value, str):
        value = value.translate({there: here for here, there in BYTES.items()})
        for mark, instead in MARKS.items():
            value = value.replace(instead, mark)
    return value


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """A name for an existing folder that libraries can use which want UTF-8: its own, or that of a link to it."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory(prefix="lora_ppo_") as folder:
            link = Path(folder) / "link"
            link.symlink_to(path.absolute(), target_is_directory=True)
            yield link
    else:
        yield path


def cache_folder() -> Path:
    """Where is kept what would take long to make again; it may be removed at any time."""
    place = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if place.startswith("~"):  # nobody's home
        return Path(tempfile.gettempdir()) / f"lora-ppo-tutor-{os.getuid()}"
    return Path(place) / "lora-ppo-tutor"


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file; a reader sees the old one or the new one, whole, and a full disk keeps the old one."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(data)
        os.replace(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def apply_umask(folder: Path) -> None:
    """Gives every file in a folder the mode of a new one. safetensors lets nobody but the owner read its own."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.iterdir():
        with contextlib.suppress(PermissionError):  # file systems without modes
            path.chmod(mode)


def free_name(path: Path) -> Path:
    """`path`, or where that is taken one with a number."""
    names = itertools.chain([path], (path.with_stem(f"{path.stem}_{i}") for i in itertools.count(2)))
    return next(name for name in names if not name.exists())
