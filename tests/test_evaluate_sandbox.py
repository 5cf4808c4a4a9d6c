"""The sandbox of the code suites: what nasty programs may not do, that they do not pass, and what stays unharmed."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluate import Program, Sandbox, sandbox, sandbox_kernel

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("assert f(2) == 3",)
RIGHT = "def f(x):\n    return x + 1\n"
ON_LINUX = pytest.mark.skipif(sandbox_kernel.policy() is None, reason="this machine's kernel has no known filter")


@pytest.fixture(params=[pytest.param("kernel", marks=ON_LINUX), "guards"])
def boxed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """A sandbox kept by the kernel, or by the guards inside the interpreter alone; its folders lie in tmp_path."""
    (tmp_path / "folders").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "folders"))
    monkeypatch.setattr(sandbox, "_WALL", 6)
    if request.param == "guards":
        monkeypatch.setattr(sandbox, "policy", lambda: None)
    return Sandbox(timeout=1, jobs=2, weak=request.param == "guards")


def processes_in(folder: Path) -> list[int]:
    """The processes whose working folder lies in `folder` (on Linux)."""
    pids = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if os.readlink(cwd).startswith(str(folder)):
                pids.append(int(cwd.parent.name))
        except OSError:  # it has ended, or is another user's
            continue
    return pids


def outcomes(boxed: Sandbox, *candidates: str) -> list[tuple[bool, str]]:
    return [(outcome.passed, outcome.why) for outcome in boxed.run([Program((code,), TESTS) for code in candidates])]


def test_honest_programs(boxed: Sandbox) -> None:
    libraries = "asyncio dataclasses decimal hashlib heapq itertools math random re sqlite3 typing zoneinfo"
    useful = f"import {', '.join(libraries.split())}\n{RIGHT}zoneinfo.ZoneInfo('UTC')\nhashlib.md5(b'x')\n"
    own_file = f"{RIGHT}with open('x', 'w') as file:\n    file.write('1')\nassert open('x').read() == '1'\n"
    own_file += "import os, pathlib\nos.mkdir('y')\nos.rename('x', 'y/x')\nassert pathlib.Path('y/x').exists()\n"
    dataclass = (
        f"from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int' = 1\n{RIGHT}assert P() == P(1)\n"
    )
    passed = outcomes(boxed, RIGHT, useful, own_file, dataclass, "f = lambda x: x + 1", f"{RIGHT}print('x' * 9)\n")
    assert passed == [(True, "passed")] * 6


@ON_LINUX
def test_threads_are_honest(tmp_path: Path) -> None:
    code = f"import threading\n{RIGHT}t = threading.Thread(target=f, args=(1,))\nt.start()\nt.join()\n"
    assert Sandbox(timeout=10).run([Program((code,), TESTS)])[0].passed


def test_the_limit_is_cpu_time(boxed: Sandbox) -> None:
    """Not wall time, which depends on what else the machine does: only a program that never ends meets it."""
    wait = "import time\ndef wait(clock):\n    start = clock()\n    while clock() < start + 2.2:\n        {}\n" + RIGHT
    asleep, busy = wait.format("time.sleep(0.1)"), wait.format("pass")
    results = outcomes(boxed, f"{asleep}wait(time.time)", f"{busy}wait(time.process_time)", f"{RIGHT}while True: pass")
    assert results == [(True, "passed"), (False, "timeout"), (False, "timeout")]
    [outcome] = boxed.run([Program((f"{busy}wait(time.process_time)",), TESTS, seconds=3)])
    assert outcome.passed


def test_why(boxed: Sandbox) -> None:
    reasons = {
        "def f(x):\n    return x": "AssertionError",
        "def f(x):\n    raise KeyError('a\\nb')": r"KeyError: 'a\nb'",
        "def f(x)\n    return x": "SyntaxError: expected ':'",
        "def g(x):\n    return x": "NameError: name 'f' is not defined",
        "raise ValueError('\\x1b[31m')": "ValueError: ?[31m",
        "import os\nos.kill": "NameError: name 'f' is not defined",
        "import numpy": "ModuleNotFoundError: No module named 'numpy'",
        "def f(x):\n    return f(x)": "RecursionError: maximum recursion depth exceeded",
        "x = bytes(1 << 40)": "MemoryError",
        "x = [0] * (100 << 30)": "MemoryError",
    }
    results = [(passed, why.split(" (")[0]) for passed, why in outcomes(boxed, *reasons)]
    assert results == [(False, why) for why in reasons.values()]


EARLY = [
    "import os; os._exit(0)",
    "import sys; sys.exit(0)",
    "raise SystemExit",
    "exit()",
    "def f(x):\n    import os\n    os._exit(0)",
    "def f(x):\n    raise SystemExit(0)",
    "import os\nfor n in range(1, 99):\n    try: os.write(n, b'passed')\n    except OSError: pass\nos._exit(0)",
    "import os\nfor n in range(1, 99):\n    try: os.write(n, b'ready\\npassed\\n')\n    except OSError: pass\n" + RIGHT,
    "import sys\nsys.audit('evaluate.end')\n" + RIGHT,
    "import sys\ndef f(x):\n    sys.audit('evaluate.end')",
    "import gc\ngc.get_objects()\n" + RIGHT,
    "import sys\nsys.settrace(print)\n" + RIGHT,
    "import os, signal\nos.abort()",
    "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.exec = print\ndef f(x): return 0",
    "import builtins\nbuiltins.len = abs = lambda x: 3\ndef f(x): return len(x) and 0",
    # whatever the frames that called it hold
    """
