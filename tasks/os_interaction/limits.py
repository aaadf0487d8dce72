"""What a sandbox may use: cgroups where one can be made, rlimits everywhere.

With a cgroup, memory, processes and CPU are limited in total. Where none can be made (an ordinary user, outside
`systemd-run --user --scope -p Delegate=yes`), rlimits stand alone: processes are limited in total, memory by process,
the CPU not at all.
"""

import contextlib
import itertools
import os
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NAME, LEAF = "lora_ppo", "lora_ppo_main"
NUMBERS = itertools.count()


@dataclass(frozen=True)
class Limits:
    """Of one sandbox: megabytes of memory (files included) and of files, processes, CPUs, files and folders."""

    memory_mb: int = 512
    disk_mb: int = 128
    processes: int = 128
    cpus: float = 1.0
    inodes: int = 20_000

    def rlimits(self, in_cgroup: bool) -> list[str]:
        """A command line's beginning that sets the rlimits; a process's memory is among them without a cgroup."""
        most = [f"--nproc={self.processes}", "--core=0", "--nofile=1024", "--memlock=65536", "--msgqueue=819200"]
        return ["prlimit", *most, *([] if in_cgroup else [f"--as={self.memory_mb << 20}"]), "--"]


# ----------------------------------------------------------------------------------------------------------- cgroups


class Cgroup:
    """The folders of one sandbox's cgroup: one in version 2, one for each controller in version 1."""

    def __init__(self, parents: dict[str, Path], limits: Limits):
        name = f"{NAME}-{os.getpid()}-{next(NUMBERS)}"
        self.folders = [parent / name for parent in dict.fromkeys(parents.values())]
        memory, quota = str(limits.memory_mb << 20), str(int(limits.cpus * 100_000))
        values = {"pids.max": str(limits.processes)}
        if "" in parents:
            values |= {"memory.max": memory, "memory.swap.max": "0", "cpu.max": f"{quota} 100000"}
        else:
            values |= {"memory.limit_in_bytes": memory, "memory.swappiness": "0", "cpu.cfs_quota_us": quota}
        try:
            for folder in self.folders:
                folder.mkdir()
                for file, value in values.items():
                    if (folder / file).exists():
                        (folder / file).write_text(value)
        except OSError:
            self.remove()
            raise

    def joined(self) -> list[str]:
        """A command line's beginning: what follows it runs in this cgroup."""
        join = 'while [ "$1" != -- ]; do echo 0 >"$1/cgroup.procs" || exit 125; shift; done; shift; exec "$@"'
        return ["sh", "-c", join, "sh", *map(str, self.folders), "--"]

    def remove(self) -> None:
        """Ends what still runs in it, and removes it."""
        until = time.monotonic() + 5
        for folder in self.folders:
            while folder.exists():
                with contextlib.suppress(OSError):
                    for pid in (folder / "cgroup.procs").read_text().split():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(pid), 9)
                    folder.rmdir()
                if time.monotonic() > until:
                    break
                if folder.exists():
                    time.sleep(0.005)


@cache
def cgroup_parents() -> dict[str, Path]:
    """Where cgroups can be made, by controller ("" in version 2, for all); empty where they can't."""
    own, mounts = {}, {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            own |= dict.fromkeys(names.split(","), path)
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            root, point, (kind, _, options) = before.split()[3], Path(before.split()[4]), after.split()[:3]
            if kind in ("cgroup", "cgroup2"):
                for name in options.split(",") if kind == "cgroup" else [""]:
                    mounts[name] = (root, point)

    def place(name: str) -> Path:
        root, point = mounts[name]
        return point / os.path.relpath(own[name], root) if own[name].startswith(root) else point

    found = {}
    if {"memory", "pids", "cpu"} <= mounts.keys() & own.keys():
        found = {name: place(name) for name in ("memory", "pids", "cpu")}
    elif "" in mounts and "" in own:
        own_folder = place("")  # its parent where an earlier process of the same scope moved this one into the leaf
        places = (mounts[""][1], own_folder.parent if own_folder.name == LEAF else own_folder)
        found = next(({"": folder} for folder in places if controllers_on(folder)), {})
    try:
        if found:
            Cgroup(found, Limits()).remove()
    except OSError:
        return {}
    if found:
        janitor(found)
    return found


def controllers_on(folder: Path) -> bool:
    """Whether cgroups of version 2 made in `folder` can have limits; a delegated one's processes move into a leaf."""
    wanted, control = {"memory", "pids", "cpu"}, folder / "cgroup.subtree_control"
    with contextlib.suppress(OSError):
        if wanted <= set(control.read_text().split()):
            return os.access(folder, os.W_OK)
        if not os.access(control, os.W_OK) or not wanted <= set((folder / "cgroup.controllers").read_text().split()):
            return False
        if folder.name.endswith((".scope", ".service")):
            (folder / LEAF).mkdir(exist_ok=True)
            for pid in (folder / "cgroup.procs").read_text().split():
                (folder / LEAF / "cgroup.procs").write_text(pid)
        control.write_text("+memory +pids +cpu")
        return True
    return False


JANITOR = """
read -r _
for try in 1 2 3 4 5 6 7 8 9 10; do
  left=
  for folder in "$@"; do
    for one in "$folder/$NAME"-*; do
      [ -d "$one" ] || continue
      kill -9 $(cat "$one/cgroup.procs") 2>/dev/null
      rmdir "$one" 2>/dev/null || left=1
    done
  done
  [ "$left" ] || exit 0
  sleep 0.2
done
"""


def janitor(parents: dict[str, Path]) -> None:
    """Starts what removes this process's cgroups once it is gone, however it went: it waits for a pipe to close."""
    reader, _ = os.pipe()  # its other end stays open as long as this process lives
    folders = [str(parent) for parent in dict.fromkeys(parents.values())]
    subprocess.Popen(
        ["sh", "-c", JANITOR, "sh", *folders],
        stdin=reader,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PATH": os.environ.get("PATH", os.defpath), "NAME": f"{NAME}-{os.getpid()}"},
        start_new_session=True,
    )
    os.close(reader)
