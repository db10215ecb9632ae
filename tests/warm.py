"""Start Python programs from a process that has imported torch and Transformers, instead of importing them in each.

These imports cost some ten seconds of processor time, and tests that kill, launch or resume start hundreds of
processes. `replace_popen` makes `subprocess.Popen` fork such programs from a server (the `warm_processes` fixture does
so for a file of tests); programs that are started this way start their own likewise, so that a campaign's runner, the
launcher and the training processes all come from it.

What is forked is a process like one that was spawned: a child of the one that asked (which waits for it, gets its
exit code and its times, and may kill it), in the same session and process group, or its own if that was asked for,
with its own working directory, environment, arguments, open files, signal handlers and, in /proc, command line. It
runs its program as `__main__`, ends with Python's usual exit codes, and has as many threads as its variables say.

Two things differ: all have the same seed for the hashes of strings, and variables that are read while Python or a
library starts cannot be changed any more. A command with other values of those, or with options of Python, or with
anything else that `_can_fork` does not know, is spawned as ever; so is everything on other systems than Linux. Use it
where a test is about what a program does, not about how it starts. (tests/tasks/test_wheel.py spawns every command,
tests/distributed/test_scripts_launched.py what `accelerate launch` starts.)

How: a process that asks for a child has a server of its own, which is itself a child of it, has imported everything
and run nothing. The server forks twice, and the process in between ends. The kernel hands its child to the nearest
ancestor that has declared itself a reaper of orphans (PR_SET_CHILD_SUBREAPER), as the one that asks does meanwhile.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import inspect
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_PR_SET_CHILD_SUBREAPER = 36
# What most of the programs import, and their libraries only when they are used. Nothing that is itself run with -m.
_IMPORTED = (
    "torch", "torch._dynamo", "torch.profiler", "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.rendezvous.registry", "torch.distributed.launcher.api", "torch.utils.tensorboard",
    "transformers.models.bart.modeling_bart", "transformers.models.gpt2.modeling_gpt2", "transformers.trainer_seq2seq",
    "accelerate.commands.config", "datasets", "evaluate", "pandas", "peft", "psutil", "sklearn.metrics",
    "tensorboard.compat.proto.event_pb2", "dpsm_hf.campaign.runner.running", "dpsm_hf.plots.figures",
    "dpsm_hf.plots.reliability", "dpsm_hf.tasks.language_modelling", "dpsm_hf.tasks.summarization",
    "tests.campaign.campaigns", "tests.cases",
)  # fmt: skip
# Variables that the interpreter, the C library or a module reads while it starts, by how they begin. (Not KMP_, which
# Accelerate sets for processes on the CPU: torch's builds for Linux come with another OpenMP.)
_READ_AT_START = (
    "CUDA_", "DS_", "GOMP_", "HF_", "LD_", "MALLOC_", "MKL_", "MPL", "OPENBLAS_", "PYTHON", "TRANSFORMERS_", "TRITON_",
)  # fmt: skip
_READ_LATER = ("PYTHONPATH", "PYTHONUNBUFFERED")  # by the program that is started, see `_become`
# What campaigns and audits set for their processes unless the user has.
_DEFAULTS = {"GOMP_SPINCOUNT": "30000", "TOKENIZERS_PARALLELISM": "false"}
_PADDING = 16384  # bytes that a command line may have: a process cannot be given more room for it later
_SPAWN: type[subprocess.Popen[Any]] = subprocess.Popen
_PARAMETERS = inspect.signature(_SPAWN._execute_child)  # type: ignore[attr-defined]


class WarmPopen(_SPAWN):  # type: ignore[misc,valid-type]
    """`subprocess.Popen` whose Python programs are forked from a server where that makes no difference."""

    def _execute_child(self, *args: Any, **options: Any) -> None:
        given = _PARAMETERS.bind(self, *args, **options).arguments
        if _server is None or not _can_fork(given):
            super()._execute_child(*args, **options)  # type: ignore[misc]
            return
        request = {
            "command": [os.fsdecode(word) for word in given["args"]],
            "directory": os.path.abspath(os.fsdecode(given["cwd"] or ".")),
            "environment": dict(given["env"] if given["env"] is not None else os.environ),
            "new_session": given["start_new_session"],
            "first": given["preexec_fn"],
            "parent": os.getpid(),
        }
        files = [
            own if other == -1 else other
            for own, other in enumerate((given["p2cread"], given["c2pwrite"], given["errwrite"]))
        ]
        try:
            self.pid = _server.fork(request, files)
            self._child_created = True
        finally:
            self._close_pipe_fds(*(given[name] for name in _PIPES))  # type: ignore[attr-defined]


_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


def _can_fork(given: Mapping[str, Any]) -> bool:
    """Return whether a child is a Python program without options, in an environment that can still be set."""
    words = given["args"]
    if isinstance(words, (str, bytes, os.PathLike)) or given["shell"] or given["executable"] is not None:
        return False
    if len(words) < 2 or os.fsdecode(words[0]) != sys.executable or given["pass_fds"]:
        return False
    if any(given[name] is not None for name in ("gid", "gids", "uid")) or given.get("process_group", -1) != -1:
        return False
    words = [os.fsdecode(word) for word in words[1:] if word != "-u"]
    if words[0].startswith("-") and words[0] not in ("-c", "-m"):
        return False
    environment = os.environ if given["env"] is None else given["env"]
    here = {**_DEFAULTS, **environment}
    return all(
        here.get(name) == _started_with.get(name)
        for name in {*here, *_started_with}
        if name.startswith(_READ_AT_START) and name not in _READ_LATER
    )


class _Server:
    """A process that forks others for this one; it ends when this one does.

    Args:
        connection: a socket to it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def fork(self, request: Mapping[str, Any], files: Sequence[int]) -> int:
        """Return the process id of a new child of this process; `files` are its standard files."""
        content = pickle.dumps(request)
        with self._lock:
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self._connection, [len(content).to_bytes(8, "little")], list(files))
                self._connection.sendall(content)
                answer = self._connection.recv(8, socket.MSG_WAITALL)
            finally:
                _prctl(_PR_SET_CHILD_SUBREAPER, 0)
        if len(answer) < 8:
            raise RuntimeError("the server that forks the programs of these tests has ended")
        return int.from_bytes(answer, "little")


