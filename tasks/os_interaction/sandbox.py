"""A throw-away Linux system in which a model's shell commands run: namespaces made by util-linux and bubblewrap.

How it is built, and why so. It has to work for root without systemd and for an ordinary user alike:

1. A user namespace with 65,536 ids, root's among them, mapped to ids that nobody has outside. Root writes the map
   itself; for a user newuidmap does, from /etc/subuid. So `useradd`, `chown` and `su` work inside, and root inside is
   nobody outside.
2. In it a mount namespace with a tmpfs of limited size, which holds the sandbox's files, and an overlay on it that
   makes the host's /usr writable in appearance. No process keeps these namespaces: this program holds them by file
   descriptors alone, so that they go when it goes, however it ends.
3. Each command is a bubblewrap of its own, started in that mount namespace: pivot_root into the tmpfs, and new
   pid, network, ipc and uts namespaces, few capabilities, no new privileges, a seccomp filter. When its bash ends, or
   its time does, the kernel kills all that it left running. Nothing from inside is ever executed on the way in, and
   nothing is looked up there: what is mounted lies beside the episode's root, where no command can put a link.
4. The check sees the host's own /usr on top of what the episode changed there. First it looks for programs, and Python
   and Perl for their modules, in a second view of the host's /usr, which has nothing of the episode's.

crun and podman do 1 to 3, too. They want a container that lives between commands, with a process that a crash leaves
behind, and crun makes no root on tmpfs and no cgroup where version 1 and 2 are mounted side by side; bubblewrap's own
--unshare-user maps one id, with which most of the data's scripts fail.
"""

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol

from lora_ppo.settings import ConfigError
from tasks.os_interaction import rootfs, seccomp
from tasks.os_interaction.commands import Ran, SandboxFailed, collect, failing_with_the_host, memory_file, waiting
from tasks.os_interaction.limits import Cgroup, Limits, cgroup_parents

PACKAGES = "apt-get install bubblewrap uidmap"
IDS, ROOTS_FIRST_ID = 65536, 0x7001_0000  # above all that systemd and useradd hand out
CAPABILITIES = "CHOWN DAC_OVERRIDE FOWNER FSETID KILL NET_BIND_SERVICE SETFCAP SETGID SETPCAP SETUID SYS_CHROOT".split()
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOSTS = "/dev/usr"  # where the check finds the host's /usr as it is
CHECKS_PATH = ":".join(f"{usr}/{name}" for usr in (HOSTS, "/usr") for name in "sbin bin local/sbin local/bin".split())
STORE = "/mnt"  # where the files lie, in a mount namespace of their own
FIXED = "lib lib64 lib32 libx32 libexec".split()  # of /usr: what runs every program is never the episode's

PREPARE = f"""
exec 2>&1; set -e; umask 022
echo 0 >/proc/sys/user/max_user_namespaces
mount -t tmpfs -o "size=$1,nr_inodes=$2,mode=755,nosuid,nodev" sandbox {STORE}
cd {STORE}; mkdir system usr bin sbin etc upper work shm sealed upper/bin upper/sbin upper/local upper/share
cd upper/local; mkdir bin sbin lib share etc include src games man; cd {STORE}
chmod 1777 shm; tar -x -p --numeric-owner -C system
for options in ,userxattr ''; do
  mount -t overlay -o "lowerdir=/usr,upperdir={STORE}/upper,workdir={STORE}/work$options" usr usr && break
done
mountpoint -q usr
mount --bind usr/bin bin; mount --bind usr/sbin sbin; mount --bind system/etc etc
echo ready
read -r _
"""
SEAL = f"mount -t overlay -o ro,lowerdir=/usr:{STORE}/upper usr {STORE}/sealed"


class Sandbox(Protocol):
    """A system of its own. Commands run as root inside; files stay from one to the next, and nothing else does."""

    def run(self, script: str, seconds: float = 20, most: int = 4000, stdin: bytes = b"") -> Ran:
        """Runs `bash -c script`, with so many seconds and characters of output. Raises SandboxFailed."""

    def check(self, script: str, seconds: float = 20, stdin: bytes = b"") -> Ran:
        """The same, with programs that no earlier command could have changed."""

    def close(self) -> None:
        """Ends it; nothing is left."""


