"""What the Linux kernel is told to refuse to generated code: a filter of system calls (seccomp) and rules about files
(Landlock). Neither needs root or namespaces, so both work for ordinary users and inside containers.

The filter is a list of what is allowed; everything else fails. So there is no socket, no process but the one that is
there, no signal to another one, no change of owner, mode, limits or priority. Threads are allowed.
"""

import ctypes
import functools
import os
import platform
import struct
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass

# Audit number of the architecture, and the place of its numbers in the tables below.
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

_ALLOWED = {  # name: number on x86_64, on aarch64; None where there is no such call
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "pipe": (22, None),
    "select": (23, None),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "dup2": (33, None),
    "nanosleep": (35, 101),
    "getitimer": (36, 102),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "fsync": (74, 82),
    "ftruncate": (77, 46),
    "getdents": (78, None),
    "getcwd": (79, 17),
    "readlink": (89, None),
    "gettimeofday": (96, 169),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "getpgrp": (111, None),
    "getpgid": (121, 155),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "getdents64": (217, 61),
    "set_tid_address": (218, 96),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "newfstatat": (262, 79),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "set_robust_list": (273, 99),
    "dup3": (292, 24),
    "pipe2": (293, 59),
    "getrandom": (318, 278),
    "membarrier": (324, 283),
    "statx": (332, 291),
    "rseq": (334, 293),
    "faccessat2": (439, 439),
}
_ALLOWED_WITH_LANDLOCK = {  # changes of folders, which its rules keep inside the working folder
    "rename": (82, None),
    "mkdir": (83, None),
    "rmdir": (84, None),
    "unlink": (87, None),
    "mkdirat": (258, 34),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "renameat2": (316, 276),
}
_OPEN, _OPENAT, _CLONE, _CLONE3 = (2, None), (257, 56), (56, 220), (435, 435)
_FCNTL, _IOCTL, _PRLIMIT64 = (72, 25), (16, 29), (302, 261)

_WRITING = 0o3 | 0o100 | 0o1000 | 0o20000000  # open's access mode, O_CREAT, O_TRUNC, O_TMPFILE
_CLONE_THREAD = 0x10000
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)  # duplicate; flags. Not F_SETOWN, by which a signal can be sent
_IOCTL_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)  # is it a terminal, how large, bytes to read, close on exec

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: ld [k]; jeq k; jset k; ret k
_ALLOW, _KILL, _NOT_PERMITTED, _NO_SUCH_CALL = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026

_Instruction = tuple[int, int, int, int]  # code, skip if true, skip if false, k


def _argument(index: int, high: bool = False) -> _Instruction:
    return (_LOAD, 0, 0, 16 + 8 * index + 4 * high)


def _return(value: int) -> _Instruction:
    return (_RETURN, 0, 0, value)


def _filter(architecture: str, writable: bool) -> bytes:
    """Return the seccomp filter as an array of `struct sock_filter`. writable: files may be opened for writing, because
    Landlock says where."""
    audit, column = _ARCHITECTURES[architecture]
    code: list[_Instruction] = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit), _return(_KILL), (_LOAD, 0, 0, 0)]

    def rule(numbers: tuple[int, int | None], block: list[_Instruction]) -> None:
        number = numbers[column]
        if number is not None:
            code.extend([(_EQUAL, 0, len(block), number), *block])

    def one_of(index: int, values: tuple[int, ...]) -> Iterator[_Instruction]:
        yield _argument(index)
        for value in values:
            yield from ((_EQUAL, 0, 1, value), _return(_ALLOW))
        yield _return(_NOT_PERMITTED)

    for numbers in (_ALLOWED | (_ALLOWED_WITH_LANDLOCK if writable else {})).values():
        rule(numbers, [_return(_ALLOW)])
    for numbers, flags in ((_OPEN, 1), (_OPENAT, 2)):
        only_reading = [_argument(flags), (_ANY_BIT, 0, 1, _WRITING), _return(_NOT_PERMITTED)]
        rule(numbers, [*([] if writable else only_reading), _return(_ALLOW)])
    rule(_CLONE, [_argument(0), (_ANY_BIT, 0, 1, _CLONE_THREAD), _return(_ALLOW), _return(_NOT_PERMITTED)])
    rule(_CLONE3, [_return(_NO_SUCH_CALL)])  # its flags lie in memory; the C library then takes clone
    rule(_FCNTL, list(one_of(1, _FCNTL_COMMANDS)))
    rule(_IOCTL, list(one_of(1, _IOCTL_COMMANDS)))
    no_new_limit = [_argument(2), (_EQUAL, 0, 3, 0), _argument(2, high=True), (_EQUAL, 0, 1, 0), _return(_ALLOW)]
    rule(_PRLIMIT64, [*no_new_limit, _return(_NOT_PERMITTED)])
    code.append(_return(_NOT_PERMITTED))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


# Landlock's rights: bits of LANDLOCK_ACCESS_FS_*. The first 13 are of version 1, then one each of versions 2 and 3.
_RIGHTS_OF_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1}
_ALL_RIGHTS = (1 << 15) - 1
_WRITE_FILE, _READ_FILE, _READ_FOLDER = 1 << 1, 1 << 2, 1 << 3
_REMOVE_FOLDER, _REMOVE_FILE, _MAKE_FOLDER, _MAKE_FILE, _MOVE, _TRUNCATE = (1 << bit for bit in (4, 5, 7, 8, 13, 14))
_CHANGE = _WRITE_FILE | _REMOVE_FOLDER | _REMOVE_FILE | _MAKE_FOLDER | _MAKE_FILE | _MOVE | _TRUNCATE
_TRUNCATE_VERSION = 3  # below, a file that may be read could be emptied, so that nothing may be opened for writing
_LANDLOCK_CREATE, _WANT_VERSION = 444, 1  # the calls are 444 to 446 on every architecture


@dataclass(frozen=True)
class Policy:
    """filter: seccomp's. handled: Landlock's rights that are refused but for `paths` and the working folder, 0 without
    Landlock. paths: (path, rights there). folder: the rights in the working folder."""

    filter: bytes
    handled: int
    paths: tuple[tuple[str, int], ...]
    folder: int


def readable_folders() -> list[str]:
    """List what Python itself needs to read: its installation and the system's libraries and time zones."""
    own = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sys.base_prefix, sys.base_exec_prefix]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    folders = {*own, *map(os.path.realpath, own), *system} - {"/"}
    return sorted(path for path in folders if os.path.isdir(path))


@functools.cache
def policy() -> Policy | None:
    """Return what this machine's kernel can be told; None where it offers no filter that is known here."""
    architecture = platform.machine()
    if sys.platform != "linux" or architecture not in _ARCHITECTURES or struct.calcsize("P") != 8:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), _WANT_VERSION)
    writable = version >= _TRUNCATE_VERSION
    handled = _RIGHTS_OF_VERSION.get(version, _ALL_RIGHTS) if version > 0 else 0
    read = _READ_FILE | _READ_FOLDER
    files = [("/etc/ld.so.cache", _READ_FILE), ("/etc/localtime", _READ_FILE), ("/dev/urandom", _READ_FILE)]
    files.append(("/dev/null", _READ_FILE | _WRITE_FILE))
    paths = [(path, read) for path in readable_folders()] + [
        (path, rights) for path, rights in files if os.path.exists(path)
    ]
    return Policy(_filter(architecture, writable), handled, tuple(paths), handled & (read | _CHANGE))
