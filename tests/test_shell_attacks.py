"""Attacks on the sandbox: none gets out, none reaches the host, the network, the check, or the next command."""

import os
import platform
import re
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from support.shell import SMALL

from tasks.os_interaction.limits import cgroup_parents
from tasks.os_interaction.probe import running
from tasks.os_interaction.sandbox import Namespaces, wait_for_end

PYTHON = "/usr/bin/python3"
needs_python = pytest.mark.skipif(not Path(PYTHON).exists(), reason="no python3 in /usr/bin")


def python(code: str) -> str:
    """A command that runs Python code; it exits with 7 where an OSError or anything else is raised."""
    return (
        f"{PYTHON} - <<'END'\nimport sys\ntry:\n"
        + "".join(f"    {line}\n" for line in code.strip().splitlines())
        + "except BaseException as error:\n    print(error)\n    sys.exit(7)\nEND"
    )


@pytest.fixture
def secret(tmp_path) -> Path:
    """A file of the host's that anybody may read and write."""
    path = Path("/var/tmp") / f"lora_ppo_secret_{os.getpid()}"
    path.write_text("the host's secret")
    path.chmod(0o666)
    yield path
    path.unlink()


@pytest.fixture
def without_cgroup(sandboxes, monkeypatch) -> Namespaces:
    """A small sandbox as it is where no cgroup can be made."""
    monkeypatch.setattr("tasks.os_interaction.sandbox.cgroup_parents", dict)
    sandbox = Namespaces(SMALL)
    yield sandbox
    sandbox.close()


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "way", ["{}", "/proc/1/root{}", "/proc/self/root{}", "/../../..{}", "/proc/self/cwd/../../..{}"]
)
def test_a_file_of_the_host_is_not_there(sandbox, secret, way):
    ran = sandbox.run(f"cat {way.format(secret)}")
    assert ran.status != 0
    assert "the host's secret" not in ran.output


@pytest.mark.parametrize("way", ["{}", "/proc/1/root{}", "/proc/self/root{}"])
def test_a_file_of_the_host_is_not_written(sandbox, secret, way):
    sandbox.run(f"mkdir -p $(dirname {secret}); echo gone >{way.format(secret)}; rm -f {way.format(secret)}")
    assert secret.read_text() == "the host's secret"


def test_links_out_of_the_root_lead_back_into_it(sandbox, secret):
    ran = sandbox.run(f"ln -s ../../../../../../../..{secret} /l; ln -s / /etc/r; cat /l /etc/r{secret}; echo x >/l")
    assert "the host's secret" not in ran.output
    assert secret.read_text() == "the host's secret"


def test_links_in_place_of_mount_points_do_not_lead_the_next_command_out(sandbox, secret):
    """What is mounted for a command can't be replaced by the one before; folders can, and then lead nowhere."""
    sandbox.run("for d in dev proc usr etc bin lib; do mv /$d /$d.old; rmdir /$d; ln -s /oldroot/var /$d; done")
    ran = sandbox.run(
        "test ! -L /dev && test ! -L /proc && test ! -L /usr && test ! -L /etc && test -c /dev/null && ls /proc/self"
    )
    assert ran.status == 0, ran.output
    assert not list(secret.parent.glob("shm"))


REPLACEABLE = (
    "/usr/bin /usr/sbin /usr /usr/local /usr/local/bin /usr/lib /usr/lib64 /usr/libexec /bin /sbin /lib /lib64"
)
REPLACEABLE += " /etc /etc/alternatives /etc/ld.so.cache /dev /dev/shm /proc /root /mnt /tmp /tests /logs"


@pytest.mark.parametrize("path", REPLACEABLE.split())
def test_a_link_in_place_of_a_folder_leads_neither_the_next_command_nor_the_check_out(sandbox, secret, path):
    tools = "mkdir /t; cp /usr/bin/{rm,ln,cat} /t; cp /usr/bin/bash /usr/local/bin/bash"
    sandbox.run(f"{tools}; /t/rm -rf {path}; /t/ln -s /var/tmp {path}")
    places = {path, path.removeprefix("/usr") or "/"}
    script = "; ".join(f"/t/cat {place}/{secret.name}; echo gone >{place}/{secret.name}" for place in places)
    assert "the host's secret" not in sandbox.run(script).output
    assert "the host's secret" not in sandbox.check(script).output
    assert secret.read_text() == "the host's secret"


