"""A short run of the fuzz of settings and data files; `python -m benchmarks.fuzz` is the long one."""

from benchmarks.fuzz import fuzz_files, fuzz_settings


def test_settings_are_taken_as_they_are_meant_or_refused_by_name():
    tally = fuzz_settings(300)
    assert not tally.problems, "\n".join(tally.problems)
    assert tally.counts["nonsense refused"] > 50 and tally.counts["sound and taken"] > 50


def test_damaged_files_are_read_or_refused_by_name():
    tally = fuzz_files(40)
    assert not tally.problems, "\n".join(tally.problems)
    assert tally.counts["read"] > 5 and tally.counts["refused with a name"] > 5
