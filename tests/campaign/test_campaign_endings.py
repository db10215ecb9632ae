"""How a training process ended: from exit codes and logs as launchers and libraries write them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpsm_hf.campaign.runner.attempts import classify, memory_kill_count, real_exit_code

TRACE = ["Traceback (most recent call last):", '  File "run_clm_dpsm.py", line 200, in <module>', "    main()"]
SIMPLE = "subprocess.CalledProcessError: Command '['python', 'run_clm_dpsm.py']' returned non-zero exit status {}."
DIED = "subprocess.CalledProcessError: Command '['python', 'run_clm_dpsm.py']' died with <Signals.{}: {}>."
ELASTIC = [
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
    "run_clm_dpsm.py FAILED",
    "  rank      : 0 (local_rank: 0)",
    "  exitcode  : {} (pid: 4242)",
]


def log(error: str, *launcher: str) -> list[str]:
    return ["epoch 0.1", *TRACE, error, *TRACE, *(launcher or [SIMPLE.format(1)])]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB.", "oom"),
        ("[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB.", "oom"),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory", "oom"),
        ("MemoryError", "oom"),
        ("FloatingPointError: the training loss is nan at optimizer step 3, micro-batch 1.", "diverged"),
        ("OSError: [Errno 28] No space left on device", "failed"),
        ("safetensors_rust.SafetensorError: Error while serializing: No space left on device (os error 28)", "failed"),
        ("ValueError: --block_size 0 must be at least 1.", "failed"),
        ("KeyError: 'out of cheese'", "failed"),
    ],
)
def test_errors_of_the_training_script(error: str, status: str) -> None:
    ending = classify(1, log(error))
    assert ending.status == status
    assert error.partition(": ")[2] in ending.message  # and not what the launcher says of it
    assert ending.disk_full == ("No space left" in error)


def test_what_stands_above_the_launchers_own_error_is_the_cause() -> None:
    lines = log("RuntimeError: CUDA error: out of memory", *(line.format(1) for line in ELASTIC))
    assert classify(1, lines).status == "oom"
    assert "ValueError: wrong" in classify(1, log("ValueError: wrong", *(line.format(1) for line in ELASTIC))).message


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([SIMPLE.format(130)], 130),
        ([DIED.format("SIGKILL", 9)], -9),
        ([line.format(-9) for line in ELASTIC], -9),
        ([line.format(3) for line in ELASTIC], 3),
        (["it wrote nothing of use"], 1),
    ],
)
def test_exit_code_of_the_training_process(lines: list[str], code: int) -> None:
    assert real_exit_code(1, lines) == code
    assert real_exit_code(-15, lines) == -15  # the launcher itself was hit


def test_a_killed_process() -> None:
    lines = [DIED.format("SIGKILL", 9)]
    by_kernel = classify(1, lines, memory_kills=1)
    assert by_kernel.status == "oom" and "by the kernel" in by_kernel.message
    by_somebody = classify(1, lines, memory_kills=0)
    assert by_somebody.status == "interrupted" and "by somebody" in by_somebody.message
    unknown = classify(-9, [], memory_kills=None)
    assert unknown.status == "interrupted" and "or by the kernel" in unknown.message
    assert classify(1, [DIED.format("SIGTERM", 15)]).status == "interrupted"
    assert classify(1, [DIED.format("SIGSEGV", 11)]).status == "failed"  # a crash, which nobody asked for


def test_an_interrupt_of_the_runner_is_no_failure() -> None:
    assert classify(1, [*TRACE, "KeyboardInterrupt", DIED.format("SIGINT", 2)], asked=True).status == "interrupted"
    assert classify(1, [SIMPLE.format(130)], asked=True).status == "interrupted"
    assert classify(1, [*TRACE, "KeyboardInterrupt"], asked=True).status == "interrupted"
    # but what went wrong while it saved its checkpoint is
    assert classify(1, log("OSError: [Errno 28] No space left on device"), asked=True).disk_full
    assert classify(0, ["done"], asked=True).status == "ok"


def test_a_full_disk_without_a_word() -> None:
    torn = "RuntimeError: [enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"
    assert classify(1, log(torn), free_bytes=0).disk_full
    assert classify(1, [], free_bytes=4096).disk_full  # the log had no room either
    assert not classify(1, log(torn), free_bytes=10**9).disk_full
    assert not classify(-9, [], free_bytes=0).disk_full


def test_every_ending_says_why() -> None:
    for code in (1, 2, 130, -signal.SIGTERM, -signal.SIGSEGV):
        assert classify(code, []).message
    assert classify(0, []).message == ""


def test_memory_kills_are_counted_for_the_own_group_first(tmp_path: Path) -> None:
    assert memory_kill_count(tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/vmstat").write_text("pgfault 7\noom_kill 5\n")
    assert memory_kill_count(tmp_path) == 5
    (tmp_path / "proc/self/cgroup").write_text("0::/jobs/a\n")
    (tmp_path / "sys/fs/cgroup/jobs/a").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/jobs/a/memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert memory_kill_count(tmp_path) == 2


def test_a_real_full_device() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    done = subprocess.run(
        [sys.executable, "-c", "with open('/dev/full', 'w') as file: file.write('x')"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert classify(done.returncode, done.stderr.splitlines()).disk_full
