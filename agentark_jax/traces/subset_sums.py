"""Which totals can be reached by choosing among some lengths, and by which choice."""

from collections.abc import Iterator, Sequence


class SubsetSums:
    """The totals, up to `limit`, of subsets of `lengths` (positive integers); early lengths are used before late ones.

    Bit n of a bitset (a Python integer) stands for the total n: adding a length is one shift, so thousands of lengths
    take milliseconds.
    """

    def __init__(self, lengths: Sequence[int], limit: int):
        self.limit = limit
        self._lengths = lengths
        self._reachable = [1]
        for length in lengths:
            before = self._reachable[-1]
            self._reachable.append((before | before << length) & ((2 << limit) - 1))

    def between(self, low: int, high: int) -> Iterator[int]:
        """The reachable totals in [low, high], ascending."""
        low = max(low, 0)
        if high < low:
            return
        bits = self._reachable[-1] >> low & ((2 << (high - low)) - 1)
        while bits:
            yield low + (bits & -bits).bit_length() - 1
            bits &= bits - 1

    def members(self, total: int) -> list[int]:
        """Indices of lengths that add up to a reachable total, ascending."""
        chosen = []
        for index in reversed(range(len(self._lengths))):
            if not self._reachable[index] >> total & 1:
                chosen.append(index)
                total -= self._lengths[index]
        return chosen[::-1]
