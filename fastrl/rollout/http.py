"""Sampling from a server that speaks OpenAI's completions protocol and has weights of its own.

Legend: P prompts, G num_generations, B = P*G completions, C completion length.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.errors import InputError, nearest
from fastrl.policy import Policy
from fastrl.rollout import OnCompletion, Sampling
from fastrl.rollout.answers import Answers
from fastrl.rollout.completions import Completion, Ends, refuse_unless_raw_is_enough, to_rollouts
from fastrl.rollout.connections import Connections
from fastrl.rollout.thinking import refuse_thinking_limit
from fastrl.types import Prompts, Rollouts

LOGPS = ("raw", "processed", "none")


class Asked(NamedTuple):
    """One request: rows of Rollouts that answer prompt p."""

    prompt: int
    rows: range


class HTTPEngine:
    """Completions of a server's /v1/completions, with their token ids and log-probabilities.

    The server's weights are its own: they do not follow training. Either every rollout is corrected
    for being off-policy (objective.rollout_correction, which needs log-probabilities), or the
    server is made to load a checkpoint between runs: restart it on checkpoint-N/, or use its own
    way to read weights from disk. Completions arrive a prompt at a time. `generator` gives each
    request a seed; whether the same seed gives the same completions is up to the server.

    vLLM is what it is tried with: `vllm serve DIR --logprobs-mode processed_logprobs`, and
    logps = "processed" here. Other servers must take its extensions of the protocol: prompts as
    token ids, return_token_ids, top_k, min_p, repetition_penalty, stop_token_ids.
    """

    shares_weights = False

    def __init__(
        self, policy: Policy, *, url: str, model: str, timeout_s: float = 600.0,
        num_retries: int = 2, num_connections: int = 16, logps: str = "raw",
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """url: of the server, with or without /v1; model: the name that it serves it by.

        timeout_s: of one attempt at one prompt's completions, of which there are num_retries + 1.

        logps: what the server's log-probabilities are of: "raw", softmax(logits), or "processed",
        what it draws from. "none": it gives text only, like `transformers serve`; the text is
        tokenised again, which must give as many tokens as it drew, and nothing is recorded: no
        correction is possible, nor any check of the weights.

        extra_body: fields added to every request. `transformers serve` samples only with
        extra_body = {generation_config = '{"do_sample": true, ...}'}.
        """
        if logps not in LOGPS:
            raise InputError(
                f"unknown rollout.engine_args.logps {logps!r}; {nearest(logps, list(LOGPS))}"
            )
        for name, value, smallest in (
            ("timeout_s", timeout_s, 1e-3),
            ("num_retries", num_retries, 0),
            ("num_connections", num_connections, 1),
        ):
            if value < smallest:
                raise InputError(
                    f"rollout.engine_args.{name} must be at least {smallest}, got {value}"
                )
        Connections(url, timeout_s=timeout_s, num_retries=num_retries)  # refuses what is no url
        self.policy = policy
        self.url = url
        self.model = model
        self.timeout_s = timeout_s
        self.num_retries = num_retries
        self.num_connections = num_connections
        self.logps = logps
        self.extra_body = dict(extra_body or {})

    def generate(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator,
        on_completion: OnCompletion | None = None,
    ) -> Rollouts:  # fmt: skip
        """See `Engine.generate`; the completions are those of the server's weights."""
        refuse_thinking_limit(sampling.thinking, "http")
        if self.logps == "raw":
            refuse_unless_raw_is_enough(sampling, "the server with logps = 'raw'")
        answers = Answers(self.policy, Ends(self.policy, sampling), sampling, self.url)
        asked, bodies = self._requests(prompts, sampling, generator)
        completions: dict[int, Completion] = {}
        connections = Connections(self.url, timeout_s=self.timeout_s, num_retries=self.num_retries)
        executor = ThreadPoolExecutor(self.num_connections)
        try:
            futures: dict[Future[Any], Asked] = {
                executor.submit(connections.post, "/v1/completions", body): request
                for request, body in zip(asked, bodies, strict=True)
            }
            for future in as_completed(futures):
                request = futures[future]
                ids = prompts.token_ids[request.prompt]
                read = answers.from_text if self.logps == "none" else answers.from_ids
                found = read(future.result(), ids, len(request.rows))
                for row, completion in zip(request.rows, found, strict=True):
                    completions[row] = completion
                    if on_completion is not None:
                        on_completion(row, completion.ids)
        finally:
            connections.close()
            executor.shutdown(cancel_futures=True)
        in_order = [completions[b] for b in range(len(prompts) * sampling.num_generations)]
        return to_rollouts(prompts, sampling, in_order, is_processed=self.logps == "processed")

    def _requests(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator
    ) -> tuple[list[Asked], list[dict[str, Any]]]:
        """One request a prompt, or one a completion where n > 1 is ignored or refused."""
        is_single = self.logps == "none" or sampling.temperature == 0.0
        at_once = 1 if is_single else sampling.num_generations
        asked = [
            Asked(b // sampling.num_generations, range(b, b + at_once))
            for b in range(0, len(prompts) * sampling.num_generations, at_once)
        ]
        seeds = torch.randint(
            2**31, (len(asked),), generator=generator, device=generator.device
        ).tolist()
        bodies = []
        for request, seed in zip(asked, seeds, strict=True):
            ids = prompts.token_ids[request.prompt]
            body = (
                self._plain_body(ids, sampling)
                if self.logps == "none"
                else self._body(ids, sampling, at_once)
            )
            bodies.append({**body, "seed": seed, **self.extra_body})
        return asked, bodies

    def _body(self, ids: Tensor, sampling: Sampling, at_once: int) -> dict[str, Any]:
        """Everything is said: what is left open a server fills in from its model's own settings."""
        sampled = sampling.temperature > 0.0  # truncation leaves the most likely token as it is
        return {
            "model": self.model,
            "prompt": ids.tolist(),
            "n": at_once,
            "max_tokens": sampling.max_completion_length,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p if sampled else 1.0,
            "top_k": sampling.top_k if sampled and sampling.top_k else -1,
            "min_p": sampling.min_p if sampled else 0.0,
            "repetition_penalty": sampling.repetition_penalty,
            "stop": list(sampling.stop_strings),
            "stop_token_ids": self.policy.eos_token_ids,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "logprobs": 1,
            "return_token_ids": True,
        }

    def _plain_body(self, ids: Tensor, sampling: Sampling) -> dict[str, Any]:
        """Fields of OpenAI's own protocol only; others are refused by `transformers serve`.

        One token more is asked for, so that an end at the length limit is told from being cut.
        """
        for name, off in (("top_k", 0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
            if getattr(sampling, name) != off:
                raise InputError(
                    f"rollout.{name} is no part of OpenAI's protocol, which is all that "
                    f"logps = 'none' uses; set it to {off}"
                )
        text = self.policy.tokenizer.decode(ids)
        again = self.policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        if again != ids.tolist():
            raise InputError(
                "a prompt becomes other tokens when its text is tokenised again, and logps = "
                f"'none' sends text; it is {text[:100]!r}"
            )
        return {
            "model": self.model,
            "prompt": text,
            "max_tokens": sampling.max_completion_length + 1,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p if sampling.temperature > 0.0 else 1.0,
            **({"stop": list(sampling.stop_strings)} if sampling.stop_strings else {}),
        }