def test_programs_of_the_host_stay_as_they_are(sandbox):
    before = Path("/usr/bin/env").read_bytes()
    sandbox.run("cat /bin/true >/usr/bin/env; rm -f /usr/bin/env; cp /bin/true /usr/bin/env; touch /usr/lib/x /lib/x")
    assert Path("/usr/bin/env").read_bytes() == before
    assert not Path("/usr/lib/x").exists()


def test_root_inside_is_nobody_outside(sandbox):
    assert sandbox.run("touch /f; stat -c %u%g /f").output == "00\n"
    marker = f"lora_ppo_root_{os.getpid()}"
    thread = threading.Thread(target=sandbox.run, args=(f"exec -a {marker} sleep 60", 2))
    thread.start()
    while not (found := running(marker)) and thread.is_alive():
        time.sleep(0.02)
    status = Path(f"/proc/{found[0]}").stat()
    thread.join()
    assert min(status.st_uid, status.st_gid) > 65535


def test_no_descriptor_of_the_host_is_inherited(sandbox):
    ran = sandbox.run("for f in /proc/self/fd/*; do readlink $f; done")
    names = [name for name in ran.output.splitlines() if not name.startswith("/proc/")]
    assert all(name == "/dev/null" or name.startswith("pipe:") for name in names), names


def test_the_environment_of_the_host_is_not_inherited(sandbox, monkeypatch):
    monkeypatch.setenv("LORA_PPO_SECRET", "token-1234")
    assert "token-1234" not in sandbox.run("env; cat /proc/*/environ | tr '\\0' '\\n'", most=100_000).output


def test_accounts_and_name_of_the_host_are_not_shown(sandbox):
    ran = sandbox.run("cat /etc/shadow /etc/hostname; hostname", most=100_000)
    assert ran.output.endswith("sandbox\nsandbox\n")
    assert "$" not in ran.output


# --------------------------------------------------------------------------------------- the kernel and its devices


@pytest.mark.parametrize(
    "command",
    [
        "mount -t tmpfs x /tmp",
        "mount -t proc x /mnt",
        "mount --bind / /mnt",
        "mount -o remount,rw /usr/lib",
        "umount -l /etc/ld.so.preload",
        "umount -l /proc",
    ],
)
def test_nothing_is_mounted_or_unmounted(sandbox, command):
    assert sandbox.run(command).status != 0


@pytest.mark.parametrize("device", ["b 8 0", "b 254 0", "c 1 1", "c 1 3", "c 10 200"])
def test_no_device_is_made(sandbox, device):
    assert sandbox.run(f"mknod /tmp/d {device}").status != 0
    assert sandbox.run("test -e /tmp/d").status != 0


def test_devices_are_the_harmless_ones(sandbox):
    shown = set(sandbox.run("ls /dev").output.split())
    assert shown <= set("console core fd full null ptmx pts random shm stderr stdin stdout tty urandom zero".split())
    assert {"fd", "null", "zero", "random"} <= shown
    assert sandbox.run("touch /dev/x").status != 0


def test_the_kernel_is_not_steered(sandbox):
    for file in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/vm/drop_caches"):
        assert sandbox.run(f"echo x >{file}").status != 0
    assert sandbox.run("ls -A /sys").output == ""


def test_setuid_programs_give_nothing(sandbox):
    script = "useradd joe; cp /bin/sh /tmp/rootsh; chmod 4755 /tmp/rootsh; "
    script += "su joe -s /bin/sh -c '/tmp/rootsh -p -c \"id -u\"'"
    assert sandbox.run(script).output.strip() == "1000"
    assert "NoNewPrivs:\t1" in sandbox.run("cat /proc/self/status", most=10_000).output


@pytest.mark.parametrize(
    "command", ["unshare --user id", "unshare --mount id", "unshare --net id", "nsenter -t 1 -m id"]
)
def test_no_namespace_is_made_or_entered(sandbox, command):
    assert sandbox.run(command).status != 0


