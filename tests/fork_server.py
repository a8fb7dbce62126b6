"""Python processes that begin with the large packages imported: forks of one that has done it.

Importing torch, Dynamo and matplotlib takes most of the time of a short training run. ``start``
runs what ``python -c`` or ``python -m`` would run, in a process of its own with its own working
directory, environment and standard streams; fastlstm is imported there, not here. What differs from
a new interpreter: the packages below are imported, hashes of strings have the server's seed, and
OpenMP has read its variables, so that there is one thread.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

IMPORTED = [
    *("torch._dynamo", "torch.distributed.run", "torch.distributed.elastic.multiprocessing"),
    *("torch.distributed.elastic.agent.server.local_elastic_agent", "torch.distributed.fsdp"),
    *("torch.distributed.elastic.rendezvous.c10d_rendezvous_backend", "torch.distributed.tensor"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "jinja2", "numpy", "filelock"),
    *("pooch", "safetensors.torch", "tqdm"),
]
MESSAGE = 1 << 17  # bytes of a request at the most


class Process:
    """What tests use of ``subprocess.Popen``."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], cwd: str, stdin: Any):
        request = json.dumps({"arguments": arguments, "env": dict(env), "cwd": cwd}).encode()
        out, err, ended = os.pipe(), os.pipe(), os.pipe()
        typed = os.pipe() if stdin == subprocess.PIPE else None
        given = [0 if stdin is None else stdin if typed is None else typed[0]]
        given += [out[1], err[1], ended[1]]
        socket.send_fds(_server(), [request], given)
        for fd in given[1 if typed is None else 0 :]:
            os.close(fd)
        self.args = arguments
        self.stdin = os.fdopen(typed[1], "w") if typed is not None else None
        self.stdout, self.stderr = os.fdopen(out[0]), os.fdopen(err[0])
        self._ended = os.fdopen(ended[0])
        self.pid = int(self._ended.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            with self._ended:
                self.returncode = int(self._ended.readline())
        return self.returncode

    def communicate(self, text: str = "", timeout: float | None = None) -> tuple[str, str]:
        """What is left of its output and its errors, when it has ended."""
        found = ["", ""]

        def read(j: int, stream: io.TextIOBase) -> None:
            with stream:
                found[j] = stream.read()

        readers = [
            threading.Thread(target=read, args=x) for x in enumerate((self.stdout, self.stderr))
        ]
        for reader in readers:
            reader.start()
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError), self.stdin:
                self.stdin.write(text)
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return found[0], found[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Any = None, stdin: Any = None
) -> Process | subprocess.Popen[str]:
    """A process that runs like ``python *arguments``.

    Args:
        arguments: ``-W ignore`` or nothing; then ``-c`` and code, or ``-m`` and a module; then what
            that is called with.
        stdin: a file descriptor or ``subprocess.PIPE``; without it, the tests' own.
    """
    env = os.environ if env is None else env
    words = [str(a) for a in arguments]
    if sys.platform != "linux":
        return subprocess.Popen(
            [sys.executable, *words], env=env, cwd=cwd, stdin=stdin, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    return Process(words, env, str(cwd or Path.cwd()), stdin)


def run(*arguments: object, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess:
    """As ``subprocess.run`` with ``capture_output`` and ``text``."""
    process = start(*arguments, **options)
    output, error = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.wait(), output, error)


def without(package: str) -> str:
    """Code behind which a package is not installed."""
    return (
        f"import sys\nfor name in [{package!r}, *sys.modules]:\n"
        f"    if (name + '.').startswith({package + '.'!r}): sys.modules[name] = None\n"
    )


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MESSAGE)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    @atexit.register
    def end() -> None:
        ours.close()  # ends the server
        process.wait()

    return ours


def _serve(requests: socket.socket) -> dict[str, Any]:
    """Forks for every request. Returns in the new process; the server itself ends here."""
    while True:
        request, streams, *_ = socket.recv_fds(requests, MESSAGE, 4)
        if not request:
            sys.exit()
        if os.fork() != 0:  # the server; what follows is left to a child, which waits
            for fd in streams:
                os.close(fd)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0] > 0:
                    pass
            continue
        requests.close()
        pid = os.fork()
        *standard, ended = streams
        if pid == 0:
            os.close(ended)
            for number, fd in enumerate(standard):
                os.dup2(fd, number)
                os.close(fd)
            return json.loads(request)
        for fd in (0, 1, 2, *standard):
            os.close(fd)
        os.write(ended, b"%d\n" % pid)
        os.write(ended, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)


def _become(arguments: list[str], env: dict[str, str], cwd: str) -> None:
    """The process that ``python *arguments`` would be."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    sys.orig_argv = [sys.executable, *arguments]
    if arguments[:2] == ["-W", "ignore"]:
        warnings.simplefilter("ignore")
        del arguments[:2]
    flag, what, *rest = arguments
    sys.argv = [flag, *rest]
    sys.path[0] = "" if flag == "-c" else cwd
    sys.path[1:1] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    if flag == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        assert flag == "-c"
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)


def _end(status: object) -> NoReturn:
    """Ends as an interpreter does, without taking apart what is imported, which takes a second."""
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            status = 120
    os._exit(status or 0)


if __name__ == "__main__":
    for _name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(_name)
    gc.freeze()  # a collection in a fork would copy the pages of all of it
    _request = _serve(socket.socket(fileno=int(sys.argv[1])))
    try:
        _become(**_request)
    except SystemExit as _error:
        _end(_error.code)
    except Exception:
        sys.excepthook(*sys.exc_info())
        _end(1)
    _end(0)
