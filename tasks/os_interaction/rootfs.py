"""What stands in a sandbox's root before anything ran: its own /etc, /var, /home, ..., packed once as a tar archive.

Accounts are those of a fresh Debian (base-passwd's own lists, where it is installed), never the host's.
"""

import io
import tarfile
import time
from functools import cache
from pathlib import Path

# Of the host's /etc, what programs need and what tells nothing about the host.
FROM_HOST = (
    "adduser.conf bash.bashrc debconf.conf debian_version default/useradd deluser.conf gai.conf host.conf "
    "inputrc issue issue.net ld.so.conf ld.so.conf.d libaudit.conf locale.alias localtime login.defs logrotate.d "
    "magic magic.mime mime.types networks nsswitch.conf os-release pam.conf pam.d profile profile.d protocols "
    "rpc security selinux services shells skel terminfo vim"
).split()
FOLDERS = {
    "etc": "cron.d cron.daily cron.hourly cron.weekly cron.monthly default init.d opt sudoers.d systemd/system",
    "": "boot home media mnt opt run run/lock srv tmp:1777 root:700 usr bin sbin lib lib64 lib32 libx32 dev proc sys",
    "var": "backups cache lib lib/misc local:2775:50 log log/apt mail:2775:8 opt spool spool/cron tmp:1777 www",
}
ACCOUNTS = Path("/usr/share/base-passwd")
PASSWD = """root:*:0:0:root:/root:/bin/bash
daemon:*:1:1:daemon:/usr/sbin:/usr/sbin/nologin
bin:*:2:2:bin:/bin:/usr/sbin/nologin
sys:*:3:3:sys:/dev:/usr/sbin/nologin
mail:*:8:8:mail:/var/mail:/usr/sbin/nologin
www-data:*:33:33:www-data:/var/www:/usr/sbin/nologin
nobody:*:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
GROUP = """root:*:0:
daemon:*:1:
bin:*:2:
sys:*:3:
adm:*:4:
tty:*:5:
mail:*:8:
shadow:*:42:
staff:*:50:
sudo:*:27:
users:*:100:
www-data:*:33:
nogroup:*:65534:
"""


def accounts() -> dict[str, str]:
    """passwd, group, shadow and gshadow as a fresh system has them; nobody has a password."""

    def rows(name: str, otherwise: str) -> list[list[str]]:
        there = ACCOUNTS / f"{name}.master"
        return [line.split(":") for line in (there.read_text() if there.exists() else otherwise).splitlines() if line]

    users, groups = rows("passwd", PASSWD), rows("group", GROUP)
    return {
        "passwd": "".join(":".join([row[0], "x", *row[2:]]) + "\n" for row in users),
        "shadow": "".join(f"{row[0]}:*:19700:0:99999:7:::\n" for row in users),
        "group": "".join(":".join([row[0], "x", *row[2:]]) + "\n" for row in groups),
        "gshadow": "".join(f"{row[0]}:*::\n" for row in groups),
    }


@cache
def archive() -> bytes:
    """The root's own folders and files as a tar archive, owned by root inside."""
    buffer, now = io.BytesIO(), int(time.time())
    with tarfile.open(fileobj=buffer, mode="w", dereference=False) as tar:

        def folder(path: str, mode: int = 0o755, group: int = 0) -> None:
            entry = tarfile.TarInfo(path)
            entry.type, entry.mode, entry.gid, entry.mtime = tarfile.DIRTYPE, mode, group, now
            tar.addfile(entry)

        def file(path: str, content: bytes, mode: int = 0o644, group: int = 0) -> None:
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode, entry.gid, entry.mtime = len(content), mode, group, now
            tar.addfile(entry, io.BytesIO(content))

        def link(path: str, target: str) -> None:
            entry = tarfile.TarInfo(path)
            entry.type, entry.linkname, entry.mtime = tarfile.SYMTYPE, target, now
            tar.addfile(entry)

        for top, inner in FOLDERS.items():
            if top:
                folder(top)
            for item in inner.split():
                name, mode, group = [*item.split(":"), "755", "0"][:3] if ":" in item else (item, "755", "0")
                folder(f"{top}/{name}".lstrip("/"), int(mode, 8), int(group) if item.count(":") == 2 else 0)
        link("var/run", "/run")
        link("var/lock", "/run/lock")
        link("etc/mtab", "/proc/self/mounts")
        for name, text in accounts().items():
            hidden = name.endswith("shadow")
            file(f"etc/{name}", text.encode(), 0o640 if hidden else 0o644, 42 if hidden else 0)
        file("etc/hostname", b"sandbox\n")
        file("etc/hosts", b"127.0.0.1\tlocalhost\n127.0.1.1\tsandbox\n")
        for name in ("etc/resolv.conf", "etc/fstab", "etc/motd", "etc/ld.so.cache", "etc/ld.so.preload"):
            file(name, b"")
        folder("etc/alternatives")
        for name in ("etc/crontab", "var/log/syslog", "var/log/auth.log", "var/log/dpkg.log", "var/log/lastlog"):
            file(name, b"")
        for name in FROM_HOST:
            add_host_path(Path("/etc") / name, folder, file, link)
        for name in (".bashrc", ".profile"):
            source = Path("/etc/skel") / name
            if source.is_file():
                file(f"root/{name}", source.read_bytes())
    return buffer.getvalue()


def add_host_path(path: Path, folder, file, link) -> None:
    """Adds a file, link or folder of the host that anybody may read."""
    name = str(path).lstrip("/")
    try:
        if path.is_symlink():
            link(name, str(path.readlink()))
        elif path.is_dir():
            folder(name)
            for child in sorted(path.iterdir()):
                add_host_path(child, folder, file, link)
        elif path.is_file() and path.stat().st_mode & 0o004:
            file(name, path.read_bytes(), path.stat().st_mode & 0o755)
    except OSError:
        return