_server: _Server | None = None
_started_with: Mapping[str, str] = {}


@contextlib.contextmanager
def replace_popen() -> Iterator[None]:
    """Fork Python programs that are started with `subprocess` during this context; the first use starts the server."""
    global _server, _started_with
    if sys.platform != "linux":
        yield
        return
    if _server is None:
        _started_with = {**_DEFAULTS, **os.environ}
        _server = _start_server(_started_with)
    subprocess.Popen = WarmPopen  # type: ignore[misc]
    try:
        yield
    finally:
        subprocess.Popen = _SPAWN  # type: ignore[misc]


def _start_server(environment: Mapping[str, str]) -> _Server:
    here, there = socket.socketpair()
    with there:
        # dashes make room for the command lines of its children
        command = [sys.executable, "-m", "tests.warm", str(there.fileno()), "-" * _PADDING]
        variables = {**environment, "PYTHONPATH": str(ROOT)}
        _SPAWN(
            command, cwd=ROOT, env=variables, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    if here.recv(1) != b"r":
        raise RuntimeError("the server that forks the programs of these tests did not start; its error is above")
    return _Server(here)


# ---- in the server -------------------------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """Import what is imported everywhere, say that this is done, and serve."""
    global _started_with
    subprocess.Popen = WarmPopen  # type: ignore[misc]  # before a library takes it from there
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as it is in a process until its Python is ready
    gc.disable()
    for name in _IMPORTED:
        with contextlib.suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
    # Arrow's second allocator has one that returns pages; it knows of forks, and Arrow uses its first
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    if len(threads) - threads.count("jemalloc_bg_thd") > 1:
        raise RuntimeError(f"an import has started a thread, which does not survive a fork: {', '.join(threads)}")
    gc.freeze()  # else the first collection of each child would write to, and so copy, all of it
    gc.enable()
    _started_with = dict(os.environ)
    connection = socket.socket(fileno=descriptor)
    connection.sendall(b"r")
    _serve(connection)


def _serve(connection: socket.socket) -> None:
    """Fork a process for each request, and end when the other side does."""
    while True:
        start, files, _, _ = socket.recv_fds(connection, 8, 3)
        if len(start) < 8:
            os._exit(0)
        request = pickle.loads(connection.recv(int.from_bytes(start, "little"), socket.MSG_WAITALL))
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            if (child := os.fork()) == 0:
                _end_with(partial(_become, request, files, writing))
            os.write(writing, child.to_bytes(8, "little"))
            os._exit(0)
        os.close(writing)
        os.waitpid(between, 0)  # from here on its child is the other side's
        child_id = os.read(reading, 8)
        os.read(reading, 1)  # it has called preexec_fn, which Popen waits for too, or has failed and ended
        connection.sendall(child_id)
        for file in (*files, reading):
            os.close(file)


# ---- in the child --------------------------------------------------------------------------------------------------


def _become(request: Mapping[str, Any], files: Sequence[int], ready: int) -> None:
    """Make this process what was asked for, write a byte to the file `ready`, and run the program."""
    while os.getppid() != request["parent"]:
        os.kill(request["parent"], 0)  # an error where it has been killed meanwhile
        time.sleep(0.0005)
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, ready)
    os.closerange(ready + 1, 4096)
    os.chdir(request["directory"])
    if request["new_session"]:
        os.setsid()
    if request["first"] is not None:
        request["first"]()
    os.write(ready, b"r")
    os.close(ready)
    _start_own_server()
    command = request["command"]
    _write_command_line(command)
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(request["environment"])
    words = [word for word in command[1:] if word != "-u"] if command[1] == "-u" else command[1:]
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED")) or command[1] == "-u"
    sys.stdout.reconfigure(line_buffering=unbuffered or os.isatty(1))  # type: ignore[union-attr]
    sys.orig_argv[:] = command
    named = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = ["", *named, *[path for path in sys.path if path and path not in {*before, *named}]]
    _set_threads_and_seed()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _run(words)


