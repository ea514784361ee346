"""An update of a model, from token ids to new weights: ours, and rows padded as most trainers do.

Forward, loss, backward, clipping of the norm and AdamW, at a learning rate of 0, so that all do the
same work on the same weights each time. Completions are log-normal in length; the policy is the
one that sampled them.

P prompt tokens, R completion tokens on average, G completions of each prompt, S trained tokens,
D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from cases import Loaders, Prepared
from implementations import load
from inputs import SPREAD, log_normal_lengths
from measure import Step
from peers import naive_logps, require_cuda, trl_logps
from reference import EPSILON_HIGH, EPSILON_LOW, Errors
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Half-precision layers add their roundings up: what tells a wrong gradient from a rounded one.
TOLERANCES = {
    torch.float32: {"loss": 1e-4, "weight_grad": 1e-3},
    torch.bfloat16: {"loss": 1e-2, "weight_grad": 0.1},
}


@dataclass(frozen=True)
class Update:
    """What a case is large in."""

    num_prompts: int
    prompt: int
    completion: int
    num_generations: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        """As a case is named."""
        return (
            f"prompts={self.num_prompts} P={self.prompt} R={self.completion} log-normal {SPREAD:g} "
            f"G={self.num_generations} layers={self.num_layers} D={self.hidden_size} "
            f"V={self.vocab_size} {str(self.dtype).removeprefix('torch.')}"
        )


TINY = Update(1, 24, 8, 2, 64, 2, 512, torch.float32, "cpu")
ON_CPU = Update(1, 512, 64, 8, 256, 4, 8192, torch.float32, "cpu")
ON_GPU = Update(2, 2048, 512, 8, 1024, 28, 151936, torch.bfloat16, "cuda")  # Qwen3-0.6B


@dataclass(frozen=True)
class UpdateCase:
    """An update of one size."""

    shape: Update

    def __str__(self) -> str:
        """Name of the case in the results."""
        return f"update {self.shape}"


class Tokens(NamedTuple):
    """Prompts, and the completions of each."""

    prompts: list[Tensor]
    completions: list[list[Tensor]]
    advantages: Tensor  # one for each completion

    @property
    def flat(self) -> list[tuple[Tensor, Tensor]]:
        """Prompt and completion of every row."""
        pairs = zip(self.prompts, self.completions, strict=True)
        return [(prompt, completion) for prompt, group in pairs for completion in group]

    @property
    def token_advantages(self) -> Tensor:
        """(S,)"""
        lengths = [len(completion) for _, completion in self.flat]
        return self.advantages.repeat_interleave(torch.tensor(lengths, device=self.device))

    @property
    def target_ids(self) -> Tensor:
        """(S,)"""
        return torch.cat([completion for _, completion in self.flat])

    @property
    def device(self) -> torch.device:
        """Where all of them are."""
        return self.advantages.device


class Result(NamedTuple):
    """What one call left behind."""

    loss: Tensor
    model: Any


Loss = Callable[[Any, Tokens], Tensor]
"""(model, tokens) -> the loss"""


class Way(NamedTuple):
    """How a model is made ready, and its loss computed."""

    loss: Loss
    make_ready: Callable[[Any], None] = lambda model: None


def prepare(case: UpdateCase, only: str | None = None, kept: set[str] | None = None) -> Prepared:
    """Models and steps of a case: of all implementations, of those kept or of the one named."""
    shape = case.shape
    tokens = make_tokens(shape)
    loaders = update_loaders()
    if kept is not None:
        loaders = {name: loader for name, loader in loaders.items() if name in kept}
    if only is not None:
        loaders = {only: loaders[only]}
    ways = load(loaders, shape.device).functions
    models = {name: build_model(shape) for name in ways}
    for name, way in ways.items():
        way.make_ready(models[name])
    truth = functools.cache(lambda: make_reference(shape, tokens))
    num_tokens, num_rows = count_tokens(tokens), len(tokens.target_ids)
    model = next(iter(models.values()))
    num_weights = sum(p.numel() for p in model.model.layers.parameters())
    return Prepared(
        steps={name: make_step(way.loss, models[name], tokens) for name, way in ways.items()},
        leaves=tuple(p for model in models.values() for p in model.parameters()),
        check=lambda result: compare(result, truth()),
        make_floor=lambda: bare_products(model, num_tokens, num_rows),
        floor_name="bare matrix products",
        flops=6.0 * (num_weights * num_tokens + num_rows * shape.vocab_size * shape.hidden_size),
        formulas="flops = 6 (weights of the layers x tokens, each prompt once, + S V D); "
        "attention is not counted",
        tolerances=TOLERANCES[shape.dtype],
    )


def make_tokens(shape: Update) -> Tokens:
    """Random ids; one seed, one batch."""
    random = torch.Generator().manual_seed(0)

    def ids(length: int) -> Tensor:
        return torch.randint(shape.vocab_size, (length,), generator=random).to(shape.device)

    lengths = log_normal_lengths(shape.completion, shape.num_generations, SPREAD)
    advantages = torch.randn(shape.num_prompts * shape.num_generations, generator=random)
    return Tokens(
        [ids(shape.prompt) for _ in range(shape.num_prompts)],
        [[ids(length) for length in lengths] for _ in range(shape.num_prompts)],
        advantages.to(shape.device),
    )


def build_model(shape: Update) -> Any:
    """A Qwen3 of this size with the same random weights every time."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    head_size = 128 if shape.hidden_size >= 1024 else 32
    num_heads = 2 * shape.hidden_size // head_size if head_size == 128 else 2
    config = Qwen3Config(
        hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers,
        intermediate_size=3 * shape.hidden_size, num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2, head_dim=head_size, vocab_size=shape.vocab_size,
        tie_word_embeddings=True, max_position_embeddings=8 * (shape.prompt + shape.completion),
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(shape.device):  # a CPU takes seconds for the weights of each of the models
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.to(shape.device, shape.dtype).train()


def make_step(loss_of: Loss, model: Any, tokens: Tokens) -> Step:
    """One update, which leaves the gradients behind."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)

    def step() -> Result:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, float("inf"))  # its work, not its effect
        optimizer.step()
        return Result(loss.detach(), model)

    return step


def count_tokens(tokens: Tokens) -> int:
    """That a model has to see: each prompt once, of completions all but the last token."""
    num_trained = sum(len(completion) - 1 for _, completion in tokens.flat)
    return sum(len(prompt) for prompt in tokens.prompts) + num_trained


def bare_products(model: Any, num_tokens: int, num_rows: int) -> Step:
    """Every matrix of the layers and the head with its two gradients, as products alone."""
    layer = model.model.layers[0]
    matrices = [p.detach() for p in layer.parameters() if p.ndim == 2]
    products = [(w, num_tokens, len(model.model.layers)) for w in matrices]
    products.append((model.lm_head.weight.detach(), num_rows, 1))
    operands = [
        (w, w.new_ones(n, w.shape[0]), w.new_ones(n, w.shape[1]), k) for w, n, k in products
    ]

    def step() -> None:
        for weight, outputs, inputs, count in operands:
            for _ in range(count):
                torch.mm(inputs, weight.T)
                torch.mm(outputs, weight)
                torch.mm(outputs.T, inputs)

    return step


def make_reference(shape: Update, tokens: Tokens) -> Result:
    """In float64, a row at a time."""
    model = build_model(shape).double()
    start, total = 0, torch.zeros((), dtype=torch.float64, device=shape.device)
    advantages = tokens.token_advantages.double()
    for prompt, completion in tokens.flat:
        row = torch.cat([prompt, completion])[None, :-1]
        hidden = model.model(input_ids=row, use_cache=False).last_hidden_state[0]
        logits = model.lm_head(hidden[len(prompt) - 1 :])
        logps = logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
        part = advantages[start : start + len(completion)]
        loss = ratio_loss(logps, part) / len(advantages)
        loss.backward()
        total += loss.detach()
        start += len(completion)
    return Result(total, model)


def compare(result: Result, truth: Result) -> Errors:
    """The loss, relative to 1, and all gradients together."""
    error = norm = 0.0
    for found, true in zip(result.model.parameters(), truth.model.parameters(), strict=True):
        assert true.grad is not None
        grad = torch.full_like(found, torch.nan) if found.grad is None else found.grad
        error += float((grad.double() - true.grad).square().sum())
        norm += float(true.grad.square().sum())
    return Errors(
        loss=abs(float(result.loss) - float(truth.loss)), weight_grad=(error / norm) ** 0.5
    )


def ratio_loss(logps: Tensor, advantages: Tensor) -> Tensor:
    """Sum over tokens of the clipped ratio to the policy itself."""
    ratios = torch.exp(logps - logps.detach())
    clipped = ratios.clamp(1 - EPSILON_LOW, 1 + EPSILON_HIGH)
    return -torch.minimum(ratios * advantages, clipped * advantages).sum()


# Ours


def fastrl_way(device: str, *, make_ready: Callable[[Any], None] | None = None) -> Way:
    """Each prompt once, and no logits."""
    from fastrl import pack
    from fastrl_kernels import LMHead, policy_loss
    from fastrl_kernels.objectives import Objective, clipped_ratio

    objective = Objective(clipped_ratio, (EPSILON_LOW, EPSILON_HIGH))

    def loss(model: Any, tokens: Tokens) -> Tensor:
        plan = pack(
            [x.cpu() for x in tokens.prompts], [[x.cpu() for x in g] for g in tokens.completions]
        )
        plan = plan.to(tokens.device)
        with plan.attach(model, source_rows_only=True):
            hidden = model.model(**plan.inputs).last_hidden_state[0]
        states, advantages = hidden[plan.source_index], tokens.token_advantages
        weights = torch.full_like(advantages, 1 / len(advantages))
        return policy_loss(
            states, LMHead.from_model(model), plan.target_ids, advantages, weights,
            objective=objective,
        ).loss  # fmt: skip

    return Way(loss) if make_ready is None else Way(loss, make_ready)


def recompute(model: Any) -> None:
    """Layers keep their inputs alone until backward."""
    # Newer transformers call it activation checkpointing.
    new_name = getattr(model, "activation_checkpointing_enable", None)
    (new_name or model.gradient_checkpointing_enable)({"use_reentrant": False})


def offload(model: Any) -> None:
    """And these in the memory of the CPU."""
    from fastrl.integrations.offload import offload_checkpoints

    recompute(model)
    offload_checkpoints(model, model.device)


def load_offloaded(device: str) -> Way:
    """Where there is a device to offload from."""
    require_cuda(device)
    return fastrl_way(device, make_ready=offload)


# Padded rows


class Padded(NamedTuple):
    """Rows of prompt and completion, (B, L) each, padded on the right."""

    input_ids: Tensor
    attention_mask: Tensor
    is_source: Tensor  # whether the next token is trained


def padded(tokens: Tokens) -> Padded:
    """What most trainers give a model."""
    rows = [torch.cat(pair)[:-1] for pair in tokens.flat]
    ids = pad_sequence(rows, batch_first=True)
    places = torch.arange(ids.shape[1], device=ids.device)
    ends = torch.tensor([len(row) for row in rows], device=ids.device)
    starts = torch.tensor([len(prompt) for prompt, _ in tokens.flat], device=ids.device)
    mask = places < ends[:, None]
    return Padded(ids, mask.long(), mask & (places >= starts[:, None] - 1))


def padded_states(model: Any, tokens: Tokens) -> Tensor:
    """(S, D) hidden states of the trained tokens, from padded rows."""
    batch = padded(tokens)
    hidden = model.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    return hidden[batch.is_source]


def padded_way(logps_of: Callable[..., tuple[Tensor, Any]]) -> Way:
    """A head over the trained tokens of padded rows."""

    def loss(model: Any, tokens: Tokens) -> Tensor:
        states = padded_states(model, tokens)
        logps, _ = logps_of(states, model.lm_head.weight, tokens.target_ids, 1.0)
        return ratio_loss(logps.float(), tokens.token_advantages) / len(logps)

    return Way(loss)


def load_liger(device: str) -> Way:
    """Liger's layers, and its fused cross-entropy as the head."""
    require_cuda(device)
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3
    from peers import liger_flce_logps

    def make_ready(model: Any) -> None:
        apply_liger_kernel_to_qwen3(
            cross_entropy=False, fused_linear_cross_entropy=False, model=model
        )

    return Way(padded_way(liger_flce_logps(device)).loss, make_ready)


def update_loaders() -> Loaders:
    """All implementations."""
    return {
        "fastrl": fastrl_way,
        "fastrl, recomputing": functools.partial(fastrl_way, make_ready=recompute),
        "fastrl, activations on the CPU": load_offloaded,
        "padded rows, all logits": lambda device: padded_way(naive_logps),
        "padded rows, TRL's head": lambda device: padded_way(trl_logps(device)),
        "padded rows, Liger's layers and head": load_liger,
    }