import os, sys
frame, seen = sys._getframe(), []
while frame:
    seen += [*frame.f_locals.values(), *frame.f_globals.values()]
    frame = frame.f_back
for value in seen:
    seen += value.values() if type(value) is dict else value if type(value) in (list, tuple) else []
    if len(seen) > 9999:
        break
for value in seen:
    if type(value) is str and len(value) == 32:
        os.write(3, value.encode())
os._exit(0)
""",
]


def test_quitting_early_does_not_pass(boxed: Sandbox) -> None:
    results = dict(zip(EARLY, outcomes(boxed, *EARLY), strict=True))
    assert [code for code, (passed, why) in results.items() if passed or why == "timeout"] == []


def test_the_tests_get_the_real_built_in_functions(boxed: Sandbox) -> None:
    code = "import builtins\nlen = lambda x: 3\nbuiltins.abs = builtins.sum = lambda x: 3\ndef max(x): return 7\n"
    tests = ("assert len([1]) == 1 and abs(-2) == 2 and sum([1]) == 1", "assert max([1]) == 7")
    [outcome] = boxed.run([Program((code,), tests, ("max",))])
    assert outcome.passed, outcome.why


def test_what_a_program_must_not_do(boxed: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "in the environment")
    precious, made = tmp_path / "precious", tmp_path / "made"
    precious.write_text("unharmed")
    mode, limits = precious.stat().st_mode, os.getpriority(os.PRIO_PROCESS, 0)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    loop = "while True:\n    {}\n"
    nasty = {  # each swallows what it can and then gives the right answer
        "loop": loop.format("pass"),
        "deaf": "import signal\nfor n in (15, 2, 24):\n    signal.signal(n, signal.SIG_IGN)\n" + loop.format("pass"),
        "print": loop.format("print('x' * 1000)"),
        "sleep": "import time\ntime.sleep(1000)",
        "fork": "import os\n" + loop.format("os.fork()"),
        "daemon": "import os\nif not os.fork():\n    os.setsid()\n    while True: pass",
        "spawn": "import subprocess\nsubprocess.Popen(['sleep', '1000'])",
        "system": f"import os\nos.system('touch {made}')",
        "exec": "import os\nos.execv('/bin/true', ['true'])",
        "posix_spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "write": f"open({str(made)!r}, 'w').write('x')",
        "append": f"open({str(precious)!r}, 'a').write('x')",
        "bytes": f"open({bytes(precious)!r}, 'wb')",
        "read and write": f"open({str(precious)!r}, 'r+')",
        "up": "open('../made', 'w')",
        "os.open": f"import os\nos.open({str(precious)!r}, os.O_RDONLY | os.O_TRUNC)",
        "pathlib": f"import pathlib\npathlib.Path({str(made)!r}).write_text('x')",
        "remove": f"import os\nos.remove({str(precious)!r})",
        "rename": f"import os\nos.rename({str(precious)!r}, 'mine')",
        "chmod": f"import os\nos.chmod({str(precious)!r}, 0)",
        "truncate": f"import os\nos.truncate({str(precious)!r}, 0)",
        "link": f"import os\nos.symlink({str(tmp_path)!r}, 'out')",
        "mkdir": f"import os\nos.mkdir({str(made)!r})",
        "chdir": "import os\nos.chdir('/')",
        "rmtree": f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        "sqlite": f"import sqlite3\nsqlite3.connect({str(made)!r}).execute('create table t (x)')",
        "socket": f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
        "urllib": f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)",
        "kill": "import os\nos.kill(os.getppid(), 9)",
        "killpg": "import os\nos.killpg(os.getpgid(os.getppid()), 9)",
        "ctypes": "import ctypes\nctypes.CDLL(None).kill(ctypes.CDLL(None).getppid(), 9)",
        "limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (9, 9))",
        "files": "for n in range(1000):\n    open(str(n), 'w').close()",
    }
    codes = [
        "try:\n    " + code.replace("\n", "\n    ") + f"\nexcept Exception: pass\n{RIGHT}" for code in nasty.values()
    ]
    results = dict(zip(nasty, outcomes(boxed, *codes), strict=True))
    assert [name for name, (passed, _) in results.items() if passed] == []
    reasons = {name: why.split(": ")[0] for name, (_, why) in results.items()}
    assert reasons.pop("deaf") in ("ended before the tests did", "timeout")  # the latter on a busy machine
    assert reasons == {name: "timeout" if name in ("loop", "print", "sleep") else "forbidden" for name in reasons}
    assert precious.read_text() == "unharmed" and precious.stat().st_mode == mode
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folders", "precious"]
    assert list((tmp_path / "folders").iterdir()) == []  # each folder is thrown away
    assert os.getpriority(os.PRIO_PROCESS, 0) == limits
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()
    assert processes_in(tmp_path) == []


def test_a_program_sees_nothing_of_its_caller(boxed: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    secret = tmp_path / "secret"
    secret.write_text("2")
    code = f"""