def test_chroot_leads_nowhere(sandbox, secret):
    if not Path("/usr/bin/perl").exists():
        pytest.skip("no perl")
    code = 'mkdir "/j"; chroot "/j"; chdir ".." for 1..30; chroot "."; open F, $ARGV[0] and print <F>'
    assert "the host's secret" not in sandbox.run(f"perl -e '{code}' {str(secret)[1:]} {secret}").output


def test_the_clock_is_not_set(sandbox):
    before = time.time()
    assert sandbox.run("date -s '2001-01-01'").status != 0
    assert time.time() >= before


# --------------------------------------------------------------------------------------------------------- processes


def test_processes_of_the_host_are_not_seen_and_not_signalled(sandbox):
    shown = sandbox.run("ls /proc | grep -c '^[0-9]'; cat /proc/[0-9]*/cmdline | tr '\\0' ' '", most=10_000).output
    assert int(shown.split()[0]) < 10
    assert "pytest" not in shown
    victim = subprocess.Popen(["sleep", "30"])
    sandbox.run(f"kill -9 {victim.pid} {os.getpid()}; kill -9 -1")
    assert victim.poll() is None
    victim.kill()
    victim.wait()


@needs_python
def test_no_process_is_traced(sandbox):
    code = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nfor pid in (1, os.getppid()):\n"
    code += "    assert libc.ptrace(16, pid, 0, 0) == -1, pid\nassert libc.ptrace(0, 0, 0, 0) == -1\nprint('held')"
    assert sandbox.run(python(code)).output == "held\n"


@needs_python
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the attack is machine code")
def test_a_first_process_that_was_taught_to_stay_is_killed(sandbox):
    """Bubblewrap's own process inside is of the same user: its code can be written over through /proc."""
    marker = f"lora_ppo_stays_{os.getpid()}"
    code = (
        "place = int(open('/proc/1/syscall').read().split()[-1], 16)\n"  # where it waits for its children
        # prctl(PR_SET_PDEATHSIG, 0), then pause() for ever
        "stay = bytes.fromhex('bf0100000031f6b89d0000000f05b8220000000f05ebf7')\n"
        "with open('/proc/1/mem', 'r+b', buffering=0) as memory:\n"
        "    memory.seek(place)\n"
        "    memory.write(stay)\n"
        "print('written')\n"
    )
    ran = sandbox.run(python(code) + f"\n(sleep 0.1 &)\nsleep 0.5; exec -a {marker} sleep 60", seconds=2)
    assert ran.output.startswith("written"), ran.output
    assert ran.timed_out
    assert running(marker) == []
    assert sandbox.run("ls /proc | grep -c '^[0-9]'").output.strip() < "9"
    assert sandbox.check("true").status == 0


def test_a_process_that_only_got_the_number_is_left_alone(sandbox):
    with subprocess.Popen(["sleep", "60"]) as stranger:
        wait_for_end(stranger.pid, sandbox.descriptors[0])
        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.parametrize("way", ["sleep 60 &", "(setsid sleep 60 &)", "nohup sleep 60 >/dev/null 2>&1 & disown"])
def test_no_process_outlives_its_command(sandbox, way):
    marker = f"lora_ppo_left_{os.getpid()}"
    started = time.monotonic()
    sandbox.run(f"cp /bin/sleep /tmp/{marker}; " + way.replace("sleep 60", f"/tmp/{marker} 60") + "\n sleep 0.1")
    assert time.monotonic() - started < 30
    assert running(f"/tmp/{marker}") == []
    assert "sleep" not in sandbox.run("cat /proc/[0-9]*/comm").output


@pytest.mark.parametrize(
    "command", ["sleep 60", "while :; do :; done", "trap '' TERM INT HUP; sleep 60", "exec >&- 2>&-; sleep 60"]
)
def test_a_time_out_ends_everything(sandbox, command):
    started, marker = time.monotonic(), f"lora_ppo_left_{os.getpid()}"
    beside = f"(exec -a {marker} sleep 60) & (setsid bash -c 'exec -a {marker} sleep 60' &)"
    ran = sandbox.run(f"touch /before; {beside}\n{command}", seconds=0.7)
    assert ran.timed_out
    assert time.monotonic() - started < 30
    assert running(marker) == []
    assert sandbox.run("test -f /before").status == 0  # the files are still there


