"""Children, orphans and the lock of a campaign's folder, with real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dpsm_hf.campaign.runner.lock import (
    LOCK_NAME,
    RunnerError,
    campaign_lock,
    end_orphans,
    interrupt_run,
    kill_run,
    processes_of,
    ranks_of,
    runner_at_work,
)
from dpsm_hf.runtime.child_process import RUNNER_VARIABLE, Child, end_with_runner, tail_of

ROOT = Path(__file__).resolve().parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children with their parent on Linux alone")


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---- children -------------------------------------------------------------------------------------------------------


def test_a_child_is_measured_and_its_output_kept(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("an earlier attempt\n")
    code = "x = bytearray(64 * 2**20); print('10%\\r20%\\r30%'); print(); print('done'); raise SystemExit(3)"
    child = Child([sys.executable, "-c", code], log, {"COLOUR": "blue"})
    wait_for(lambda: child.poll() is not None)
    result = child.poll()
    assert result is not None
    assert (result.exit_code, result.tail) == (3, ("30%", "done"))
    assert 0 < result.seconds < 20
    assert tail_of(log) == ("an earlier attempt", "30%", "done")
    child.kill()  # nothing to kill any more


def test_measures_of_a_child(tmp_path: Path) -> None:
    # the work is done by a grandchild, as under a launcher
    code = "import time\nx = bytearray(64 * 2**20)\nwhile time.process_time() < 0.2: pass"
    child = Child(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"],
        tmp_path / "log.txt",
    )
    result = None
    while result is None:
        result = child.poll()
        time.sleep(0.01)
    assert result.exit_code == 0
    assert result.cpu_seconds is not None and 0.2 <= result.cpu_seconds < 10
    # what this process has is counted, between fork and exec
    own = psutil.Process().memory_info().rss / 2**20
    assert result.peak_memory_mb is not None and 64 < result.peak_memory_mb < max(own, 64) + 100


def test_what_a_killed_launcher_used_is_unknown(tmp_path: Path) -> None:
    """It has not waited for the process that did the work, so its own figures would pass for those of the run."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    child = Child([sys.executable, "-c", code], tmp_path / "log.txt")
    time.sleep(0.5)
    os.kill(child.pid, signal.SIGTERM)  # by somebody else
    while (result := child.poll()) is None:
        time.sleep(0.01)
    child.kill()  # what it has left behind
    assert result is not None and result.exit_code < 0
    assert result.cpu_seconds is None and result.peak_memory_mb is None


@linux
def test_a_child_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\nfrom dpsm_hf.runtime.child_process import Child\n"
        "child = Child([sys.executable, '-c', 'import time; time.sleep(60)'], pathlib.Path(sys.argv[1]) / 'log')\n"
        "print(child.pid, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
        parent.wait()
        wait_for(lambda: not alive(pid), 5)


@linux
def test_a_run_ends_when_its_runner_had_ended_before(monkeypatch: pytest.MonkeyPatch) -> None:
    end_with_runner()  # nothing was started by a runner
    ended = subprocess.Popen(["true"])
    ended.wait()
    code = "from dpsm_hf.runtime.child_process import end_with_runner; end_with_runner(); print('still here')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, RUNNER_VARIABLE: str(ended.pid)}, capture_output=True,
        text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "still here" not in done.stdout and "has ended" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, RUNNER_VARIABLE: str(os.getpid())}, capture_output=True,
        text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.stdout == "still here\n"


# ---- orphans --------------------------------------------------------------------------------------------------------

# Stands for a training process: says that it is ready, saves on the first interrupt, sleeps.
_RANK = (
    "import pathlib, signal, sys, time\n"
    "def save(number, frame):\n    pathlib.Path(sys.argv[2]).write_text('saved'); time.sleep({delay}); sys.exit(130)\n"
    "signal.signal(signal.SIGINT, save)\npathlib.Path(sys.argv[2]).write_text('ready')\ntime.sleep(60)"
)


def orphan(settings: Path, flag: Path, delay: float = 0) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", _RANK.format(delay=delay), str(settings), str(flag)])
    wait_for(lambda: flag.exists() and flag.read_text() == "ready")
    return process


def test_orphans_may_save_and_are_then_gone(tmp_path: Path) -> None:
    settings = tmp_path / "runs" / "a" / "settings.json"
    other = orphan(tmp_path / "runs" / "b" / "settings.json", tmp_path / "other")
    left = orphan(settings, tmp_path / "flag")
    try:
        assert [p.pid for p in processes_of(settings)] == [left.pid] == [p.pid for p in ranks_of(settings)]
        assert end_orphans(settings, patience=10) == 1
        assert (tmp_path / "flag").read_text() == "saved"
        assert left.wait(5) == 130
        assert other.poll() is None  # another run's are left alone
        assert end_orphans(settings) == 0
    finally:
        for process in (left, other):
            process.kill()
            process.wait()


