"""A Python program that is forked from the tests' server behaves as one that is spawned: both ways, one comparison."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dpsm_hf.runtime.child_process import Child, end_with_parent
from tests import warm
from tests.warm import replace_popen

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every program is spawned")
IS_FORKED = "import sys; print('tests.warm' in sys.modules)"
WHAT_IT_IS = """
import json, os, signal, sys
import torch
print(json.dumps({
    "argv": sys.argv[1:], "name": __name__, "path": sys.path[:2], "folder": os.getcwd(), "input": sys.stdin.read(),
    "variables": {k: v for k, v in sorted(os.environ.items()) if k not in ("PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE")},
    "parent": os.getppid(), "leads session": os.getsid(0) == os.getpid(), "leads group": os.getpgid(0) == os.getpid(),
    "session": os.getsid(0) if os.getsid(0) != os.getpid() else None,
    "group": os.getpgid(0) if os.getpgid(0) != os.getpid() else None,
    "files": sorted(set(os.listdir("/proc/self/fd")) & {str(n) for n in range(3)}),
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "termination": str(signal.getsignal(signal.SIGTERM)), "threads": torch.get_num_threads(),
}))
print("said to the other", file=sys.stderr)
"""


def both(*words: str, **options: Any) -> list[subprocess.CompletedProcess[str]]:
    """Run a program forked and spawned, and check that it was."""
    found = []
    for context in (replace_popen(), contextlib.nullcontext()):
        with context:
            command = [sys.executable, *words]
            found.append(subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options))
    return found


def test_one_is_forked_and_the_other_is_not() -> None:
    assert [done.stdout for done in both("-c", IS_FORKED)] == ["True\n", "False\n"]


@pytest.mark.parametrize("start", ["script", "module", "code"])
def test_it_finds_itself_as_one_that_is_spawned(start: str, tmp_path: Path) -> None:
    (tmp_path / "what_it_is.py").write_text(WHAT_IT_IS)
    words = {"script": [str(tmp_path / "what_it_is.py")], "module": ["-m", "what_it_is"], "code": ["-c", WHAT_IT_IS]}
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(tmp_path / "elsewhere"), "WORD": "ä b"}
    del environment["TOKENIZERS_PARALLELISM"]
    for options in ({}, {"start_new_session": True}):
        one, other = both(
            *words[start], "a b", "", "--c=d", cwd=tmp_path, env=environment, input="asked", **options
        )  # fmt: skip
        assert json.loads(one.stdout) == json.loads(other.stdout)
        assert json.loads(one.stdout)["parent"] == os.getpid() and json.loads(one.stdout)["input"] == "asked"
        assert one.stderr == other.stderr == "said to the other\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0), ("raise SystemExit", 0), ("raise SystemExit(7)", 7), ("raise SystemExit('so')", 1), ("1 / 0", 1),
        ("import os; os._exit(9)", 9), ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL), ("import os; os.abort()", -signal.SIGABRT),
        ("import atexit; atexit.register(print, 'at the end'); raise SystemExit(3)", 3),
        ("import threading, time; threading.Thread(target=lambda: (time.sleep(0.3), print('late'))).start()", 0),
        ("import sys; sys.stdout.write('no end of line'); sys.exit(4)", 4),
    ],
)  # fmt: skip
def test_it_ends_as_one_that_is_spawned(code: str, status: int) -> None:
    one, other = both("-c", code)
    assert one.returncode == other.returncode == status
    assert one.stdout == other.stdout and one.stderr.splitlines()[-1:] == other.stderr.splitlines()[-1:]


def test_what_it_starts_is_forked_too_and_gets_its_session() -> None:
    inner = "import os, sys; print(os.getppid(), os.getpgid(0), 'tests.warm' in sys.modules)"
    code = f"import os, subprocess, sys; print(os.getpid(), os.getpid(), True, flush=True); {{}}; {inner!r}"
    code = code.format(f"subprocess.run([sys.executable, '-c', {inner!r}], check=True)")
    with replace_popen():
        done = subprocess.run(
            [sys.executable, "-c", code], start_new_session=True, capture_output=True, text=True, check=True
        )
    outer, started = done.stdout.splitlines()
    assert outer == started, done.stdout


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.02)


def test_signals_reach_it_and_those_it_has_started(tmp_path: Path) -> None:
    """The launcher and the training process of a run, killed each in its way."""
    sleep = "import sys, time; print('here', flush=True); time.sleep(60)"
    launcher = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {sleep!r}, 'settings.json']))"

    def inner(pid: int) -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline", "ppid"]) if p.info["ppid"] == pid and "-c" in p.cmdline()]

    with replace_popen():
        for way in ("group", "inner", "outer"):
            child = Child([sys.executable, "-c", launcher], tmp_path / f"{way}.txt")
            wait_for(lambda: "here" in child.tail())  # noqa: B023 - called before the loop goes on
            (started,) = inner(child.pid)
            assert [word for word in started.cmdline() if word] == [sys.executable, "-c", sleep, "settings.json"]
            if way == "group":
                child.kill()
            elif way == "inner":
                started.kill()
            else:
                psutil.Process(child.pid).send_signal(signal.SIGINT)
            wait_for(lambda: child.poll() is not None)  # noqa: B023
            result = child.poll()
            assert result is not None
            # Python gives a child's end by a signal the exit status -9, which the system cuts to eight bits
            assert result.exit_code == {"group": -9, "inner": 256 - 9, "outer": -2}[way]
            if way == "group":
                wait_for(lambda: not started.is_running() or started.status() == psutil.STATUS_ZOMBIE)  # noqa: B023
            with contextlib.suppress(psutil.NoSuchProcess):
                started.kill()


def test_it_ends_with_its_parent_and_its_times_are_known(tmp_path: Path) -> None:
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    with replace_popen():
        child = Child([sys.executable, "-c", busy], tmp_path / "busy.txt")
        while (result := child.poll()) is None:
            time.sleep(0.01)
        assert result.exit_code == 0 and result.cpu_seconds is not None and 0.4 < result.cpu_seconds < 30
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        code = "import subprocess, sys, time\nfrom dpsm_hf.runtime.child_process import end_with_parent\n"
        code += f"print(subprocess.Popen({sleep!r}, preexec_fn=end_with_parent).pid, flush=True); time.sleep(60)"
        assert end_with_parent.__module__ in code
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            started = psutil.Process(int(parent.stdout.readline()))
            assert started.ppid() == parent.pid
            parent.kill()
            wait_for(lambda: not started.is_running() or started.status() == psutil.STATUS_ZOMBIE)


def test_what_cannot_be_changed_after_the_start_is_spawned(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases: list[tuple[list[str], dict[str, str]]] = [
        (["-W", "ignore", "-c", IS_FORKED], {}), (["-I", "-c", IS_FORKED], {}),
        (["-c", IS_FORKED], {"HF_HUB_OFFLINE": "0"}), (["-c", IS_FORKED], {"PYTHONHASHSEED": "3"}),
        (["-c", IS_FORKED], {"MALLOC_TRIM_THRESHOLD_": "65536"}), (["-c", IS_FORKED], {"TRITON_INTERPRET": "1"}),
    ]  # fmt: skip
    with replace_popen():
        for words, variables in cases:
            environment = {**os.environ, **variables}
            done = subprocess.run(
                [sys.executable, *words], env=environment, capture_output=True, text=True, check=True
            )
            assert done.stdout == "False\n", (words, variables)
        assert subprocess.run(["echo", "another program"], capture_output=True, check=True).stdout
    assert subprocess.Popen is warm._SPAWN, "after the context everything is spawned"
