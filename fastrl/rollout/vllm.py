"""Sampling with vLLM in this process, on a copy of the weights that follows training.

Untested here: no test of this project runs vLLM, and nothing has run on a GPU, so sleeping, waking
and the memory they free are as its documentation says. Sampling and updates of weights and adapters
were compared with plain forward passes once, on the CPU build of vLLM 0.32.

Legend: P prompts, G num_generations, B = P*G completions.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastrl.errors import InputError
from fastrl.policy import Policy
from fastrl.rollout import OnCompletion, Sampling
from fastrl.rollout.completions import Completion, Ends, to_rollouts
from fastrl.rollout.thinking import refuse_thinking_limit
from fastrl.types import Prompts, Rollouts

OLDEST, TOO_NEW = (0, 32), (0, 34)
"""Supported versions of vLLM: OLDEST <= version < TOO_NEW."""
KEEP_WEIGHTS, DROP_WEIGHTS = 1, 2
"""Sleep levels: weights wait in the CPU's memory, or are given up; the K/V cache always is."""

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM makes room for; an adapter of a rank between two takes the higher."""


class VLLMEngine:
    """vLLM's engine, awake only while it samples.

    Before each rollout it takes over the weights: those of the adapter alone where the policy has a
    LoRA one (the base must be the same), all of them otherwise, and forgets its prefix cache. Its
    kernels, and dtype where that differs, make its log-probabilities differ from the trainer's:
    correct with objective.rollout_correction. They are of what it draws from.

    It needs a CUDA GPU, `pip install 'fastrl-llm[vllm]'`, and memory for a second copy.
    """

    shares_weights = False
    follows_training = True

    def __init__(
        self, policy: Policy, *, model: str | None = None, dtype: str = "bfloat16",
        gpu_memory_utilization: float = 0.3, max_model_len: int | None = None,
        enforce_eager: bool = False, llm_args: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """model: the directory that the policy was loaded from, unless transformers knows it.

        gpu_memory_utilization: share of the GPU for vLLM's weights and cache while it is awake;
        llm_args: further arguments of vllm.LLM.
        """
        vllm = import_vllm()
        if not torch.cuda.is_available():
            raise InputError("rollout.engine 'vllm' needs a CUDA GPU; use 'native' without one")
        self.policy = policy
        self.has_adapter = hasattr(policy.model, "peft_config")
        directory = model or policy.model.config.name_or_path
        if not directory or not Path(directory).is_dir():
            raise InputError(
                f"vLLM reads the model from a directory and {directory!r} is none; set "
                "rollout.engine_args.model"
            )
        if not self.has_adapter and not all(
            parameter.is_floating_point() for parameter in policy.model.parameters()
        ):
            raise InputError("vLLM cannot take over quantised weights; use 'native', or an adapter")
        # Weights are handed over as tensors of this process, so the engine must live in it.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self.num_updates = 0
        self.adapters = tempfile.TemporaryDirectory(prefix="fastrl-adapter-")
        rank = {"max_lora_rank": adapter_room(policy)} if self.has_adapter else {}
        self.llm = vllm.LLM(
            model=directory, dtype=dtype, gpu_memory_utilization=gpu_memory_utilization,
            max_model_len=max_model_len, enforce_eager=enforce_eager, enable_sleep_mode=True,
            logprobs_mode="processed_logprobs", generation_config="vllm",
            enable_lora=self.has_adapter, **rank, **(llm_args or {}),
        )  # fmt: skip
        self._sleep()

    @torch.no_grad()
    def generate(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator,
        on_completion: OnCompletion | None = None,
    ) -> Rollouts:  # fmt: skip
        """See `Engine.generate`; completions end a prompt at a time."""
        refuse_thinking_limit(sampling.thinking, "vllm")
        ends = Ends(self.policy, sampling)
        at_once = 1 if sampling.temperature == 0.0 else sampling.num_generations  # vLLM insists
        num_rows = len(prompts) * sampling.num_generations
        seeds = torch.randint(
            2**31, (num_rows,), generator=generator, device=generator.device
        ).tolist()
        self.llm.wake_up(tags=["weights"])
        adapter = self._update()
        self.llm.reset_prefix_cache()
        self.llm.wake_up(tags=["kv_cache"])
        engine, completions = self.llm.llm_engine, {}
        try:
            for row in range(0, num_rows, at_once):
                ids = prompts.token_ids[row // sampling.num_generations].tolist()
                parameters = self._parameters(sampling, at_once, seeds[row])
                engine.add_request(
                    str(row), {"prompt_token_ids": ids}, parameters, lora_request=adapter
                )
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if not output.finished:
                        continue
                    for row, completion in completions_of(output, ends):
                        completions[row] = completion
                        if on_completion is not None:
                            on_completion(row, completion.ids)
        finally:
            self._sleep()
        in_order = [completions[b] for b in range(num_rows)]
        return to_rollouts(prompts, sampling, in_order, is_processed=True)

    def _sleep(self) -> None:
        """Ends what is under way. A base that only an adapter follows is not handed over again."""
        self.llm.sleep(level=KEEP_WEIGHTS if self.has_adapter else DROP_WEIGHTS)

    def _update(self) -> Any:
        """Takes over the policy's weights; the request for the adapter if there is one."""
        if not self.has_adapter:
            named = self.policy.model.named_parameters()
            weights = iter([(name, parameter.detach()) for name, parameter in named])
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            return None
        if self.num_updates > 0:
            self.llm.llm_engine.remove_lora(self.num_updates)
        self.num_updates += 1  # a new name each time, so that no cache can know it
        directory = Path(self.adapters.name) / "adapter"
        self.policy.model.save_pretrained(directory)
        request = importlib.import_module("vllm.lora.request").LoRARequest
        return request(f"policy-{self.num_updates}", self.num_updates, str(directory))

    def _parameters(self, sampling: Sampling, at_once: int, seed: int) -> Any:
        sampled = sampling.temperature > 0.0  # truncation leaves the most likely token as it is
        return importlib.import_module("vllm").SamplingParams(
            n=at_once,
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampled else 1.0,
            top_k=sampling.top_k if sampled else 0,
            min_p=sampling.min_p if sampled else 0.0,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_completion_length,
            stop=list(sampling.stop_strings),
            stop_token_ids=self.policy.eos_token_ids,
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            logprobs=0,  # of the drawn token
            seed=seed,
            output_kind=importlib.import_module(
                "vllm.sampling_params"
            ).RequestOutputKind.FINAL_ONLY,
        )


