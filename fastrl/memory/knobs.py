"""The settings that change memory and time but not what is computed, and all ways to choose them.

Gradients of other passes, chunks and workspaces differ by rounding alone. A reference policy in 8
or 4 bits is rounded, and so is the KL to it: it is chosen last. What else rounds or changes the
mathematics is in `suggest`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fastrl.config import Config
from fastrl.errors import InputError
from fastrl.memory.cost import Cost, Pricer, cost_of
from fastrl.memory.plan import GIB
from fastrl.memory.work import ModelSizes, budgets, layer_dtype, method_of, work_of
from fastrl.methods.needs import needs_reference

WORKSPACES = (32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
CHUNKS = (512, 2048, 8192, 32768)
"""Of an MLP; a pass is cut into 4 to 16 of them, more would save little."""
ROUNDED = ("8bit", "4bit")
PATHS = {
    "max_tokens_per_pass": "max_tokens_per_pass",
    "workspace_mb": "workspace_mb",
    "checkpointing": "model.gradient_checkpointing",
    "offloading": "model.activation_offloading",
    "mlp_chunk_size": "model.mlp_chunk_size",
    "optimizer": "optim.optimizer",
    "in_backward": "optim.in_backward",
    "reference": "model.reference",
    "kv_cache_gib": "rollout.engine_args.kv_cache_gib",
}


class Settings(NamedTuple):
    """A value for each of them."""

    max_tokens_per_pass: int
    workspace_mb: float
    checkpointing: bool
    offloading: bool
    mlp_chunk_size: int
    optimizer: str
    in_backward: str
    reference: str
    kv_cache_gib: float | None

    def of(self, config: Config) -> Config:
        """The config with them."""
        engine_args = dict(config.rollout.engine_args)
        if self.kv_cache_gib is not None:
            engine_args["kv_cache_gib"] = self.kv_cache_gib
        else:
            engine_args.pop("kv_cache_gib", None)
        replaced: Any = dataclasses.replace
        return dataclasses.replace(
            config,
            max_tokens_per_pass=self.max_tokens_per_pass,
            workspace_mb=self.workspace_mb,
            model=replaced(
                config.model, gradient_checkpointing=self.checkpointing,
                activation_offloading=self.offloading, mlp_chunk_size=self.mlp_chunk_size,
                reference=self.reference,
            ),
            optim=replaced(
                config.optim, optimizer=self.optimizer, in_backward=self.in_backward
            ),
            rollout=dataclasses.replace(config.rollout, engine_args=engine_args),
        )  # fmt: skip


def settings_of(config: Config) -> Settings:
    """As they are."""
    model, optim = config.model, config.optim
    return Settings(
        config.max_tokens_per_pass, config.workspace_mb, model.gradient_checkpointing,
        model.activation_offloading, model.mlp_chunk_size, optim.optimizer, optim.in_backward,
        model.reference, config.rollout.engine_args.get("kv_cache_gib"),
    )  # fmt: skip


class Candidate(NamedTuple):
    """One way to choose them all."""

    settings: Settings
    cost: Cost
    num_tokens: int
    """Of the largest pass."""
    is_single: bool
    """Whether an optimizer step is one pass."""


class Knobs:
    """What there is to choose from for a config on a device.

    fixed: names of settings that stay as they are, such as those that a model does not have.
    """

    def __init__(
        self, config: Config, sizes: ModelSizes, device: str, *, fixed: frozenset[str] = frozenset()
    ) -> None:  # fmt: skip
        self.config, self.sizes, self.device, self.fixed = config, sizes, device, fixed
        self.own = settings_of(config)
        method = method_of(config)
        self.needs_reference = needs_reference(method)
        self.moves_reference = method.reference_update is not None

    def _choices(self, name: str, others: Sequence[Any]) -> list[Any]:
        """The present value first, then the others, unless the setting is fixed."""
        own = getattr(self.own, name)
        if name in self.fixed:
            return [own]
        return [own, *(other for other in others if other != own)]

    def workspaces(self) -> list[float]:
        """MiB of the head's loss."""
        return self._choices("workspace_mb", WORKSPACES)

    def modes(self) -> list[tuple[bool, bool]]:
        """Checkpointing and offloading."""
        own = (self.own.checkpointing, self.own.offloading)
        if "checkpointing" in self.fixed:
            return [own]
        others = [(False, False), (True, False)]
        if self.device == "cuda" and "offloading" not in self.fixed:
            others.append((True, True))
        return [own, *(other for other in others if other != own)]

    def chunks(self, budget: int) -> list[int]:
        """Tokens that an MLP looks at together, where a pass has so many."""
        return self._choices("mlp_chunk_size", (0, *[x for x in CHUNKS if 4 * x <= budget][-1:]))

    def optimizers(self) -> list[str]:
        """Moments in the memory of the CPU have the bits of those on a GPU."""
        same = ("adamw", "adamw_offload")
        if self.device != "cuda" or self.own.optimizer not in same:
            return [self.own.optimizer]
        return self._choices("optimizer", same)

    def in_backwards(self) -> list[str]:
        """two_phase has the bits of off; previous_norm clips otherwise."""
        exact = ("off", "two_phase")
        ours = self.own.optimizer in ("adamw", "adamw_8bit", "adamw_offload")
        if not ours or self.own.in_backward not in exact:
            return [self.own.in_backward]
        return self._choices("in_backward", exact)

    def references(self, *, rounded: Sequence[str] = ()) -> list[str]:
        """rounded: those that round which are allowed."""
        if not self.needs_reference or self.config.model.lora:
            return [self.own.reference]
        others = ["copy"] if self.own.reference != "auto" else []
        if self.device == "cuda":
            others.append("cpu")
        if not self.moves_reference:
            others.extend(rounded)
        return self._choices("reference", others)

    def caches(self) -> list[float | None]:
        """GiB of keys and values: for all completions at once, for parts of them, for a group."""
        if "kv_cache_gib" in self.fixed or self.config.rollout.engine != "native":
            return [self.own.kv_cache_gib]
        full, least = self.kv_bytes()
        parts = [full >> power for power in range(16) if full >> power > least]
        found: list[float | None] = [_rounded_up(size / GIB) for size in (*parts, least)]
        if self.own.kv_cache_gib is not None or self.device == "cpu":
            found.insert(0, self.own.kv_cache_gib)  # None on a CPU: as much as it takes
        return list(dict.fromkeys(found))

    def kv_bytes(self) -> tuple[int, int]:
        """Keys and values of a step's completions, and of the largest group, at their longest."""
        rollout, sizes = self.config.rollout, self.sizes
        of_token = 2 * sizes.num_layers * sizes.kv_width * layer_dtype(self.config).itemsize
        P, R, G = rollout.max_prompt_length, rollout.max_completion_length, rollout.num_generations
        largest = P + max(G, self.config.eval.num_samples) * R
        everything = self.config.prompts_per_step * (P + G * R)
        return max(everything, largest) * of_token, largest * of_token

    def kv_share(self, kv_cache_gib: float | None) -> float:
        """Of a step's keys and values, how much finds room at once."""
        if kv_cache_gib is None:
            return 1.0
        return min(1.0, kv_cache_gib * GIB / self.kv_bytes()[0])

    def budgets(self, config: Config) -> list[int]:
        """Tokens of a pass, with the modes of the config: from one completion to a whole step."""
        if "max_tokens_per_pass" in self.fixed:
            return [self.own.max_tokens_per_pass]
        least, most = budgets(config, self.sizes)
        found = {least, most}
        found |= {least << power for power in range(1, 40) if least << power < most}
        if self.own.max_tokens_per_pass >= least:
            found.add(self.own.max_tokens_per_pass)
        return sorted(found)

    def candidates(self, *, rounded: Sequence[str] = ()) -> list[Candidate]:
        """All of them, the fastest first; of equally fast ones those that change less."""
        found = list(self._candidates(rounded))
        found.sort(key=lambda x: (x.cost.total, _num_changes(self.own, x.settings)))
        return found

    def _candidates(self, rounded: Sequence[str]) -> Iterator[Candidate]:
        for checkpointing, offloading in self.modes():
            base = self.own._replace(checkpointing=checkpointing, offloading=offloading)
            for budget in self.budgets(base.of(self.config)):
                for chunk in self.chunks(budget):
                    settings = base._replace(mlp_chunk_size=chunk, max_tokens_per_pass=budget)
                    # Rows at the head count more where layers keep less.
                    if budget >= self.budgets(settings.of(self.config))[0]:
                        yield from self._with_passes(settings, rounded)

    def _with_passes(self, base: Settings, rounded: Sequence[str]) -> Iterator[Candidate]:
        """All that have the same passes, each part of their cost computed once."""
        work = work_of(base.of(self.config), self.sizes)
        largest, is_single = max(x.num_tokens for x in work.passes), len(work.passes) == 1

        def pricer(**changes: Any) -> Pricer:
            return Pricer(base._replace(**changes).of(self.config), self.sizes, self.device, work)

        rollouts = {kv: pricer().rollout(self.kv_share(kv)) for kv in self.caches()}
        scores = {x: pricer(reference=x).score() for x in self.references(rounded=rounded)}
        steps = {x: pricer(optimizer=x).optimizer() for x in self.optimizers()}
        updates = {}
        for workspace, mode in itertools.product(self.workspaces(), self.in_backwards()):
            if mode == "two_phase" and not is_single and mode != self.own.in_backward:
                continue  # the memory of "off"
            try:
                updates[workspace, mode] = pricer(workspace_mb=workspace, in_backward=mode).update()
            except InputError:  # too small for a row of logits
                continue
        for (workspace, mode), optimizer, reference, kv in itertools.product(
            updates, steps, scores, rollouts
        ):
            settings = base._replace(
                workspace_mb=workspace, in_backward=mode, optimizer=optimizer,
                reference=reference, kv_cache_gib=kv,
            )  # fmt: skip
            cost = Cost(rollouts[kv], scores[reference], updates[workspace, mode], steps[optimizer])
            yield Candidate(settings, cost, largest, is_single)

    def candidate(self, settings: Settings) -> Candidate | None:
        """Of given settings; None where a pass could not hold a completion and its prompt, or the
        workspace one row of logits.
        """
        config = settings.of(self.config)
        if settings.max_tokens_per_pass < budgets(config, self.sizes)[0]:
            return None
        work = work_of(config, self.sizes)
        share = self.kv_share(settings.kv_cache_gib)
        try:
            cost = cost_of(config, self.sizes, self.device, share, work)
        except InputError:
            return None
        largest = max(x.num_tokens for x in work.passes)
        return Candidate(settings, cost, largest, len(work.passes) == 1)

    def neighbours(self, own: Settings, *, rounded: Sequence[str] = ()) -> list[Candidate]:
        """Those that differ from given settings in one of them; checkpointing with offloading."""
        others = [own._replace(max_tokens_per_pass=x) for x in self.budgets(own.of(self.config))]
        others += [own._replace(workspace_mb=x) for x in self.workspaces()]
        others += [own._replace(checkpointing=x, offloading=y) for x, y in self.modes()]
        others += [own._replace(mlp_chunk_size=x) for x in self.chunks(own.max_tokens_per_pass)]
        others += [own._replace(optimizer=x) for x in self.optimizers()]
        others += [own._replace(in_backward=x) for x in self.in_backwards()]
        others += [own._replace(reference=x) for x in self.references(rounded=rounded)]
        others += [own._replace(kv_cache_gib=x) for x in self.caches()]
        found = [self.candidate(settings) for settings in dict.fromkeys(others) if settings != own]
        return [candidate for candidate in found if candidate is not None]


def _num_changes(own: Settings, other: Settings) -> int:
    return sum(x != y for x, y in zip(own, other, strict=True))


def _rounded_up(value: float) -> float:
    """To three digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.3g}")