# ----------------------------------------------------------------------------------------------------------- network


def test_the_network_is_out_of_reach(sandbox):
    with socket.create_server(("0.0.0.0", 0)) as listening:
        port = listening.getsockname()[1]
        listening.settimeout(0.5)
        ran = sandbox.run(
            f'for a in 127.0.0.1 192.0.2.1; do timeout 2 bash -c "echo >/dev/tcp/$a/{port}" && echo in; done'
        )
        assert "in\n" not in ran.output
        with pytest.raises(TimeoutError):
            listening.accept()
    if socket.has_ipv6:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as listening:
            port = listening.getsockname()[1]
            listening.settimeout(0.5)
            sandbox.run(f'timeout 2 bash -c "echo >/dev/tcp/::1/{port}"')
            with pytest.raises(TimeoutError):
                listening.accept()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening:
        listening.bind(("0.0.0.0", 0))
        listening.settimeout(0.5)
        sandbox.run(f'bash -c "echo in >/dev/udp/127.0.0.1/{listening.getsockname()[1]}"')
        with pytest.raises(TimeoutError):
            listening.recv(9)


@needs_python
def test_sockets_of_other_families_are_refused(sandbox):
    """By the filter, whatever the kernel has: with the error that it gives, for every kind and protocol."""
    code = "import socket, errno\nfor family in range(64):\n    if family in (1, 2, 10, 16): continue\n"
    code += "    for kind in (1, 2, 3, 5):\n        for protocol in (0, 768):\n            try:\n"
    code += "                socket.socket(family, kind, protocol)\n                print('in', family, kind)\n"
    code += "            except OSError as error:\n"
    code += "                if error.errno != errno.EAFNOSUPPORT: print(error, family, kind)"
    ran = sandbox.run(python(code))
    assert (ran.status, ran.output) == (0, "")


@needs_python
def test_raw_sockets_are_refused(sandbox):
    for args in ("socket.AF_INET, socket.SOCK_RAW, 1", "socket.AF_INET6, socket.SOCK_RAW, 58"):
        assert sandbox.run(python(f"import socket\nsocket.socket({args})")).status == 7


@needs_python
def test_abstract_sockets_of_the_host_are_not_reached(sandbox):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"\0lora_ppo_{os.getpid()}")
        listening.listen()
        code = f"import socket\nsocket.socket(socket.AF_UNIX).connect('\\0lora_ppo_{os.getpid()}')"
        assert sandbox.run(python(code)).status == 7


# ------------------------------------------------------------------------------------------------------------ limits


def test_a_fork_bomb_is_contained(sandbox):
    if not Path("/usr/bin/perl").exists():
        pytest.skip("no perl")
    code = f"for (1..{SMALL.processes + 20}) {{ my $p = fork; "
    code += "if (!defined $p) { print $_; exit } if (!$p) { sleep 9; exit } }"
    count = int(sandbox.run(f"perl -e '{code}'").output)
    assert count <= SMALL.processes
    sandbox.run(":(){ :|:& };: 2>/dev/null; sleep 5", seconds=1)
    assert sandbox.run("echo still here").output == "still here\n"


def test_memory_is_limited(sandbox):
    ran = sandbox.run(f"head -c {SMALL.memory_mb * 2}M /dev/zero | tail >/dev/null; exit ${{PIPESTATUS[1]}}")
    assert ran.status != 0
    assert sandbox.run("echo still here").output == "still here\n"


@pytest.mark.skipif(not cgroup_parents(), reason="no cgroup can be made here")
def test_in_a_cgroup_memory_and_cpu_are_limited_in_total(sandbox):
    if not Path("/usr/bin/perl").exists():
        pytest.skip("no perl")
    half = f"perl -e '$x = \"a\" x ({SMALL.memory_mb // 2} << 20); sleep 2' &"
    ran = sandbox.run(f"{half} {half} {half} for job in $(jobs -p); do wait $job || exit 3; done")
    assert ran.status == 3
    used = sandbox.run("perl -e 'alarm 2; 1 while 1' & perl -e 'alarm 2; 1 while 1' & wait; times").output
    seconds = sum(60 * int(m) + float(s) for m, s in re.findall(r"(\d+)m([\d.]+)s", used.splitlines()[-1]))
    assert 0.2 < seconds < 1.3 * 2 * SMALL.cpus


