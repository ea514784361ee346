"""What a recurrence is to the functions of this folder.

B sequences of T tokens.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Rule(Protocol):
    """One step after another from a state, for B sequences at once.

    Rows of zeros in every input must leave the state as it is, since sequences are padded with
    them.
    """

    def __call__(self, inputs: Sequence[Tensor], state: Tensor | None, /) -> tuple[Tensor, Tensor]:
        """inputs: (B, T, ...) each; state: (B, ...), None for the one at a root. Returns the (B, T,
        ...) outputs and the (B, ...) states after them."""
        ...
