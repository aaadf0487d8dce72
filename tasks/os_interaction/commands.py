"""Programs of the host's that are run for an episode: how much is read of what they say, how long they may take."""

import codecs
import contextlib
import fcntl
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

LONGEST = 128 * 1024  # bytes of an argument, the kernel's own limit


class SandboxFailed(RuntimeError):
    """The sandbox, not what ran in it, failed: nothing can be said about the episode."""


@dataclass(frozen=True)
class Ran:
    """What a command did: its output (standard error with it), cut to a limit, and its exit status."""

    output: str
    status: int
    timed_out: bool = False
    left_out: int = 0  # characters of output beyond the limit, without the newlines at its end


@contextlib.contextmanager
def failing_with_the_host() -> Iterator[None]:
    """In here what the host refuses, a process or a descriptor more, is SandboxFailed: no command has caused it."""
    try:
        yield
    except OSError as error:
        raise SandboxFailed(f"the host refuses: {error}") from None


def collect(
    command: list[str],
    stdin: int,
    keep: list[int],
    seconds: float,
    most: int,
    environment: dict[str, str] | None = None,
) -> Ran:
    """Runs a program and reads what it says, `most` characters of it; what takes too long is killed.

    It starts with the `environment` given, else with nothing of this program's but the PATH: /proc shows what each
    process began with. Raises SandboxFailed for a script that is too long.
    """
    if max(len(os.fsencode(word)) for word in command) >= LONGEST:
        raise SandboxFailed(f"a script is longer than {LONGEST} bytes, which no command may be")
    until = time.monotonic() + seconds
    decoder, kept, timed_out = codecs.getincrementaldecoder("utf-8")("replace"), "", False
    count, counted = 0, 0  # characters of output, with and without the newlines at its end
    with (
        subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=keep,
            start_new_session=True,
            env=environment or {"PATH": os.environ.get("PATH", os.defpath)},
        ) as process,
        open(os.pidfd_open(process.pid)) as end,
        selectors.DefaultSelector() as selector,
    ):
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(end, selectors.EVENT_READ)
        while (left := until - time.monotonic()) > 0:
            ready = {key.fileobj for key, _ in selector.select(left)}
            if end in ready:
                kill_group(process.pid)  # what it left running may keep its output open
            if process.stdout in ready:
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:  # it may close its output and go on
                    selector.unregister(process.stdout)
                text = decoder.decode(chunk, final=not chunk)
                kept += text[: most - len(kept)]
                counted = count + len(said) if (said := text.rstrip("\n")) else counted
                count += len(text)
            elif ready:
                break
        else:
            timed_out = True
            kill_group(process.pid)
        process.wait()
    return Ran(kept, process.returncode, timed_out, max(0, counted - len(kept)))


def kill_group(leader: int) -> None:
    """Kills a process that leads a group and has not been waited for, and all of the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


@contextlib.contextmanager
def waiting(command: list[str], stdin: bytes = b"") -> Iterator[int]:
    """A program that has said "ready" and waits, with its process id; then it is ended. Raises SandboxFailed."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(stdin)
                process.stdin.flush()
            said = []
            while (line := process.stdout.readline().decode(errors="replace").strip()) != "ready":
                if not line:
                    raise SandboxFailed(" ".join(said) or f"{command[-1]} ended without a word")
                said.append(line)
            yield process.pid
        finally:
            process.kill()


def memory_file(content: bytes) -> int:
    """A descriptor of a file in memory that nobody can change, at its start."""
    number = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(os.dup(number), "wb") as file:
        file.write(content)
    os.lseek(number, 0, os.SEEK_SET)
    fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return number


def in_short(ran: Ran) -> str:
    """How a script ended, in a few words."""
    if ran.timed_out:
        return "it ran out of time"
    last = ran.output.strip().splitlines()[-1:] or [""]
    return f"exit status {ran.status}" + (f": {last[0][:160]}" if last[0] else "")