import os, sys
seen = [*os.environ, *sys.argv[1:], sys.stdin.read()]
for path in ({str(secret)!r}, f"/proc/{{os.getppid()}}/environ", "/etc/passwd", "../../secret"):
    try:
        seen.append(open(path).read())
    except OSError:
        pass
assert seen == [""], seen
{RIGHT}"""
    assert outcomes(boxed, code) == [(True, "passed")]


@ON_LINUX
@pytest.mark.parametrize("landlock", [True, False])
def test_the_kernel_refuses_without_any_guard(tmp_path: Path, landlock: bool) -> None:
    """The filter and the rules alone: here nothing in the interpreter watches."""
    known = sandbox_kernel.policy()
    assert known is not None
    if landlock and not known.handled:
        pytest.skip("this machine's kernel has no Landlock")
    own, outside = tmp_path / "own", tmp_path / "outside"
    own.mkdir()
    outside.write_text("unharmed")
    writable = landlock and known.folder & 2
    code = known.filter if landlock else sandbox_kernel._filter(os.uname().machine, False)
    rules = {"handled": known.handled, "paths": [*known.paths, (str(own), known.folder)]} if landlock else {}
    policy = {"filter": code.hex(), "handled": 0, "paths": []} | rules
    script = f"""
import fcntl, json, os, resource, signal, socket, sys, threading
sys.path.insert(0, {str(ROOT)!r})
from evaluate.sandbox_child import _seal
_seal(**json.loads(sys.stdin.read()), parent=os.getppid())
parent, outside, own = os.getppid(), {str(outside)!r}, {str(own)!r}
acts = {{
    "fork": os.fork,
    "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {{}}),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "socket": socket.socket,
    "unix socket": lambda: socket.socket(socket.AF_UNIX),
    "socket pair": socket.socketpair,
    "kill": lambda: os.kill(parent, 0),
    "kill all": lambda: os.kill(-1, 0),
    "killpg": lambda: os.killpg(os.getpgid(0), 0),
    "own signal": lambda: fcntl.fcntl(0, fcntl.F_SETOWN, parent),
    "pidfd": lambda: os.pidfd_open(parent),
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, parent, 19),
    "affinity": lambda: os.sched_setaffinity(parent, [0]),
    "parent's limit": lambda: resource.prlimit(parent, resource.RLIMIT_CPU, (1, 1)),
    "own limit": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9)),
    "setsid": os.setsid,
    "write": lambda: open(outside, "w"),
    "append": lambda: open(outside, "a"),
    "truncate": lambda: os.truncate(outside, 0),
    "emptied by reading": lambda: os.open(outside, os.O_RDONLY | os.O_TRUNC),
    "make": lambda: open(outside + "2", "x"),
    "remove": lambda: os.remove(outside),
    "rename": lambda: os.rename(outside, outside + "2"),
    "link": lambda: os.link(outside, own + "/link"),
    "symbolic link": lambda: os.symlink(outside, own + "/link"),
    "mode": lambda: os.chmod(outside, 0),
    "owner": lambda: os.chown(outside, 1, 1),
    "times": lambda: os.utime(outside, (1, 1)),
    "folder": lambda: os.mkdir(outside + "2"),
    "pipe": lambda: os.mkfifo(outside + "2"),
    "memory file": lambda: os.memfd_create("x"),
    "chdir": lambda: os.chdir("/"),
    "chroot": lambda: os.chroot("/"),
    "setuid": lambda: os.setuid(1),
    "read": lambda: open(outside).read(),
    "environ": lambda: open(f"/proc/{{parent}}/environ").read(),
    "write own": lambda: open(own + "/x", "w").write("x"),
    "remove own": lambda: os.remove(own + "/x"),
    "thread": lambda: threading.Thread(target=print, args=("",), kwargs={{"end": ""}}).start(),
    "library": lambda: open(os.__file__).read(),
    "null": lambda: open(os.devnull).read(),
}}
done = []
for name, act in acts.items():
    try:
        act()
        done.append(name)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in (1, 13, None):
            done.append(f"{{name}}: {{error}}")