@dataclass
class Namespaces:
    """The sandbox that this file's docstring describes. Raises SandboxFailed where it can't be made."""

    limits: Limits = field(default_factory=Limits)

    def __post_init__(self):
        self.descriptors: list[int] = []
        self.cgroup: Cgroup | None = None
        self.sealed = False
        parents = cgroup_parents()
        try:
            with failing_with_the_host():
                self.cgroup = Cgroup(parents, self.limits) if parents else None
                self.make()
        except SandboxFailed:
            self.close()
            raise

    def limited(self) -> list[str]:
        """A command line's beginning that puts a command under the limits."""
        return [*(self.cgroup.joined() if self.cgroup else []), *self.limits.rlimits(self.cgroup is not None)]

    def make(self) -> None:
        """Makes the user and the mount namespace with all that lies in them, and keeps both by descriptors."""
        unshare = ["unshare", "--user", "sh", "-c", "echo ready; read -r _"]
        with waiting([*(self.cgroup.joined() if self.cgroup else []), *unshare]) as pid:
            map_ids(pid)
            self.keep(pid, "user")
        if not self.cgroup:  # a user namespace's processes, of all ids, count as its maker's: the outer one's root
            with waiting(self.inside(*unshare)) as pid:
                script = f'for ids in uid gid; do echo "0 0 {IDS}" >/proc/{pid}/"$ids"_map || exit; done'
                subprocess.run(self.inside("sh", "-c", script), stdin=subprocess.DEVNULL, capture_output=True)
                os.close(self.descriptors.pop())
                self.keep(pid, "user")
        sizes = [str(self.limits.disk_mb << 20), str(self.limits.inodes)]
        prepare = self.inside("unshare", "--mount", "sh", "-c", PREPARE, "sh", *sizes)
        with waiting(prepare, rootfs.archive()) as pid:
            self.keep(pid, "mnt")

    def keep(self, pid: int, name: str) -> None:
        self.descriptors.append(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC))

    def inside(self, *command: str) -> list[str]:
        """The command line of a program of the host's that runs as root of the user namespace, on the files."""
        # By these names nsenter opens the namespaces itself, and no descriptor of theirs reaches what it starts.
        kinds = zip(("user", "mount"), self.descriptors, strict=False)
        enter = [f"--{kind}=/proc/{os.getpid()}/fd/{number}" for kind, number in kinds]
        return [*self.limited(), "nsenter", *enter, "-S", "0", "-G", "0", "--", *command]

    def run(self, script: str, seconds: float = 20, most: int = 4000, stdin: bytes = b"") -> Ran:
        usr = [word for name in ("usr", "bin", "sbin") for word in ("--bind", f"{STORE}/{name}", f"/{name}")]
        return self.start(usr, {"PATH": PATH}, script, seconds, most, stdin)

    @failing_with_the_host()
    def check(self, script: str, seconds: float = 20, stdin: bytes = b"") -> Ran:
        if not self.sealed:
            for options in (",userxattr", ""):
                words = SEAL.replace("ro,", f"ro{options},").split()
                done = subprocess.run(self.inside(*words), capture_output=True, text=True, stdin=subprocess.DEVNULL)
                if not done.returncode:
                    break
            else:
                raise SandboxFailed(f"the check's programs can't be made: {done.stderr.strip()}")
            self.sealed = True
        usr = ["--ro-bind", "/usr", HOSTS, "--ro-bind", f"{STORE}/sealed", "/usr"]
        binaries = [x for name in ("bin", "sbin") for x in ("--ro-bind", f"{STORE}/sealed/{name}", f"/{name}")]
        variables = {"PATH": CHECKS_PATH, "PYTHONSAFEPATH": "1", "PERL5LIB": perl_modules()}
        return self.start([*usr, *binaries], variables, script, seconds, 4000, stdin)

    @failing_with_the_host()
    def start(
        self, usr: list[str], variables: dict[str, str], script: str, seconds: float, most: int, stdin: bytes
    ) -> Ran:
        """Runs bash in a bubblewrap of its own, whose /usr, /bin and /sbin are given. Raises SandboxFailed."""
        if not self.descriptors:
            raise SandboxFailed("the sandbox is closed")
        filter_fd = memory_file(seccomp.program(self.cgroup is not None))
        input_fd = memory_file(stdin) if stdin else os.open(os.devnull, os.O_RDONLY)
        status_reader, status_writer = os.pipe()
        command = ["bwrap", "--bind", f"{STORE}/system", "/", "--proc", "/proc", "--dev", "/dev"]
        command += ["--bind", f"{STORE}/shm", "/dev/shm", *usr]
        for name in FIXED:
            if Path(f"/usr/{name}").is_dir():
                command += ["--ro-bind", f"/usr/{name}", f"/usr/{name}"]
                command += [] if name == "libexec" else ["--ro-bind", f"/usr/{name}", f"/{name}"]
        # /etc is a mount point, so that nobody inside can put another in its place; what steers every program's start
        # lies in mounts of its own.
        command += ["--bind", f"{STORE}/etc", "/etc", "--ro-bind", "/etc/alternatives", "/etc/alternatives"]
        command += ["--ro-bind", "/etc/ld.so.cache", "/etc/ld.so.cache", "--ro-bind", "/dev/null", "/etc/ld.so.preload"]
        for place in (*Path("/etc").glob("python3*"), Path("/etc/perl"), *Path("/usr/local/lib").glob("python3*")):
            if place.is_dir():  # an interpreter runs what lies there before the check's own program
                command += ["--ro-bind", str(place), str(place)]
        command += ["--remount-ro", "/dev"]
        command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        command += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        command += [word for name in CAPABILITIES for word in ("--cap-add", f"CAP_{name}")]
        command += ["--seccomp", str(filter_fd), "--json-status-fd", str(status_writer), "--clearenv"]
        common = {"HOME": "/root", "USER": "root", "LANG": "C.UTF-8", "TERM": "dumb", "PYTHONNOUSERSITE": "1"}
        for name, value in (common | variables).items():
            command += ["--setenv", name, value]
        command += ["--chdir", "/root", "--", "bash", "-c", script]
        try:
            ran = collect(self.inside(*command), input_fd, [filter_fd, status_writer], seconds, most)
            os.close(status_writer)
            status_writer = -1
            told = os.read(status_reader, 1 << 16).decode()
        finally:
            for number in (filter_fd, input_fd, status_reader, status_writer):
                if number >= 0:
                    os.close(number)
        records = [json.loads(line) for line in told.splitlines() if line.endswith("}")]
        # From "child-pid" on whatever goes wrong is the command's doing, its own end by the memory limit included.
        if pid := next((record["child-pid"] for record in records if "child-pid" in record), None):
            wait_for_end(pid, self.descriptors[0])
        elif not ran.timed_out:
            raise SandboxFailed(ran.output.strip() or f"bubblewrap ended with status {ran.status}")
        status = next((record["exit-code"] for record in records if "exit-code" in record), ran.status)
        return Ran(ran.output, status, ran.timed_out, ran.left_out)

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())
        if self.cgroup:
            self.cgroup.remove()

    def __del__(self):  # of an episode that was never judged
        with contextlib.suppress(Exception):  # at the program's end there may be no modules left
            self.close()