def import_vllm() -> Any:
    """The vllm module, if it is installed in a supported version."""
    window = f"{'.'.join(map(str, OLDEST))} <= version < {'.'.join(map(str, TOO_NEW))}"
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"rollout.engine 'vllm' needs vLLM ({window}): pip install 'fastrl-llm[vllm]'"
        ) from error
    if not OLDEST <= tuple(int(part) for part in version.split(".")[:2]) < TOO_NEW:
        raise InputError(
            f"vLLM {version} is installed and rollout.engine 'vllm' is written for {window}: "
            "pip install 'fastrl-llm[vllm]'"
        )
    return importlib.import_module("vllm")


def completions_of(output: Any, ends: Ends) -> list[tuple[int, Completion]]:
    """Rows and completions of a finished vllm.RequestOutput, whose id is its first row."""
    found = []
    for each in output.outputs:
        ids = torch.tensor(list(each.token_ids), dtype=torch.int64)
        if each.logprobs is None:
            raise InputError("vLLM returned no log-probabilities; see rollout.engine_args.llm_args")
        pairs = zip(each.token_ids, each.logprobs, strict=True)
        logps = torch.tensor([position[token].logprob for token, position in pairs])
        found.append((int(output.request_id) + each.index, ends.cut(ids, logps)))
    return found


def adapter_room(policy: Policy) -> int:
    """The rank that vLLM must make room for."""
    rank = max(config.r for config in policy.model.peft_config.values())
    if rank > ADAPTER_RANKS[-1]:
        raise InputError(f"vLLM takes adapters of rank {ADAPTER_RANKS[-1]} at most, got {rank}")
    return next(most for most in ADAPTER_RANKS if most >= rank)
