"""What a run will need, from its configuration alone.

A survey knows a model; its plans may differ in everything else. What a pass takes is found out by
running it on "meta" (`update_phase`), on few layers where the model has many of a kind.

Legend: L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastrl.activations import head_row_cost
from fastrl.config import Config, ModelConfig
from fastrl.critic import Critic
from fastrl.errors import InputError
from fastrl.integrations.bare_models import model_config
from fastrl.memory import model as models
from fastrl.memory.growth import Growth
from fastrl.memory.model import Fewer, MetaPolicy
from fastrl.memory.optimizers import LIBRARY_BITS
from fastrl.memory.passes import Work, largest_passes
from fastrl.memory.plan import GIB, MemoryPlan, Phase
from fastrl.memory.resident import resident_parts, visiting_bytes
from fastrl.memory.rig import critic_on_meta, reference_on_meta
from fastrl.memory.timeline import BLOCK, Moment, Window
from fastrl.memory.trained import trained_of
from fastrl.memory.update_phase import Place, Rig, program_of, recorded
from fastrl.memory.work import method_of
from fastrl.memory_modes import check_memory_modes
from fastrl.methods.needs import needs_reference
from fastrl.methods.record import Method
from fastrl.policy import resolve_device

CONTEXT_BYTES = GIB // 2
"""Of CUDA and its libraries in a process: 0.3 to 0.6 GiB from driver to driver."""
CUBLAS_BYTES = 32 * 2**20
"""Workspace that torch gives cuBLAS on an H100; 8 MiB on other devices."""
HOLES = 0.03
"""Of the peak: blocks of torch's allocator on a GPU that are partly free."""
T = TypeVar("T")
COMPUTED = ("score", "update", "step")


class Survey:
    """A model and a device, and what has been found out about them."""

    def __init__(self, config: Config, *, device: str) -> None:
        self.config = config
        self.device = device
        self.architecture = models.architecture_of(config.model)
        self.num_layers: int = self.architecture.get_text_config().num_hidden_layers
        self._found: dict[Any, Any] = {}

    def plan(self, config: Config | None = None) -> MemoryPlan:
        """Of a configuration of the same model, adapter and weights of 4 bits; that of the survey
        unless one is given.
        """
        from fastrl.memory.rollout_phase import rollout_notes, rollout_phases

        config = config or self.config
        sampled = {phase.name: phase for phase in rollout_phases(self, config)}
        phases = [*sampled.values(), *self.update_phases(config)]
        order = ("rollout", *COMPUTED, "evaluate")
        phases.sort(key=lambda phase: order.index(phase.name))
        peak = max(phase.total for phase in phases)
        is_cuda = self.device == "cuda"
        return MemoryPlan(
            self.device, tuple(phases), CONTEXT_BYTES if is_cuda else 0,
            round(HOLES * peak) if is_cuda else 0,
            (*_notes(config, self.device), *rollout_notes(config)),
        )  # fmt: skip

    def policy(self, config: Config | None = None, *, num_layers: int | None = None) -> MetaPolicy:
        """The policy of a configuration on "meta", or its first layers."""
        settings = (config or self.config).model
        key = ("policy", _key(settings), num_layers)

        def make() -> MetaPolicy:
            model = models.with_layers(self._whole(settings), num_layers or self.num_layers)
            return models.with_modes(model, settings, device=self.device)

        return self.once(key, make)

    def resident(self, config: Config | None = None) -> Mapping[str, int]:
        """Bytes by part that lie on the device between two steps, from the second on."""
        config = config or self.config
        method = method_of(config)
        key = (
            "resident", _key(models.same_weights(config.model)), config.model.reference,
            config.optim.optimizer, config.critic.model, config.warm_start.steps > 0,
            method.value_loss is None, needs_reference(method), method.reference_update is None,
            method.look_ahead is None,
        )  # fmt: skip

        def make() -> Mapping[str, int]:
            policy = MetaPolicy(self._whole(config.model), config.model)
            body = self._value_body(config, method)
            return resident_parts(config, method, policy, body, device=self.device)

        return self.once(key, make)

    def head_row_cost(self, config: Config) -> float:
        """What a trained token's row at the head takes of a pass, in packed tokens."""
        policy, settings = self.policy(config, num_layers=1), config.model
        return head_row_cost(
            self.architecture,
            bf16=policy.is_half,
            is_checkpointed=settings.gradient_checkpointing,
            has_bf16_stream=policy.has_bf16_stream,
            is_offloaded=settings.activation_offloading,
            has_chunked_mlps=settings.mlp_chunk_size > 0,
            head_dtype=policy.head_dtype,
        )

    def update_phases(self, config: Config) -> list[Phase]:
        """Phases "score", "update" and "step"."""
        method, resident = method_of(config), self.resident(config)
        is_half = self.policy(config, num_layers=1).is_half
        trained = trained_of(config, method, is_half=is_half)
        method = trained.method
        passes = largest_passes(config, trained, self.head_row_cost(config))
        windows: list[Window] = []
        if passes.next is None or passes.next is not passes.first:
            place: Place = "only" if passes.next is None else "first"
            windows += self._windows(config, method, passes.first, place)
        if passes.next is not None:
            windows += self._windows(config, method, passes.next, "last")
        extra = {"other": CUBLAS_BYTES} if self.device == "cuda" else {}
        found = []
        for name in COMPUTED:
            own = [window.highest for window in windows if window.name == name]
            highest = max(own, key=lambda moment: moment.total, default=Moment(0, {}))
            parts = _sum(resident, highest.parts, extra)
            if name == "score" and config.model.reference == "cpu" and needs_reference(method):
                visiting = visiting_bytes(self._whole(config.model), self.device)
                parts = _sum(parts, {"reference": visiting if self.device == "cuda" else 0})
            found.append(Phase(name, parts))
        return found

    def _windows(self, config: Config, method: Method, work: Work, place: Place) -> list[Window]:
        """The highest moments of a pass through all layers, from passes through few."""
        fewer = self._fewer(config.model)
        first = self._recorded(config, method, work, place, fewer.first)
        if fewer.second == fewer.first:
            return first
        second = self._recorded(config, method, work, place, fewer.second)
        turns = (self.num_layers - fewer.first) // (fewer.second - fewer.first)
        assert [x.name for x in first] == [x.name for x in second]
        return [
            Window(a.name, _grown(a.highest, b.highest, turns))
            for a, b in zip(first, second, strict=True)
        ]

    def _recorded(
        self, config: Config, method: Method, work: Work, place: Place, num_layers: int
    ) -> list[Window]:
        rig = self._rig(config, method, num_layers)
        program = program_of(rig, work, place)
        key = ("growth", num_layers, _key(config.model), config.critic.model, program)

        def make() -> Growth:
            return Growth(lambda work: recorded(rig, work, place), is_affine=not program.has_mixers)

        return self.once(key, make).at(work).windows(work)

    def _rig(self, config: Config, method: Method, num_layers: int) -> Rig:
        policy = self.policy(config, num_layers=num_layers)
        settings, critic, reference = _key(config.model), None, None
        if method.value_loss is not None:
            kind = config.critic.model

            def make_critic() -> tuple[MetaPolicy, Critic]:
                own = policy.copied() if kind == "lora" else policy
                return own, critic_on_meta(config, own, self._value_body(config, method))

            policy, critic = self.once(("critic", settings, kind, num_layers), make_critic)
        if needs_reference(method):
            follows = method.reference_update is not None or config.warm_start.steps > 0
            reference = self.once(
                ("reference", settings, num_layers, follows, id(policy)),
                lambda: reference_on_meta(config, method, policy),
            )
        return Rig(config, method, self.device, policy, critic, reference)

    def _whole(self, settings: ModelConfig) -> Any:
        alike = models.same_weights(settings)
        return self.once(
            ("whole", _key(alike)),
            lambda: models.whole_model(self.architecture, alike, device=self.device),
        )

    def _fewer(self, settings: ModelConfig) -> Fewer:
        is_offloaded = settings.activation_offloading
        least = models.FEW_OFFLOADED if is_offloaded else models.FEW_LAYERS
        key = ("fewer", least, _key(models.same_weights(settings)))
        return self.once(key, lambda: models.fewer_layers(self._whole(settings), least=least))

    def _value_body(self, config: Config, method: Method) -> Any:
        """The layers of a value model that is a directory's; None for another, or none."""
        directory, settings = config.critic.model, config.model
        if method.value_loss is None or directory in ("head", "lora"):
            return None
        return self.once(
            ("body", directory, settings.precision, settings.gradient_checkpointing),
            lambda: models.value_body(model_config(Path(directory)), settings.precision),
        )

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]


