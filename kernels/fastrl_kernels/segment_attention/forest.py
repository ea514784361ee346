"""The segments of a packed row on the host: Python numbers for loops over segments."""

from typing import NamedTuple


class Forest(NamedTuple):
    """M segments in depth-first preorder, a number for each."""

    lengths: list[int]
    parents: list[int]
    starts: list[int]
    depths: list[int]
    """Tokens on the path before the segment."""

    @property
    def ends(self) -> list[int]:
        """Tokens on the path to the end of the segment."""
        return [depth + length for depth, length in zip(self.depths, self.lengths, strict=True)]

    def levels(self) -> list[list[int]]:
        """The roots, their children, the children of these, and so on."""
        levels: list[list[int]] = []
        number: list[int] = []
        for segment, parent in enumerate(self.parents):
            number.append(0 if parent < 0 else number[parent] + 1)
            if number[segment] == len(levels):
                levels.append([])
            levels[number[segment]].append(segment)
        return levels


def forest_of(lengths: list[int], parents: list[int]) -> Forest:
    """The forest of these segments."""
    starts: list[int] = []
    depths: list[int] = []
    total = 0
    for length, parent in zip(lengths, parents, strict=True):
        starts.append(total)
        depths.append(0 if parent < 0 else depths[parent] + lengths[parent])
        total += length
    return Forest(lengths, parents, starts, depths)