print(json.dumps(done))
os._exit(0)
"""
    script = script.replace("os._exit(0)\n", "sys.stdout.flush()\nos._exit(0)\n")
    ran = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(policy), capture_output=True, text=True, timeout=60
    )
    reads = [] if landlock else ["read", "environ"]  # what is read can go nowhere
    writes = ["write own", "remove own"] if writable else []
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout) == [*reads, *writes, "thread", "library", "null"]
    assert outside.read_text() == "unharmed" and sorted(entry.name for entry in tmp_path.iterdir()) == [
        "outside",
        "own",
    ]


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
@pytest.mark.parametrize("writable", [True, False])
def test_the_filter_is_well_formed(architecture: str, writable: bool) -> None:
    code = sandbox_kernel._filter(architecture, writable)
    assert len(code) % 8 == 0 and len(code) // 8 < 4096
    instructions = [code[start : start + 8] for start in range(0, len(code), 8)]
    for index, (kind, _, if_true, if_false) in enumerate(code[:4] for code in instructions):
        assert kind in (0x20, 0x15, 0x45, 0x06) and index + max(if_true, if_false) + 1 <= len(instructions)
    assert instructions[-1] == b"\x06\x00\x00\x00\x01\x00\x05\x00"  # what is not allowed is not permitted


def test_without_a_kernel_that_can_it_takes_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "policy", lambda: None)
    with pytest.raises(OSError, match="cannot keep generated code in .*; --weak_sandbox does with guards"):
        Sandbox()
    assert Sandbox(weak=True).note.startswith("note: generated code was kept in by guards")


@ON_LINUX
def test_a_filter_that_the_kernel_rejects_is_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Sandbox(weak=True).note == ""
    broken = sandbox_kernel.Policy(b"\xff" * 8, 0, (), 0)
    monkeypatch.setattr(sandbox, "policy", lambda: broken)
    with pytest.raises(OSError, match="cannot keep generated code in .*prctl 22"):
        Sandbox()


def waited(what: str, condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"never: {what}")


@ON_LINUX
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_no_program_outlives_the_evaluation(tmp_path: Path, end: signal.Signals) -> None:
    code = f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
from evaluate import Program, Sandbox
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
box = Sandbox(timeout=3000, jobs=2)
print("started", flush=True)
box.run([Program(("while True: pass",), ())] * 6)
"""
    env = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    waited("two run", lambda: len(processes_in(tmp_path)) == 2)
    process.send_signal(end)
    assert process.wait(60) == -end
    waited("none runs", lambda: not processes_in(tmp_path))
    process.stdout.close()
