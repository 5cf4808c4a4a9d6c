"""The process in which one generated program runs: a script that `evaluate.sandbox` starts in an interpreter of its
own.

It reads its task from stdin, gives up what the program must not have, runs the program and its tests, and writes to
stdout "ready", then the task's token if the tests ran to their end, or else why they did not, in one line.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

_CHANGES = 64  # files opened for writing, folders made and the like, at most
_FORBIDDEN = (  # beginnings of the names of Python's audit events that end the process
    "socket.",
    "ctypes.",
    "subprocess.",
    "pty.",
    "syslog.",
    "resource.setrlimit",
    "resource.prlimit",
    "signal.pthread_kill",
    "gc.get_",  # these would find what holds the token
    "sys._current_",
    "sys.settrace",
    "sys.setprofile",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
    "os.chdir",
    "os.chflags",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.removexattr",
    "os.setxattr",
    "os.symlink",
    "os.utime",
)
_CHANGING = {  # audit event: how many paths it comes with
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.truncate": 1,
    "shutil.rmtree": 1,
    "sqlite3.connect": 1,
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    task = json.loads(sys.stdin.buffer.read())
    os.environ.clear()
    result = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    try:
        _limit(task)
        if task["policy"]:
            _seal(**task["policy"])
        for name in [name for name in sys.modules if "ctypes" in name]:
            del sys.modules[name]  # ctypes writes to any place in memory; imported again, it is noticed
    except Exception as error:
        os.write(result, f"setup: {error}".encode())
        os._exit(1)
    os.write(result, b"ready\n")
    _run(task, result)


def _limit(task: dict[str, Any]) -> None:
    """Set the limits that POSIX has. Without a policy for the kernel, a limit that this system lacks is left out."""
    limits = {"CPU": task["seconds"], "AS": task["memory"], "FSIZE": task["file_size"], "NOFILE": 64, "CORE": 0}
    if task["policy"] is None:
        limits["NPROC"] = 0  # root is above this limit
    for name, limit in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = limit + 1 if name == "CPU" else limit  # a second more for a program that ignores the signal
        most = resource.getrlimit(number)[1]
        if most != resource.RLIM_INFINITY:
            limit, hard = min(limit, most), min(hard, most)
        try:
            resource.setrlimit(number, (limit, hard))
        except (ValueError, OSError):
            if task["policy"] is not None:
                raise


def _seal(filter: str, handled: int, paths: list[tuple[str, int]], parent: int) -> None:
    """Have the kernel refuse from here on whatever the policy does not allow, to root as well."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: int | bytes) -> int:
        values = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
        answer = getattr(libc, name)(*values)
        if answer < 0:
            raise OSError(f"{name} {arguments[0]!r}: {os.strerror(ctypes.get_errno())}")
        return answer

    call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: end with the evaluation
    if os.getppid() != parent:
        raise OSError("the evaluation has ended")
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if handled:
        rules = call("syscall", 444, struct.pack("Q", handled), 8, 0)  # landlock_create_ruleset
        for path, rights in paths:
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            call("syscall", 445, rules, 1, struct.pack("=Qi", rights & handled, folder), 0)  # landlock_add_rule
            os.close(folder)
        call("syscall", 446, rules, 0)  # landlock_restrict_self
        os.close(rules)
    code = ctypes.create_string_buffer(bytes.fromhex(filter))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(code))
    call("prctl", 22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _run(task: dict[str, Any], result: int) -> NoReturn:
    """Run the program, then its tests. What this function needs it holds in names of its own, and the tests get the
    built-in functions as they were, so that a program which replaces them changes neither."""
    execute, audit, reason, leave, write, own = exec, sys.audit, _reason, os._exit, os.write, sys._getframe()
    builtins = dict(vars(sys.modules["builtins"]))
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    del sys.modules["__main__"]
    variables = vars(module)
    try:
        code = [compile(source, "<candidate>", "exec", dont_inherit=True) for source in task["candidate"]]
        tests = [compile(source, "<tests>", "exec", dont_inherit=True) for source in task["tests"]]
        names = set(task["names"])
        sys.addaudithook(_guard(task.pop("folder"), tuple(task.pop("readable")), task.pop("token"), result, own))
        task.clear()
        for source in code:
            execute(source, variables)
        kept = {name: value for name, value in variables.items() if name in names or name not in builtins}
        kept |= {"__builtins__": builtins, "__name__": "tests"}
        for source in tests:
            execute(source, kept)
        audit("evaluate.end")
    except BaseException as error:
        write(result, reason(error))
    leave(1)


def _reason(error: BaseException) -> bytes:
    message = str(error).strip().split("\n")[0][:160]
    return (type(error).__name__ + (f": {message}" if message else "")).encode("utf-8", "backslashreplace")


def _guard(
    folder: str, readable: tuple[str, ...], token: str, result: int, runner: types.FrameType
) -> Callable[[str, tuple[Any, ...]], None]:
    """The audit hook. It ends the process at a forbidden act, whether or not the kernel refuses it too, and holds the
    token, which no other code can then reach: hooks cannot be listed. It calls nothing that a program could replace,
    and compares texts alone, by their exact type."""
    write, leave, frame, kind, encode = os.write, os._exit, sys._getframe, type, str.encode
    text, data, number, decode, refused = str, bytes, int, bytes.decode, PermissionError
    writing, changing, forbidden, most = _WRITING, dict(_CHANGING), _FORBIDDEN, _CHANGES
    inside, changes, imports = folder + "/", [0], ("ctypes", "_ctypes")

    def plain(path: Any) -> str | None:
        if kind(path) is data:
            path = decode(path, "utf-8", "replace")
        return path if kind(path) is text else None

    def within(path: str) -> bool:
        return (path == folder or path.startswith(inside) or not path.startswith("/")) and ".." not in path.split("/")

    def stop(what: str) -> NoReturn:
        write(result, encode("forbidden: " + what, "utf-8", "backslashreplace"))
        leave(1)

    def change(what: str, path: str | None) -> None:
        changes[0] += 1
        if path is None or not within(path) or changes[0] > most:
            stop(what if path is None else f"{what} {path[:100]}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = plain(arguments[0]), arguments[1], arguments[2]
            if kind(arguments[0]) is number or path == "/dev/null":
                return
            if flags & writing:
                change("writing to", path)
            elif path is None or not (within(path) or (mode is not None and path.startswith(readable))):
                raise refused(1, "only the working folder can be read", path)
        elif event in changing:
            for path in arguments[: changing[event]]:
                change(event, plain(path))
        elif event == "import":
            if kind(arguments[0]) is not text or arguments[0] in imports:
                stop("import ctypes")
        elif event == "evaluate.end":
            if frame(1) is not runner:
                stop(event)
            write(result, encode(token))
            leave(0)
        elif event.startswith(forbidden):
            stop(event)

    return hook


if __name__ == "__main__":
    main()
