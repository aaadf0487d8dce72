"""The system calls that a sandbox refuses, as a program for the kernel: libseccomp makes it, for this machine.

Namespaces hold the rest. This closes what they leave open: sockets of families that reach past a network namespace
(vsock goes to the hypervisor, AF_ALG into the kernel's cryptography), new namespaces, tracing, keyrings, and
interfaces of the kernel that no task needs.
"""

import ctypes
import ctypes.util
import errno
import os
import socket
import tempfile
from functools import cache

ALLOW, REFUSE = 0x7FFF0000, 0x00050000
EQUAL, MASKED, GREATER = 4, 7, 6
SOCKETS = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
REFUSED = (
    "ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp keyctl add_key request_key bpf "
    "perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register kexec_load kexec_file_load "
    "init_module finit_module delete_module mount umount2 pivot_root move_mount open_tree fsopen fsmount fsconfig "
    "fspick mount_setattr setns unshare open_by_handle_at name_to_handle_at quotactl acct swapon swapoff reboot syslog "
    "fanotify_init lookup_dcookie nfsservctl iopl ioperm modify_ldt settimeofday clock_settime adjtimex clock_adjtime"
).split()
MEMORY = ("memfd_create", "memfd_secret", "shmget")  # memory that no limit of a process counts: a cgroup's does
NEW_USER_NAMESPACE = 0x10000000
TERMINAL_INPUT = 0x5412  # TIOCSTI: types into the terminal as if a person had


class Comparison(ctypes.Structure):
    """libseccomp's `scmp_arg_cmp`: what an argument of a call is compared with."""

    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


@cache
def program(in_cgroup: bool) -> bytes:
    """The filter as bytes. Raises OSError where libseccomp is missing or refuses."""
    name = ctypes.util.find_library("seccomp")
    if not name:
        raise OSError(errno.ENOENT, "libseccomp is missing: apt-get install libseccomp2")
    library = ctypes.CDLL(name)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(Comparison),
    ]
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    context = library.seccomp_init(ALLOW)

    def refuse(call: str, error: int, *comparisons: tuple[int, int, int, int]) -> None:
        number = library.seccomp_syscall_resolve_name(call.encode())
        if number == -1:  # this machine has no such call
            return
        rows = (Comparison * max(1, len(comparisons)))(*(Comparison(*row) for row in comparisons))
        failed = library.seccomp_rule_add_array(context, REFUSE | error, number, len(comparisons), rows)
        if failed and number >= 0:  # those below 0 exist on other machines only
            raise OSError(-failed, f"libseccomp takes no rule for {call}")

    try:
        for call in (*REFUSED, *(() if in_cgroup else MEMORY)):
            refuse(call, errno.EPERM)
        refuse("clone", errno.EPERM, (0, MASKED, NEW_USER_NAMESPACE, NEW_USER_NAMESPACE))
        refuse("clone3", errno.ENOSYS)  # its flags can't be looked at; the C library then takes clone
        refuse("ioctl", errno.EPERM, (1, MASKED, 0xFFFFFFFF, TERMINAL_INPUT))
        families = {"socket", "socketpair"}
        for family in range(max(SOCKETS)):
            if family not in SOCKETS:
                for call in families:
                    refuse(call, errno.EAFNOSUPPORT, (0, EQUAL, family, 0))
        for call in families:
            refuse(call, errno.EAFNOSUPPORT, (0, GREATER, max(SOCKETS), 0))
        with tempfile.TemporaryFile() as file:
            if failed := library.seccomp_export_bpf(context, file.fileno()):
                raise OSError(-failed, "libseccomp can't write the filter")
            return os.pread(file.fileno(), 1 << 20, 0)
    finally:
        library.seccomp_release(context)
