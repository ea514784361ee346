"""How much memory keys and values may take, and who starts, waits or starts again for it.

Legend: P prompts, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastrl.errors import InputError
from fastrl.policy import Policy
from fastrl.rollout.cohort import FIRST_COLUMNS
from fastrl.rollout.decoder import Decoder
from fastrl.rollout.requests import Request

GIB = 2**30
USABLE = 0.85
"""Of a GPU's memory; the rest is for activations, logits and libraries."""
MOMENT_BYTES = 8
"""Of a trained parameter: two moments in float32, which the first update allocates."""


class Room:
    """A budget of tokens, and how long completions are expected to become.

    Memory is given out as completions grow, so more of them start than would fit if all became as
    long as they may. Where they do, the youngest stop and start again from what they have drawn.
    """

    def __init__(
        self, num_tokens: int | None, max_new_tokens: int, *, bytes_per_token: int = 0
    ) -> None:
        """num_tokens: whose keys and values there is memory for; None for no limit."""
        self.num_tokens = num_tokens
        self.max_new_tokens = max_new_tokens
        self.bytes_per_token = bytes_per_token
        self.expected = min(max_new_tokens, max(FIRST_COLUMNS, max_new_tokens // 2))

    def fitted(self, requests: Sequence[Request], num_generations: int) -> list[Request]:
        """The requests in parts that there is room for at their longest, each of a group at least.

        Raises InputError where one group alone finds no room.
        """
        if self.num_tokens is None:
            return list(requests)
        found = []
        for request in requests:
            num_rows = min(len(request.rows), num_generations)
            needed = request.length + num_rows * self.max_new_tokens
            if needed > self.num_tokens:
                raise InputError(
                    "kv_cache_gib must hold one prompt with its completions, at least "
                    f"{needed * self.bytes_per_token / GIB:.4g} GiB, but there is room for "
                    f"{self.num_tokens} tokens instead of {needed}; raise it, or lower "
                    "num_generations or max_completion_length"
                )
            most = (self.num_tokens - request.length) // self.max_new_tokens
            for start in range(0, len(request.rows), most):
                found.append(request._replace(rows=request.rows[start : start + most]))
        return found

    def admitted(self, requests: Sequence[Request], decoder: Decoder) -> int:
        """How many of the waiting requests, from the first, start now as one cohort."""
        if not requests:
            return 0
        num = decoder.admissible(requests)
        if self.num_tokens is None:
            return num
        used = decoder.num_tokens_at(self.expected)
        while num and used + self._needed(requests[:num]) > self.num_tokens:
            num -= 1
        return num

    def _needed(self, requests: Sequence[Request]) -> int:
        num_rows = sum(len(request.rows) for request in requests)
        return len(requests) * requests[0].length + num_rows * self.expected

    def is_short(self, decoder: Decoder) -> bool:
        """Whether the next step would need more than there is; completions are longer than thought.

        From then on they are expected to be as long as those that now grow, so that what stops does
        not start again at once.
        """
        if self.num_tokens is None or decoder.num_tokens + decoder.growth <= self.num_tokens:
            return False
        self.expected = min(self.max_new_tokens, max(self.expected, decoder.longest_next))
        return True


def tokens_in(gib: float | None, policy: Policy, of_token: int) -> int | None:
    """The budget in tokens; of a GPU what the config leaves over, None for no limit on a CPU."""
    if gib is not None:
        return int(gib * GIB / of_token)
    if policy.device.type != "cuda":
        return None
    # From sizes alone, not from what happens to be free: the same run batches in the same way.
    parameters = list(policy.model.parameters())
    weights = sum(parameter.nbytes for parameter in parameters)
    moments = MOMENT_BYTES * sum(p.numel() for p in parameters if p.requires_grad)
    total = torch.cuda.get_device_properties(policy.device).total_memory
    share = torch.cuda.get_per_process_memory_fraction(policy.device)  # below 1 under memory_limit
    return max(int((USABLE * share * total - weights - moments) / of_token), 0)