def test_without_a_cgroup_processes_of_all_ids_together_are_limited(without_cgroup):
    code = "for $u (1001..1003) { if (!fork) { $> = $< = $u; for (1..30) { $p = fork; last if !defined $p; "
    code += 'if (!$p) { sleep 9; exit } } sleep 9; exit } } sleep 1; print scalar(() = glob("/proc/[0-9]*"))'
    ran = without_cgroup.run(f"perl -e '{code}'")
    assert 20 < int(ran.output) <= SMALL.processes
    assert without_cgroup.run("useradd joe && su joe -c 'id -un'").output == "joe\n"


@needs_python
def test_without_a_cgroup_a_process_takes_no_more_memory_and_hides_none(without_cgroup):
    ran = without_cgroup.run(f"head -c {SMALL.memory_mb * 2}M /dev/zero | tail >/dev/null; exit ${{PIPESTATUS[1]}}")
    assert ran.status != 0
    code = "import ctypes, os\nassert ctypes.CDLL(None).shmget(0, 4096, 0o1600) == -1, 'SysV'\nos.memfd_create('x')"
    assert without_cgroup.run(python(code)).output == "[Errno 1] Operation not permitted\n"


def test_files_are_limited_in_size_and_number(sandbox):
    script = "for d in / /tmp /dev/shm /usr/local /etc; do head -c 20M /dev/zero >$d/big; done 2>&1; "
    script += "du -cm /big /*/big /usr/local/big /dev/shm/big | tail -n 1"
    total = int(sandbox.run(script, most=10_000).output.splitlines()[-1].split()[0])
    assert total <= SMALL.disk_mb
    sandbox.run("rm -f /big /*/big /usr/local/big /dev/shm/big; mkdir /many; cd /many; seq 9000 | xargs touch")
    assert int(sandbox.run("ls /many | wc -l").output) < SMALL.inodes
    # A full disk is the episode's own doing: commands and the check still run.
    assert sandbox.run("echo still here").output == "still here\n"
    assert sandbox.check("test -d /many").status == 0


def test_huge_output_is_cut_and_counted(sandbox):
    ran = sandbox.run("head -c 30M /dev/zero | tr '\\0' x", most=1000)
    assert ran.output == "x" * 1000
    assert ran.left_out == (30 << 20) - 1000
    assert ran.status == 0


# --------------------------------------------------------------------------------------------------------- the check


@pytest.mark.parametrize(
    "attack",
    [
        "rm -f /usr/bin/grep; printf '#!/bin/sh\\nexit 0\\n' >/usr/bin/grep; chmod +x /usr/bin/grep",
        "printf '#!/bin/sh\\nexit 0\\n' >/usr/local/bin/grep; chmod +x /usr/local/bin/grep",
        "rm -f /bin/bash; ln -s /bin/true /bin/bash",
        *(
            f"for name in bash grep awk test sh; do cp /bin/true {place}/$name; done"
            for place in ("/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/local/bin", "/usr/games", "/usr/local/games")
        ),
        "echo '/tmp/evil.so' >/etc/ld.so.preload; mv /etc /e; mkdir /etc; echo /tmp/evil.so >/etc/ld.so.preload",
        "mv /lib64 /l; mkdir /lib64; mv /usr /u; mkdir -p /usr/bin; cp /bin/true /usr/bin/grep",
        "echo 'exit 0' >~/.bashrc; echo 'exit 0' >/etc/profile; echo 'exit 0' >/etc/bash.bashrc",
        "grep() { true; }; export -f grep; alias test=true; export BASH_ENV=/tmp/x; echo 'exit 0' >/tmp/x",
        "rm -rf /etc/alternatives; ln -sf /bin/true /etc/alternatives/awk",
    ],
)
def test_the_check_runs_with_programs_of_its_own(sandbox, attack):
    sandbox.run(f"echo wrong >/answer; {attack}")
    assert sandbox.check("grep -q right /answer").status != 0
    assert sandbox.check("test ! -s /etc/ld.so.preload").status == 0  # loaded into every program
    assert sandbox.check("echo wrong right | awk '{ exit $2 == \"right\" ? 0 : 1 }'").status == 0