def survey(config: Config, *, device: str | None = None) -> Survey:
    """Of the model of a configuration; no weights are read.

    device: "cpu" or "cuda", by default where the run would train; "cuda" works without a GPU.
    """
    if device is None:
        device = resolve_device(config.model.device).type
    if device not in BLOCK:
        raise InputError(f"memory is planned for cpu or cuda, got {device!r}")
    settings = dataclasses.replace(config.model, use_liger_kernel=False)
    if settings.lora:  # bitsandbytes and liger need not be here to plan with them
        settings = dataclasses.replace(settings, load_in_4bit=False)
    check_memory_modes(settings, torch.device(device))
    return Survey(config, device=device)


def _key(settings: ModelConfig) -> str:
    return repr(settings)


def _sum(*parts: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for some in parts:
        for part, size in some.items():
            found[part] = found.get(part, 0) + size
    return found


def _grown(first: Moment, second: Moment, turns: int) -> Moment:
    """With so many times as many layers more as the second has."""
    names = {*first.parts, *second.parts}
    parts = {}
    for name in names:
        before, after = first.parts.get(name, 0), second.parts.get(name, 0)
        parts[name] = before + turns * (after - before)
    return Moment(first.total + turns * (second.total - first.total), parts)


def _notes(config: Config, device: str) -> tuple[str, ...]:
    """What the numbers leave out."""
    notes = []
    if device == "cpu":
        notes.append(
            "what Python and libraries hold is not counted: it is measured when a run starts"
        )
    else:
        notes.append(
            f"estimated: {CONTEXT_BYTES / GIB:.2g} GiB for CUDA's context and {HOLES:.0%} of the "
            "peak for blocks of the allocator that are partly free"
        )
    if config.model.use_liger_kernel:
        notes.append("liger's layers are counted as transformers' own, which keep more")
    if config.optim.optimizer in LIBRARY_BITS:
        notes.append(f"what a step of {config.optim.optimizer} takes for a moment is not counted")
    return tuple(notes)
