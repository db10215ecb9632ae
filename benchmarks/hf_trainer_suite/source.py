"""Get Transformers' tests: clone them with the user's git, or use an existing checkout."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import transformers

URL = "https://github.com/huggingface/transformers"
TESTS = Path("tests") / "trainer"
_CHECKED_OUT = ("tests/trainer", "tests/fixtures")


def tag() -> str:
    """Return the tag of the installed version in Transformers' repository."""
    return f"v{transformers.__version__}"


def downloaded(cache: Path) -> Path:
    """Return a checkout of Transformers' tests at the installed version, cloned on first use.

    Raises:
        RuntimeError: with git's message, if it could not clone.
    """
    folder = cache / tag()
    if (folder / TESTS).is_dir():
        return folder
    part = folder.with_name(f"{folder.name}.part")  # renamed when complete: an interrupted clone must not be used
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    _git("clone", "--depth", "1", "--branch", tag(), "--filter=blob:none", "--sparse", URL, str(part))
    _git("-C", str(part), "sparse-checkout", "set", *_CHECKED_OUT)
    part.rename(folder)
    return folder


def checked(folder: Path) -> Path:
    """Return the folder that the user gave, if it is a checkout of Transformers with its tests.

    Raises:
        FileNotFoundError: if it is not.
    """
    if not (folder / TESTS).is_dir():
        raise FileNotFoundError(
            f"--source {folder} has no {TESTS.as_posix()}: name the folder that `git clone {URL}` made."
        )
    return folder.resolve()


def described(folder: Path) -> str:
    """Return the commit of a checkout in words, or that the folder is without git."""
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return "a folder without git"
    lines = found.stdout.split()
    if found.returncode or len(lines) != 2 or Path(lines[0]).resolve() != folder.resolve():
        return "a folder without git"
    return f"commit {lines[1][:12]}"


def _git(*arguments: str) -> None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(
            "git is not installed; install it, or name a checkout of Transformers with --source."
        ) from None
    if done.returncode:
        raise RuntimeError(
            f"`git {' '.join(arguments)}` failed: {done.stderr.strip()}\n"
            f"Without access to GitHub, name a checkout of {URL} at {tag()} with --source FOLDER."
        )