@needs_python
def test_a_check_in_python_runs_nothing_of_the_episode(sandbox):
    where = (
        "import sys, os; v = f'python3.{sys.version_info[1]}'; own = 'import os; os._exit(0)'\n"
        "own_site = os.path.expanduser(f'~/.local/lib/{v}/site-packages')\n"
        "for place in (f'{sys.prefix}/local/lib/{v}/dist-packages', f'/etc/{v}', own_site):\n"
        "    for name in ('sitecustomize.py', 'usercustomize.py', 'x.pth'):\n"
        "        try:\n"
        "            os.makedirs(place, exist_ok=True); open(f'{place}/{name}', 'w').write(own)\n"
        "        except OSError: pass\n"
    )
    sandbox.run("python3 -", stdin=where.encode())
    assert sandbox.run("ls ~/.local/lib/python3*/site-packages").output.split() == [
        "sitecustomize.py",
        "usercustomize.py",
        "x.pth",
    ]
    assert sandbox.check("python3 -c 'import sys; sys.exit(3)'").status == 3
    for place in ("/root", "/tmp"):  # where Python and its script are started
        sandbox.run(f"echo 'import os; os._exit(0)' | tee {place}/json.py {place}/random.py")
        sandbox.run(f"echo 'import json, random, sys; sys.exit(3)' >{place}/a_check.py")
        for script in ("-c 'import json, random, sys; sys.exit(3)'", "a_check.py", "- <a_check.py"):
            assert sandbox.check(f"cd {place}; python3 {script}").status == 3


def test_a_check_in_perl_runs_nothing_of_the_episode(sandbox):
    if not Path("/usr/bin/perl").exists():
        pytest.skip("no perl")
    places = sandbox.run("perl -e 'print qq($_\\n) for @INC'").output.split()
    assert len(places) > 3
    for place in places:
        sandbox.run(
            f"mkdir -p {place}/File; cd {place}; echo 'exit 0; 1' | tee strict.pm File/Temp.pm sitecustomize.pl"
        )
    assert sandbox.run("perl -e 'use strict; exit 3'").status == 0  # the attack works where it may
    assert sandbox.check("perl -e 'use strict; use File::Temp; exit 3'").status == 3


def test_nothing_of_the_episode_runs_beside_the_check(sandbox):
    sandbox.run("echo wrong >/answer; (setsid sh -c 'sleep 0.5; echo right >/answer' &); sleep 0.1")
    assert sandbox.check("sleep 1; grep -q right /answer").status != 0


def test_what_an_episode_put_among_the_programs_is_seen_by_the_check(sandbox):
    program = "printf '#!/bin/sh\\necho hi\\n' >/usr/local/bin/hi; chmod +x /usr/local/bin/hi"
    sandbox.run(f"{program}; cp /usr/local/bin/hi /bin/hi2")
    assert sandbox.check('test "$(hi)" = hi && test "$(/bin/hi2)" = hi && test -x /usr/bin/hi2').status == 0


# ------------------------------------------------------------------------------------------------------- what is left


def test_nothing_is_left_once_it_is_closed(sandboxes):
    def cgroups() -> list[Path]:
        return [path for parent in cgroup_parents().values() for path in parent.glob(f"lora_ppo-{os.getpid()}-*")]

    before, descriptors = Path("/proc/self/mountinfo").read_text(), set(os.listdir("/proc/self/fd"))
    sandbox = Namespaces(SMALL)
    sandbox.run("touch /x; sleep 60 & ")
    sandbox.close()
    assert cgroups() == []
    assert Path("/proc/self/mountinfo").read_text() == before
    assert set(os.listdir("/proc/self/fd")) == descriptors


def test_two_sandboxes_see_nothing_of_each_other(sandboxes):
    first, second = Namespaces(SMALL), Namespaces(SMALL)
    try:
        thread = threading.Thread(target=first.run, args=("touch /tmp/mine; sleep 1.5",))
        thread.start()
        time.sleep(0.3)
        assert second.run("ls /tmp; cat /proc/[0-9]*/comm | grep -c sleep").output == "0\n"
        thread.join()
        assert first.run("ls /tmp").output == "mine\n"
    finally:
        first.close()
        second.close()