def test_an_orphan_that_does_not_end_is_killed(tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    left = orphan(settings, tmp_path / "flag", delay=60)
    try:
        end_orphans(settings, patience=0.5)
        assert left.wait(5) == -signal.SIGKILL
    finally:
        left.kill()
        left.wait()


def test_each_process_is_told_once(tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    left = orphan(settings, tmp_path / "flag", delay=60)
    try:
        told = interrupt_run(settings)
        assert told == {left.pid}
        wait_for(lambda: (tmp_path / "flag").read_text() == "saved")
        (tmp_path / "flag").write_text("not again")
        assert interrupt_run(settings, told) == told
        time.sleep(0.3)
        assert (tmp_path / "flag").read_text() == "not again"
        kill_run(settings)
        assert left.wait(5) == -signal.SIGKILL
    finally:
        left.kill()
        left.wait()


def test_the_launcher_is_no_training_process(tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    sleep = "import sys, time; time.sleep(60)"
    start = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[3], sys.argv[2], 'rank']).wait()"
    launcher = subprocess.Popen(
        [sys.executable, "-c", start, "accelerate.commands.launch", str(settings), sleep], start_new_session=True
    )
    try:
        wait_for(lambda: len(processes_of(settings)) == 2)
        (rank,) = ranks_of(settings)
        assert rank.pid != launcher.pid and rank.ppid() == launcher.pid
    finally:
        kill_run(settings)
        launcher.wait(5)
    assert processes_of(settings) == []


# ---- the lock -------------------------------------------------------------------------------------------------------

_HOLD = (
    "import pathlib, sys, time\nfrom dpsm_hf.campaign.runner.lock import campaign_lock\n"
    "with campaign_lock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
)


def test_the_lock_without_fcntl(tmp_path: Path) -> None:
    """Elsewhere than on Unix there is no fcntl; a killed runner leaves no lock behind there either."""
    without = f"import sys; sys.modules['fcntl'] = None\n{_HOLD}"
    command = [sys.executable, "-W", "ignore", "-c", without, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        refused = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert f"RunnerError: A runner (process {holder.pid} " in refused.stderr and "already" in refused.stderr
        holder.kill()
        holder.wait()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as next_one:
        assert next_one.stdout is not None and next_one.stdout.readline() == "held\n"
        next_one.kill()


# What Windows lacks of these modules, and a campaign of one run of a script that needs no torch.
_ELSEWHERE = """
import sys; sys.modules["fcntl"] = None
import os, signal
for name in ("wait4", "killpg", "sched_getaffinity"): delattr(os, name)
signal.Signals = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM")]
for name in ("SIGHUP", "SIGQUIT"): delattr(signal, name)
import pathlib
from dpsm_hf.campaign.runner import launching, running
from tests.campaign.campaigns import make_campaign
from dpsm_hf.runtime.child_process import Child
folder = pathlib.Path(sys.argv[1])
(folder / "fake.py").write_text("raise ValueError('made up')")
launching.PROGRAM = (str(folder / "fake.py"),)
assert running.run_campaign(make_campaign({}, ("ce",)), folder / "out", devices=()) == 1
child = Child([sys.executable, "-c", "import time; time.sleep(60)"], folder / "log")
assert child.poll() is None
child.kill()
while child.poll() is None: pass
"""


def test_a_campaign_where_the_system_is_not_linux(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", _ELSEWHERE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert done.returncode == 0 and "exit code 1: ValueError: made up" in done.stderr, done.stderr


def test_one_runner_at_a_time_and_none_after_a_kill(tmp_path: Path) -> None:
    assert runner_at_work(tmp_path) is None
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert f"process {holder.pid} " in str(runner_at_work(tmp_path))
        with pytest.raises(RunnerError, match=f"process {holder.pid} .* already"), campaign_lock(tmp_path):
            pass
        holder.kill()
        holder.wait()
    assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == holder.pid
    assert runner_at_work(tmp_path) is None  # its name is still there, but it is not
    with campaign_lock(tmp_path):
        assert f"process {os.getpid()} " in str(runner_at_work(tmp_path))
    assert runner_at_work(tmp_path) is None


def test_a_living_runner_that_holds_another_lock_is_not_disturbed(tmp_path: Path) -> None:
    """A runner of an earlier version locks another file, but says who it is in the same one."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        started = psutil.Process(other.pid).create_time()
        name = json.dumps({"pid": other.pid, "started": started, "host": socket.gethostname()})
        (tmp_path / LOCK_NAME).write_text(name)
        try:
            with pytest.raises(RunnerError, match=f"process {other.pid} .* already"), campaign_lock(tmp_path):
                pass
            assert (tmp_path / LOCK_NAME).read_text() == name
        finally:
            other.kill()
            other.wait()
    with campaign_lock(tmp_path):
        pass


def test_a_runner_on_another_machine(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text('{"pid": 1, "started": 0, "host": "elsewhere"}')
    with pytest.raises(RunnerError, match="elsewhere.*delete"), campaign_lock(tmp_path):
        pass
    (tmp_path / LOCK_NAME).write_text('{"pid": 1, "sta')  # half a name is no name
    with campaign_lock(tmp_path):
        pass
