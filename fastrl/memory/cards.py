"""How much memory a card gives a process: by the card's name, or as a size.

A driver keeps a part of a card for itself, and so does ECC where it is in the same memory. What is
left is what PyTorch calls the total capacity of a GPU when it runs out of memory; `usable` is the
lowest that users of the card have posted with such an error in issues on GitHub, or, where none was
found, a share of the nominal size that is below all of those.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import NamedTuple

from fastrl.errors import InputError
from fastrl.memory.plan import GIB

LEFT = 0.955
"""Of a card that nobody was found to post: 0.965 (RTX 4060) is the least of those without ECC."""
LEFT_BY_ECC = 0.915
"""Of GDDR6 with ECC, which takes a sixteenth: 0.925 (L40) is what was found."""
UNITS = {"GiB": GIB, "G": GIB, "GB": 10**9, "MiB": 2**20, "M": 2**20, "MB": 10**6}
"""A card that is sold as 24 GB has 24 GiB, less what its driver keeps; 24GB here is 24e9 bytes."""


class Card(NamedTuple):
    """GiB."""

    nominal: float
    usable: float

    @property
    def num_bytes(self) -> int:
        """That a process can have."""
        return int(self.usable * GIB)


def _plain(nominal: float, usable: float | None = None) -> Card:
    return Card(nominal, LEFT * nominal if usable is None else usable)


def _with_ecc(nominal: float, usable: float | None = None) -> Card:
    return Card(nominal, LEFT_BY_ECC * nominal if usable is None else usable)


CARDS = {
    "rtx2060": _plain(6, 5.79), "rtx2070": _plain(8), "rtx2080": _plain(8),
    "rtx2080ti": _plain(11),
    "rtx3050": _plain(8), "rtx3060": _plain(12, 11.75), "rtx3060ti": _plain(8),
    "rtx3070": _plain(8, 7.78), "rtx3070ti": _plain(8), "rtx3080-10": _plain(10),
    "rtx3080-12": _plain(12), "rtx3080ti": _plain(12), "rtx3090": _plain(24),
    "rtx3090ti": _plain(24),
    "rtx4050": _plain(6), "rtx4060": _plain(8, 7.72), "rtx4060ti-8": _plain(8),
    "rtx4060ti-16": _plain(16, 15.55), "rtx4070": _plain(12), "rtx4070super": _plain(12),
    "rtx4070ti": _plain(12), "rtx4070tisuper": _plain(16), "rtx4080": _plain(16),
    "rtx4080super": _plain(16), "rtx4090": _plain(24, 23.52),
    "rtx5050": _plain(8), "rtx5060": _plain(8), "rtx5060ti-8": _plain(8),
    "rtx5060ti-16": _plain(16), "rtx5070": _plain(12), "rtx5070ti": _plain(16),
    "rtx5080": _plain(16), "rtx5090": _plain(32, 31.33),
    "rtxa2000-6": _plain(6), "rtxa2000-12": _plain(12), "rtxa4000": _plain(16),
    "rtxa4500": _plain(20), "rtxa5000": _plain(24), "rtxa5500": _plain(24),
    "rtxa6000": _plain(48), "rtx6000ada": _with_ecc(48, 44.43), "rtxpro6000": _plain(96),
    "t4": _with_ecc(16, 14.74), "p100": _plain(16), "v100-16": _plain(16),
    "v100-32": _plain(32, 31.74), "a2": _with_ecc(16), "a10": _with_ecc(24), "a10g": _with_ecc(24),
    "a16": _with_ecc(16), "a30": _plain(24), "a40": _with_ecc(48), "a100-40": _plain(40, 39.50),
    "a100-80": _plain(80, 79.25), "l4": _with_ecc(24), "l40": _with_ecc(48, 44.40),
    "l40s": _with_ecc(48, 44.40), "h100": _plain(80, 79.11), "h100nvl": _plain(94, 93.00),
    "h200": _plain(141), "b200": _plain(180, 178.35),
}  # fmt: skip


def memory_of(text: str, name: str = "memory_limit") -> int:
    """Bytes of a card, such as rtx4090, or of a size, such as 24GiB, 22.5G, 24GB or 8192MiB.

    name: of the option, for the message of the InputError where it is neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]+)", text.strip())
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if found is not None and found[2].lower() in units:
        num_bytes = int(float(found[1]) * units[found[2].lower()])
        if num_bytes <= 0:
            raise InputError(f"{name} must be more than nothing, got {text!r}")
        return num_bytes
    return card_of(text, name).num_bytes


def card_of(text: str, name: str) -> Card:
    """The card of that name; blanks, dashes, case, "NVIDIA" and "GeForce" do not matter."""
    key = _key(text)
    by_key = {_key(card): card for card in CARDS}
    for wanted in (key, f"rtx{key}"):
        if wanted in by_key:
            return CARDS[by_key[wanted]]
        sizes = [card for card in CARDS if "-" in card and _key(card.split("-")[0]) == wanted]
        if sizes:
            raise InputError(f"{name} {text!r} comes in several sizes; give {' or '.join(sizes)}")
    close = get_close_matches(key, list(CARDS), n=3, cutoff=0.5)
    hint = f"the nearest are {', '.join(close)}" if close else "no known name is close"
    raise InputError(
        f"{name} must be a card, such as rtx4090, or a size, such as 24GiB, got {text!r}; {hint}"
    )


def limit_of(gpu: str | None, memory_limit: str | None) -> int | None:
    """Bytes of the smaller one of a card and a limit; None where neither is given."""
    card = None if gpu is None else memory_of(gpu, "--gpu")
    if memory_limit is None:
        return card
    limit = memory_of(memory_limit)
    if card is not None and limit > card:
        raise InputError(
            f"memory_limit {memory_limit} is {limit / GIB:.4g} GiB, more than the "
            f"{card / GIB:.4g} GiB that {gpu} has for a process; lower it"
        )
    return limit


def _key(text: str) -> str:
    key = re.sub(r"[\s_-]+", "", text.lower())
    return re.sub(r"nvidia|geforce|tesla|gb$", "", key)
