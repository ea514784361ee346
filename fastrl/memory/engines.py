"""What one call of an engine takes at its highest, beside what is there between calls.

Legend: P prompts, R rows, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple

import torch

from fastrl.adapters import adapter_off
from fastrl.config import Config
from fastrl.integrations.decoding import has_state
from fastrl.integrations.folding import adapted_layers
from fastrl.memory.cached_runs import cached_call, copied_logits, paged_call
from fastrl.memory.cards import memory_of
from fastrl.memory.decoder_runs import Prefill, decoder_step, drawing, growth, prefill
from fastrl.memory.engine_moments import Call, Moment, moments
from fastrl.policy import Policy
from fastrl.rollout import Sampling
from fastrl.rollout.decoder import PREFILL_TOKENS
from fastrl.rollout.room import GIB, MOMENT_BYTES, USABLE, Room
from fastrl_kernels import LMHead

Parts = Mapping[str, int]
OTHERS = ("vllm", "http")
"""Engines that are programs of their own."""


SIZES: tuple[Callable[[Moment], tuple[int, int]], ...] = (
    lambda moment: (moment.num_tokens, moment.num_rows),
    lambda moment: (moment.num_rows, moment.num_tokens),
    lambda moment: (min(moment.num_prompts * moment.prompt_length, PREFILL_TOKENS),
                    moment.num_tokens),
)  # fmt: skip
"""What the highest moment of a kind is the largest of: keys and values, rows, or tokens of prompts
in a pass."""
FILLS = 3
"""How often the prompts that are looked at fill the room: later ones come as the first did."""


class Setting(NamedTuple):
    """What sampling depends on besides the call; policies are on "meta"."""

    config: Config
    sampling: Sampling
    device: str
    """ "cpu" or "cuda", which "meta" stands for."""
    whole: Policy
    few: Policy
    """The first layers alone: what a layer takes is given back before the next."""
    more: Policy
    """With one of every kind more that takes turns; `few` itself where that is the whole."""
    turn: int
    """How many kinds that is."""
    num_turns: int
    """How often what `more` has is in the whole, beside `few`."""

    def grown(self, of_few: int, of_more: int) -> int:
        """What is there of every layer, of the whole."""
        return of_few + self.num_turns * (of_more - of_few)


def highest_moment(setting: Setting, call: Call) -> Parts:
    """Bytes by what they are for; none for engines that are programs of their own."""
    policy, engine = setting.few, setting.config.rollout.engine
    if engine in OTHERS:
        return {}
    with policy.evaluating(), setting.more.evaluating(), _folded(setting):
        if engine == "hf_cb":
            return _both(setting, lambda few: [_paged(setting, few, call)])[0]
        if engine == "native" and not has_state(policy.model):
            found, num_rows = _native(setting, call)
            copied = 0
        else:
            found = _both(setting, lambda few: cached_call(few, setting.device, call, engine))
            num_rows = call.num_rows
            copied = copied_logits(policy, call, engine)
    drawn = drawing(policy, setting.device, setting.sampling, num_rows) + copied
    found += [
        {**{part: size for part, size in parts.items() if part != "activations"}, "sampling": drawn}
        for parts in found
    ]
    highest = max(found, key=lambda parts: sum(parts.values()))
    return Counter(highest) + Counter(_kept(setting, call))


def _both(setting: Setting, call: Callable[[Policy], list[Parts]]) -> list[Parts]:
    """What all layers take in some moments, from what few and some more do."""
    found: list[Parts] = []
    for few, more in zip(call(setting.few), call(setting.more), strict=True):
        found.append({part: setting.grown(few[part], more[part]) for part in few})
    return found


def _paged(setting: Setting, policy: Policy, call: Call) -> Parts:
    return paged_call(policy, setting.device, setting.config.rollout.engine_args, call)


def _native(setting: Setting, call: Call) -> tuple[list[Parts], int]:
    """Of the moments that may be the highest, and the most rows of one."""
    token, kept, token_bytes = _of_a_token(setting)
    room = _room(setting, token_bytes, call)
    by_kind: dict[str, list[Moment]] = {"admit": [], "grow": [], "step": []}
    for moment in moments(setting.few, room, _enough(room, call)):
        by_kind[moment.kind].append(moment)
    chosen = {max(some, key=size) for some in by_kind.values() if some for size in SIZES}
    found: list[Parts] = [
        {
            "weights": kept,
            "keys and values": moment.num_tokens * token_bytes,
            "activations": _beside(setting, token, moment),
        }
        for moment in chosen
    ]
    return found, max(moment.num_rows for moment in chosen)


def _enough(room: Room, call: Call) -> Call:
    """As many of the prompts as fill the room a few times; the others bring nothing new."""
    if room.num_tokens is None:
        return call
    of_prompt = call.prompt_length + call.num_generations * room.expected
    num_prompts = FILLS * (1 + room.num_tokens // of_prompt)
    return call._replace(num_prompts=min(call.num_prompts, num_prompts))


def _of_a_token(setting: Setting) -> tuple[Prefill, int, int]:
    """A prompt of one token through few layers; what autocast keeps of all weights, and bytes of
    one token's keys and values in all layers.
    """
    few = _one_token(setting.few, setting.device)
    kept = few.kept
    if setting.num_turns and setting.few.bf16:
        kept = setting.grown(kept, _one_token(setting.more, setting.device).kept)
    of_turn = sum(layout.token_bytes for layout in few.layouts[-setting.turn :])
    return few, kept, few.token_bytes + setting.num_turns * of_turn


def _one_token(policy: Policy, device: str) -> Prefill:
    return prefill(policy, device, num_prompts=1, num_rows=1, length=1, capacity=1)


def _beside(setting: Setting, token: Prefill, moment: Moment) -> int:
    """Bytes beside keys and values while the moment lasts."""
    policy, device = setting.few, setting.device
    if moment.kind == "grow":
        return growth(token.layouts, moment.num_copied)
    if moment.kind == "admit":
        return prefill(
            policy, device, num_prompts=moment.num_prompts, num_rows=moment.num_rows,
            length=moment.prompt_length, capacity=moment.columns, is_first=moment.is_first,
        ).beside  # fmt: skip
    return decoder_step(
        policy, device, token.layouts, num_prompts=moment.num_prompts, num_rows=moment.num_rows,
        length=moment.prompt_length, columns=moment.columns,
    )  # fmt: skip


def _room(setting: Setting, token_bytes: int, call: Call) -> Room:
    """As the native engine has it; of a GPU what weights and moments leave over.

    Where that is too little for a prompt with its completions, which an engine refuses, as much as
    they need.
    """
    config = setting.config
    gib = config.rollout.engine_args.get("kv_cache_gib")
    total = _total_memory(config) if setting.device == "cuda" else None
    num_bytes = None
    if gib is not None:
        num_bytes = gib * GIB
    elif total is not None:
        parameters = list(setting.whole.model.parameters())
        weights = sum(parameter.nbytes for parameter in parameters)
        moved = MOMENT_BYTES * sum(x.numel() for x in parameters if x.requires_grad)
        num_bytes = USABLE * total - weights - moved
    if num_bytes is None:
        return Room(None, call.completion_length)
    least = call.prompt_length + call.num_generations * call.completion_length
    num_tokens = max(int(num_bytes / token_bytes), least)
    return Room(num_tokens, call.completion_length, bytes_per_token=token_bytes)


def _total_memory(config: Config) -> int | None:
    """Of the GPU, as far as it is known."""
    if config.memory_limit is not None:
        return memory_of(config.memory_limit)
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return None


def _kept(setting: Setting, call: Call) -> Parts:
    """What is there for the whole call."""
    config, model = setting.config, setting.whole.model
    head = LMHead.from_model(model)
    found = {}
    if config.model.cast_lm_head_to_fp32 and head.weight.dtype != torch.float32:
        rows, width = head.weight.shape
        found["head"] = rows * width * torch.float32.itemsize
    if setting.sampling.repetition_penalty != 1.0:
        found["sampling"] = call.num_rows * head.num_columns  # who has said what
    if config.rollout.engine_args.get("fold_adapters") and setting.device == "cpu":
        layers = [layer.get_base_layer() for layer in adapted_layers(model)]
        found["other"] = sum(layer.weight.nbytes for layer in layers)
    return found


def _folded(setting: Setting) -> AbstractContextManager[object]:
    """Without adapters, where they are in the weights."""
    folds = setting.config.rollout.engine_args.get("fold_adapters")
    stack = ExitStack()
    for policy in (setting.few, setting.more) if folds else ():
        stack.enter_context(adapter_off(policy.model))
    return stack