def map_ids(pid: int) -> None:
    """Maps ids 0 to 65535 of a process's new user namespace to ids that nobody has. Raises SandboxFailed."""
    if os.geteuid() == 0:
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{name}").write_text(f"0 {ROOTS_FIRST_ID} {IDS}\n")
        return
    for tool, file in (("newuidmap", "/etc/subuid"), ("newgidmap", "/etc/subgid")):
        done = subprocess.run([tool, str(pid), "0", str(first_id(file)), str(IDS)], capture_output=True, text=True)
        if done.returncode:
            raise SandboxFailed(f"{tool}: {done.stderr.strip()}")


def first_id(file: str) -> int:
    """The first of the 65,536 ids that /etc/subuid or /etc/subgid gives this user. Raises SandboxFailed."""
    import pwd

    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    with contextlib.suppress(OSError):
        for line in Path(file).read_text().splitlines():
            owner, first, count = [*line.split(":"), "", ""][:3]
            if owner in (user, str(os.getuid())) and count.isdigit() and int(count) >= IDS:
                return int(first)
    raise SandboxFailed(f"{file} gives {user} no {IDS} ids: sudo usermod --add-subuids 100000-165535 "
                        f"--add-subgids 100000-165535 {user}")  # fmt: skip


def wait_for_end(pid: int, namespace: int) -> None:
    """Waits until the first process of a sandbox's process namespace is gone, and so, by the kernel's rule, all others.

    It is killed when the bubblewrap outside ends, and that takes a moment, in which they could still write. One that
    the episode taught not to mind is killed here. Nothing is done to a process that is not of the user `namespace`: it
    got the number of one that is gone. Raises SandboxFailed.
    """
    try:
        number = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with open(number) as process, selectors.DefaultSelector() as selector:
        selector.register(process, selectors.EVENT_READ)
        if selector.select(1):
            return
        with contextlib.suppress(OSError):  # it ended just now
            if os.stat(f"/proc/{pid}/ns/user").st_ino != os.fstat(namespace).st_ino:
                return
            signal.pidfd_send_signal(number, signal.SIGKILL)
        if not selector.select(10):
            raise SandboxFailed(f"process {pid} outlives its command")


@cache
def perl_modules() -> str:
    """The host's own folders of Perl's modules, as the check sees them, in Perl's order; empty without Perl."""
    try:
        command = ["perl", "-e", "print join ':', @INC"]
        listed = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.defpath}).stdout
    except OSError:
        return ""
    places = [place for place in listed.split(":") if place.startswith("/usr/") and Path(place).is_dir()]
    return ":".join(HOSTS + place.removeprefix("/usr") for place in places)


def missing_tools() -> list[str]:
    """The programs that the sandbox needs and this machine lacks."""
    tools = ["bwrap", "unshare", "nsenter", "prlimit"] + ([] if os.geteuid() == 0 else ["newuidmap"])
    return [name for name in tools if not shutil.which(name)]


def require_tools() -> None:
    """Raises ConfigError, with the fix, where a program is missing."""
    if missing := missing_tools():
        raise ConfigError(f"sandbox=namespaces needs {', '.join(missing)}, which this machine lacks: {PACKAGES}")
