"""A run's folder: who may write to it, the checkpoints in it, and what is done where the disk refuses."""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_ppo.checkpoint import Damaged, checkpoints, disk_is_full, remove_folder
from lora_ppo.files import free_name
from lora_ppo.settings import ConfigError


def users_folder(folder: str, user: str) -> Path:
    """Where a person's files are: `folder` itself, or with a name one of their own in it."""
    return Path(folder) / "users" / user if user else Path(folder)


def locked(folder: Path, refusal: str) -> contextlib.AbstractContextManager:
    """Keeps a second program out of `folder` from now on, to the end of `with` on what it gives.

    Makes the folder if need be. Raises ConfigError with `refusal` if there is another one, and OSError.
    """
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(refusal) from None


class Checkpoints:
    """The checkpoints `step_N` in a folder: which may go, and what a full disk costs. `notice` tells a person."""

    def __init__(self, folder: Path, notice: Callable[[str], None]):
        self.folder, self.notice = folder, notice
        self.foreign: set[Path] = set()  # of other runs: never touched
        self.damaged: set[Path] = set()
        self.kept: dict[str, Path] = {}  # those that aren't removed: the one resumed from, and the newest written

    def clear_up(self) -> None:
        """Removes what a crash in the middle of a save left, and puts back what it had taken away."""
        for hidden in (*self.folder.glob(".step_*"), *self.folder.glob(".epoch_*")):
            if hidden.suffix == ".old" and not (whole := self.folder / hidden.stem[1:]).exists():
                hidden.rename(whole)
            shutil.rmtree(hidden, ignore_errors=True)

    def usable(self) -> list[Path]:
        """Those of this run that may serve, newest first."""
        return [folder for folder in checkpoints(self.folder) if folder not in self.foreign | self.damaged]

    def spare(self) -> list[Path]:
        """The checkpoints that may be removed, oldest first."""
        return [folder for folder in self.usable() if folder not in self.kept.values()][::-1]

    def prune(self, keep: int) -> None:
        """Removes this run's oldest checkpoints until `keep` are left."""
        for folder in self.spare()[: max(0, len(self.usable()) - keep)]:
            remove_folder(folder)

    def write(self, action: Callable[[], None]) -> None:
        """Does what writes to the disk; where that is full, the oldest checkpoints make room, one by one."""
        while True:
            try:
                return action()
            except Exception as error:
                if not disk_is_full(error) or not (spare := self.spare()):
                    raise
                remove_folder(spare[0])
                self.notice(f"The disk is full: removed {spare[0]} to make room.")

    def save(self, folder: Path, action: Callable[[], None]) -> None:
        """Writes a checkpoint by `action`. One of another run that stands in its place is kept beside it."""
        if folder in self.foreign:
            folder.rename(free_name(folder.with_name(f"{folder.name}_of_another_run")))
        self.write(action)
        self.foreign.discard(folder)
        self.damaged.discard(folder)
        self.kept["written"] = folder


class Disk(Checkpoints):
    """The folder of the newest run under `root`. A disk that refuses costs a notice, never the session."""

    def __init__(self, root: Path, notice: Callable[[str], None]):
        super().__init__(root, notice)
        self.root, self.held = root, contextlib.ExitStack()
        self.close = self.held.close
        refusal = f"another tutor is using {root}: stop it, or set checkpoint_dir to another folder"
        with self.surviving("open the checkpoint folder"):
            self.held.enter_context(locked(root, refusal))
        # The first run lives in checkpoint_dir itself, later ones in `run_2`, `run_3`, ... beneath it.
        numbers = [int(m[1]) for p in root.glob("run_*") if (m := re.fullmatch(r"run_(\d+)", p.name))]
        self.folder = root / f"run_{max(numbers)}" if numbers else root

    def move_on(self) -> None:
        """To a folder where no run has been."""
        number = int(self.folder.name[4:]) + 1 if self.folder != self.root else 2
        self.folder = self.root / f"run_{number}"

    @contextlib.contextmanager
    def surviving(self, task: str) -> Iterator[None]:
        """The disk's refusals become notices in here."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError, Damaged) as error:
            self.notice(f"Could not {task} ({error}). The session goes on; what can't be written is kept in memory.")
