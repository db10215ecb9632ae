"""The longest common subsequence of two sequences of token ids: what ROUGE-L counts."""

from __future__ import annotations

from collections.abc import Sequence


def on_common_subsequence(sequence: Sequence[int], other: Sequence[int]) -> list[bool]:
    """Return which places of a sequence lie on one longest common subsequence with another.

    Of all longest ones it is the one whose places in ``sequence`` come first, compared from the left. ROUGE-L's F1 is
    ``2 * sum(result) / (len(sequence) + len(other))``.

    A row of the table of lengths is kept as one integer, a bit for each place of ``other``, 0 where the length rises
    there; a row follows from the next in four operations on integers.

    Args:
        sequence: ``[m]`` ids.
        other: ``[n]`` ids.

    Source: Hyyrö, "Bit-Parallel LCS-length Computation Revisited" (2004), section 4.
    """
    places: dict[int, int] = {}  # bit 0 is the last place: rows are of suffixes, so that the walk starts at the left
    for bit, token in enumerate(reversed(other)):
        places[token] = places.get(token, 0) | 1 << bit
    every = (1 << len(other)) - 1
    rows = [every]
    for token in reversed(sequence):
        row = rows[-1]
        hit = row & places.get(token, 0)
        rows.append(((row + hit) | (row - hit)) & every)
    rows.reverse()

    missing = len(other) - rows[0].bit_count()
    left = len(other)  # places of the other sequence behind the last match
    found = [False] * len(sequence)
    for i, token in enumerate(sequence):
        hit = places.get(token, 0) & ((1 << left) - 1)
        if not missing or not hit:
            continue
        behind = hit.bit_length() - 1  # the earliest of the matches leaves the most
        if behind - (rows[i + 1] & ((1 << behind) - 1)).bit_count() == missing - 1:
            found[i] = True
            left, missing = behind, missing - 1
    return found