def _start_own_server() -> None:
    """Fork the server that this process will ask: this one, before it has done anything."""
    global _server
    here, there = socket.socketpair()
    if os.fork() == 0:
        here.close()
        _serve(there)
    there.close()
    _server = _Server(here)


def _set_threads_and_seed() -> None:
    """Use as many threads as a process that starts with these variables, and random numbers of its own."""
    import numpy
    import torch

    named = os.environ.get("MKL_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")  # torch follows MKL
    threads = int(named) if named else len(os.sched_getaffinity(0))
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    numpy.random.seed()  # noqa: NPY002 - the global one, which all children would share


def _run(words: list[str]) -> None:
    if words[0] == "-c":
        sys.argv[:] = ["-c", *words[2:]]
        code = compile(words[1], "<string>", "exec")
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(code, main.__dict__)
    elif words[0] == "-m":
        sys.argv[:] = words[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def _end_with(function: Callable[[], None]) -> None:
    """Call a function and end this process as Python ends after a program."""
    status = 1
    interrupted = False
    try:
        try:
            function()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            traceback.print_exc()
        # what the interpreter does before it goes
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if interrupted:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        os._exit(status & 0xFF)


def _write_command_line(command: Sequence[str]) -> None:
    """Write a command line over that of this process, which `ps` and psutil show; empty words fill it up."""
    # the fields behind the name, which may itself have blanks and brackets, from the third on
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    start, end = int(fields[48 - 3]), int(fields[49 - 3])
    text = b"\0".join(map(os.fsencode, command))
    if len(text) >= end - start:
        raise RuntimeError(f"this command line has {len(text)} bytes, more than _PADDING in {__name__}: {command}")
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    # as a module, so that what it holds has one name in here and in the requests
    from tests import warm

    warm.main(int(sys.argv[1]))
