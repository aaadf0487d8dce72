"""Which sandbox there is, and whether it holds: tried before the first episode, by what must not work in it."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lora_ppo.settings import ConfigError
from tasks.os_interaction.commands import SandboxFailed
from tasks.os_interaction.limits import Limits, cgroup_parents
from tasks.os_interaction.plain import Docker, Nothing
from tasks.os_interaction.sandbox import Namespaces, Sandbox, require_tools

KINDS = ("namespaces", "docker", "none")
WARNING = (
    "sandbox=none: the model's commands run as you, on this machine, with your files and your network. They can delete "
    "or send away whatever you can."
)
TESTED: set[str] = set()  # kinds and images, of this process
HOG = "head -c {}M /dev/zero | tail >/dev/null; exit ${{PIPESTATUS[1]}}"  # a line of so many megabytes
FORKS = "perl -e 'for (1..{}) {{ my $p = fork; exit 0 if !defined $p; if (!$p) {{ sleep 9; exit }} }} exit 1'"


def sandbox_maker(kind: str, image: str = "", understood: bool = False, limits: Limits | None = None, say=print):
    """What makes sandboxes of a kind, probed. Raises ConfigError, in one line with the fix, where it can't be had.

    `say` is told what limits are in force, and what sandbox=none risks.
    """
    limits = limits or Limits()
    if kind not in KINDS:
        raise ConfigError(f"sandbox={kind} is unknown: expected one of {', '.join(KINDS)}")
    if kind == "none":
        say(WARNING)
        if not understood:
            raise ConfigError("sandbox=none needs --i-understand (i_understand=true): or set sandbox=namespaces")
        return Nothing
    if kind == "docker":
        if not image:
            raise ConfigError("sandbox=docker needs image=NAME, the data set's image")
        if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
            raise ConfigError("sandbox=docker: no engine answers `docker info`: start it, or set sandbox=namespaces")
        make: Callable[[], Sandbox] = partial(Docker, image, limits)
    else:
        require_tools()
        make = partial(Namespaces, limits)
    if kind + image not in TESTED:
        probe(make, kind, limits)
        TESTED.add(kind + image)
        by = f"{limits.cpus:g} CPU, limited by a cgroup, in total"
        if not cgroup_parents():
            by = "limited by rlimits: memory by process, not in total, and the CPU not at all (no cgroup here)"
        if kind == "namespaces":
            say(f"sandbox: {limits.memory_mb} MB, {limits.processes} processes, {by}")
    return make


def probe(make: Callable[[], Sandbox], kind: str, limits: Limits) -> None:
    """Tries what a sandbox must hold. Raises ConfigError where it can't be made or one thing gets through."""
    try:
        file = tempfile.NamedTemporaryFile(prefix="lora_ppo_probe_", dir=Path.home())  # noqa: SIM115
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"sandbox={kind} can't be probed, no file can be made in the home folder ({error}): set HOME to one that "
            "can be written"
        ) from None
    try:
        sandbox = make()
    except SandboxFailed as failed:
        file.close()
        raise ConfigError(f"sandbox={kind} does not work here: {failed}{advice(str(failed))}") from None
    try:
        with file as secret:
            name = secret.name
            tries = {
                "it does not run commands": ("exit 0", lambda ran: ran.status == 0),
                "it reads the host's files": (f"cat {name}", lambda ran: ran.status != 0),
                "it writes the host's files": (f"echo gone >{name}", lambda ran: not Path(name).read_bytes()),
                "it reaches the network": (
                    "timeout 2 bash -c 'echo >/dev/udp/192.0.2.1/9 || echo >/dev/tcp/192.0.2.1/80'",
                    lambda ran: ran.status not in (0, 124),
                ),
                "it fills the disk": (
                    f"head -c {limits.disk_mb + 64}M /dev/zero >/tmp/big; size=$(stat -c %s /tmp/big); rm /tmp/big; "
                    f"test $size -le {limits.disk_mb << 20}",
                    lambda ran: ran.status == 0,
                ),
                "it takes memory without end": (
                    HOG.format(limits.memory_mb + 64),
                    lambda ran: ran.status != 0,
                ),
                "it starts processes without end": (
                    FORKS.format(limits.processes + 50),
                    lambda ran: ran.status == 0,
                ),
            }
            for what, (script, held) in tries.items():
                if kind == "docker" and what == "it fills the disk":  # Docker's storage driver decides that
                    continue
                if not held(ran := sandbox.run(script, 15)):
                    raise ConfigError(
                        f"sandbox={kind} does not hold here: {what} ({ran.output.strip()[:200]}){advice()}"
                    )
            marker = f"lora_ppo_{os.getpid()}"
            sandbox.run(f"(exec -a {marker} sleep 60) & (setsid bash -c 'exec -a {marker} sleep 60' &) ; exit 0", 5)
            if kind == "namespaces" and running(marker):
                raise ConfigError("sandbox=namespaces does not hold here: processes outlive their command")
    except SandboxFailed as failed:
        raise ConfigError(f"sandbox={kind} does not work here: {failed}{advice(str(failed))}") from None
    finally:
        sandbox.close()


def running(marker: str) -> list[int]:
    """The processes on this machine whose command line holds a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes().split(b"\0")[0]:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def advice(failed: str = "", kinds: Path = Path("/proc/filesystems"), kernel: Path = Path("/proc/sys/kernel")) -> str:
    """What usually stands in the way, on this machine; `failed` is what was said.

    `kinds` lists its file systems, `kernel` holds its switches.
    """
    if "wrong fs type" in failed and kinds.exists() and "overlay" not in kinds.read_text().split():
        return "; this kernel has no overlay file system: sudo modprobe overlay loads it, where there is one"
    restricted = kernel / "apparmor_restrict_unprivileged_userns"
    if restricted.exists() and restricted.read_text().strip() == "1":
        return (
            "; AppArmor keeps user namespaces from programs without a profile: write one (docs/shell.md), or "
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
        )
    switch = kernel / "unprivileged_userns_clone"
    if switch.exists() and switch.read_text().strip() == "0":
        return "; sudo sysctl kernel.unprivileged_userns_clone=1 allows user namespaces"
    if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        return "; in a container: give it --security-opt seccomp=unconfined --security-opt systempaths=unconfined"
    return ""
