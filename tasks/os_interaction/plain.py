"""The other two sandboxes: a container of Docker's, with the data set's image, and none at all.

One that is forgotten, as that of an episode that was never judged, closes itself, at the latest when the program ends.
"""

import os
import shutil
import subprocess
import tempfile
import uuid
import weakref

from tasks.os_interaction.commands import Ran, SandboxFailed, collect, failing_with_the_host, memory_file
from tasks.os_interaction.limits import Limits


@failing_with_the_host()
def run_command(command: list[str], seconds: float, most: int, stdin: bytes) -> Ran:
    """Runs a program, with `stdin` or nothing to read."""
    number = memory_file(stdin) if stdin else os.open(os.devnull, os.O_RDONLY)
    try:
        return collect(command, number, [], seconds, most, dict(os.environ))
    finally:
        os.close(number)


class Docker:
    """A container without a network. Here the check runs in it as it is: its programs are the image's, or what the
    episode made of them. Raises SandboxFailed where it doesn't start."""

    @failing_with_the_host()
    def __init__(self, image: str, limits: Limits):
        self.name = f"lora_ppo_{os.getpid()}_{uuid.uuid4().hex[:12]}"
        # The bash that runs first ends when this program's end closes its input, and the container with it. As the
        # container's process 1 it outlives `kill -9 -1`.
        command = (
            f"docker run --rm --entrypoint bash --interactive --name {self.name} --network none "
            f"--memory {limits.memory_mb}m --memory-swap {limits.memory_mb}m --pids-limit {limits.processes} "
            f"--cpus {limits.cpus} --security-opt no-new-privileges --cap-drop NET_RAW --cap-drop MKNOD "
            "--hostname sandbox"
        ).split()
        self.process = subprocess.Popen(
            [*command, image, "-c", "echo ready; while read -r _; do :; done"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.close = weakref.finalize(self, remove_container, self.name, self.process)
        said = []  # an image that is not there yet is fetched first, at length
        while (line := self.process.stdout.readline().decode(errors="replace")).strip() != "ready":
            if not line:
                self.close()
                raise SandboxFailed(" ".join(" ".join(said).split())[:300] or "docker run ended without a word")
            said.append(line)

    def run(self, script: str, seconds: float = 20, most: int = 4000, stdin: bytes = b"") -> Ran:
        if (status := self.process.poll()) is not None:
            if status == 125:  # Docker itself failed
                raise SandboxFailed("the container is gone")
            return Ran("", status)  # what ran in it has ended it
        command = ["docker", "exec", "--interactive", "--workdir", "/root", self.name, "bash", "-c", script]
        ran = run_command(command, seconds, most, stdin)
        run_command(["docker", "exec", self.name, "sh", "-c", "kill -9 -1"], 10, 1000, b"")  # what it left running
        return ran

    def check(self, script: str, seconds: float = 20, stdin: bytes = b"") -> Ran:
        return self.run(script, seconds, stdin=stdin)


def remove_container(name: str, process: subprocess.Popen) -> None:
    """Ends a container, whatever state it is in, and the `docker run` that waits for it."""
    subprocess.run(["docker", "rm", "--force", name], capture_output=True)
    process.kill()
    process.communicate()


class Nothing:
    """No sandbox: commands run as the user, in a temporary folder that goes when the episode does."""

    @failing_with_the_host()
    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="lora_ppo_")
        self.close = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def run(self, script: str, seconds: float = 20, most: int = 4000, stdin: bytes = b"") -> Ran:
        if stdin:  # they are unpacked in the root, and this root is the host's
            raise SandboxFailed(
                "sandbox=none takes no entry with files of its own: they would be laid into the host's /"
            )
        command = ["env", "--chdir", self.folder, f"HOME={self.folder}", "timeout", "--signal=KILL", str(seconds + 1)]
        return run_command([*command, "bash", "-c", script], seconds, most, stdin)

    def check(self, script: str, seconds: float = 20, stdin: bytes = b"") -> Ran:
        return self.run(script, seconds, stdin=stdin)
