"""Rewards of reference completions on disk: files that only grow, whole batches or nothing.

A directory holds `about.json`, what the rewards depend on, and shards `rewards-0001.jsonl`, one for
each process that ever added to it, with a line for each batch of prompts.

Legend: P prompts, N samples of a prompt.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from fastrl.errors import InputError
from fastrl.whole_directory import sync

ABOUT = "about.json"
SHARDS = "rewards-*.jsonl"


class ValueStore:
    """The rewards of N samples by the key of their prompt; knows what all processes have added."""

    def __init__(self, directory: Path, num_samples: int, about: Mapping[str, Any]) -> None:
        """about: what is written beside the rewards, for people."""
        self.directory = directory
        self.num_samples = num_samples
        self.about = about
        self.rewards: dict[str, tuple[float, ...]] = {}
        self.num_torn = 0
        """Batches that a killed process left half-written; they are sampled again."""
        self._shard: TextIO | None = None
        for shard in sorted(directory.glob(SHARDS)):
            self._read(shard)

    def __contains__(self, key: str) -> bool:
        return key in self.rewards

    def add(self, keys: Sequence[str], rewards: Tensor) -> None:
        """Keep rewards (P, N) of P prompts: on disk when this returns."""
        assert rewards.shape == (len(keys), self.num_samples), "N rewards of each prompt"
        rows = rewards.tolist()
        if self._shard is None:
            self._shard = self._new_shard()
        self._shard.write(json.dumps({"prompts": list(keys), "rewards": rows}) + "\n")
        self._shard.flush()
        os.fsync(self._shard.fileno())
        for key, row in zip(keys, rows, strict=True):
            self.rewards.setdefault(key, tuple(row))

    def close(self) -> None:
        """Nothing more is added."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def _new_shard(self) -> TextIO:
        """A file of this process alone, behind those that are there."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            about = self.directory / f".{ABOUT}-{os.getpid()}"
            about.write_text(json.dumps(self.about, indent=2) + "\n", encoding="utf-8")
            about.rename(self.directory / ABOUT)
            number = len(list(self.directory.glob(SHARDS))) + 1
            while True:
                try:
                    shard = (self.directory / f"rewards-{number:04d}.jsonl").open("x")
                    break
                except FileExistsError:  # another process was faster
                    number += 1
        except OSError as error:
            raise InputError(
                f"cannot write values of prompts to {self.directory}: {error.strerror}; choose "
                "another values_dir"
            ) from error
        sync(self.directory)
        return shard

    def _read(self, shard: Path) -> None:
        *lines, rest = shard.read_bytes().split(b"\n")
        if rest:  # the end of a line was never written
            self.num_torn += 1
        for number, line in enumerate(lines, start=1):
            found = self._record(line)
            if found is not None:
                for key, row in found.items():
                    self.rewards.setdefault(key, row)
            elif number == len(lines) and not rest:  # a length without its bytes, after a power cut
                self.num_torn += 1
            else:
                raise InputError(
                    f"{shard}:{number} is no batch of {self.num_samples} rewards a prompt; remove "
                    "the file, and what it held is sampled again"
                )

    def _record(self, line: bytes) -> dict[str, tuple[float, ...]] | None:
        """Rewards by prompt; None for what `add` did not write."""
        try:
            record = json.loads(line)
            prompts, rows = record["prompts"], record["rewards"]
            found = {key: tuple(row) for key, row in zip(prompts, rows, strict=True)}
        except (ValueError, TypeError, KeyError):
            return None
        whole = all(
            isinstance(key, str)
            and len(row) == self.num_samples
            and all(isinstance(reward, float) and math.isfinite(reward) for reward in row)
            for key, row in found.items()
        )
        return found if whole else None
