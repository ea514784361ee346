"""Every option of a run: one typed tree, from which the TOML format and the command line are made.

Names follow TRL where TRL has one. There are no divisibility rules: a step is `prompts_per_step`
prompts with `num_generations` completions each, and `max_tokens_per_pass` alone cuts it into
passes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastrl.limits import Count, CountOrZero, Fraction, NonNegative, Positive, Range


@dataclass(frozen=True)
class DataConfig:
    """Where prompts are held out and how they become text."""

    eval_size: Count | None = None
    """Held-out prompts: 128, or all records of eval_path; no training prompt equals one of them."""
    eval_path: str | None = None
    """JSONL file whose first eval_size records are held out; without it they are split off the
    training file."""
    answer_tag: str | None = None
    """The verifier sees what stands between <TAG> and </TAG>; without it, the whole completion."""
    system_prompt: str | None = None
    """A system message put before every prompt; needs a tokenizer with a chat template."""
    chat_template: bool | None = None
    """Wrap text prompts as a chat turn; by default where the tokenizer has a chat template."""


@dataclass(frozen=True)
class ModelConfig:
    """The policy: a Hugging Face directory, or a fresh model of the given architecture."""

    path: str | None = None
    """Directory with config, safetensors and tokenizer files in Hugging Face format."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Fields of a transformers config, `model_type` among them, for a fresh policy; `vocab_size` is
    that of the tokenizer which it learns from the task's own text, 320 unless given."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda or cuda:N."""
    precision: Literal["float32", "autocast", "split", "stochastic"] = "float32"
    """float32; autocast: bfloat16 layers over float32 weights; split: bfloat16 weights with exact
    float32 masters in 2 more bytes; stochastic: bfloat16 weights that are rounded by chance."""
    lora: dict[str, Any] = field(default_factory=dict)
    """Fields of peft.LoraConfig, such as r, to train an adapter; none: all weights."""
    load_in_4bit: bool = False
    """Keep the weights below an adapter in 4 bits (NF4, bitsandbytes)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_offloading: bool = False
    """Keep what gradient checkpointing saves in the memory of the CPU."""
    mlp_chunk_size: CountOrZero = 0
    """Tokens that an MLP looks at together; fewer take less memory. 0: all of a pass."""
    use_liger_kernel: bool = False
    """RMSNorm, RoPE and SwiGLU of liger-kernel, where it is installed."""
    cast_lm_head_to_fp32: bool = False
    """Compute logits from float32 copies of the head's inputs, in sampling and training alike."""
    reference: Literal["auto", "copy", "cpu", "8bit", "4bit"] = "auto"
    """Where the reference policy is kept: auto is the adapter switched off, or else a copy; cpu
    brings it to the GPU layer by layer, 8bit and 4bit round it."""


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    num_generations: Count = 8
    """Completions a prompt gets (G); they share the prompt's forward pass in training."""
    max_prompt_length: Count = 512
    """Longest prompt in tokens; a longer one is an error, it is never cut."""
    max_completion_length: Count = 256
    """Longest completion in tokens, the end-of-sequence token included."""
    temperature: Positive = 1.0
    """Sampling temperature; log-probabilities are of softmax(logits / temperature)."""
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    """Sample from the smallest set of tokens with this much probability."""
    top_k: CountOrZero = 0
    """Sample from this many most likely tokens; 0 is all of them."""
    min_p: Fraction = 0.0
    """Drop tokens less likely than this fraction of the most likely one."""
    repetition_penalty: Positive = 1.0
    """Divides positive logits of tokens that prompt or completion has already; 1 is none."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a completion, with the token that completes them."""
    engine: str = "native"
    """What samples: native, generate or hf_cb, on the training weights; vllm or http, on others."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Options of the engine; kv_cache_gib of native is the most memory for keys and values. Of
    every engine: check_steps = n compares its log-probabilities with the trainer's every n steps;
    always before the first."""
    max_tokens_per_step: Count | None = None
    """Sample at most so many tokens a step; completions that this cuts go on in the next one."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The keys of the table `objective`; what is not given is the method's own choice."""

    reward_shaping: str | None = None
    """What becomes of the rewards before they are compared, see `fastrl methods`; none for none."""
    token_reward_shaping: str | None = None
    """What is added to the rewards of single tokens, see `fastrl methods`; none for nothing."""
    advantage: str | None = None
    """Advantage estimator, see `fastrl methods`."""
    selection: str | None = None
    """Which completions are trained on, see `fastrl methods`; none for all."""
    token_weights: str | None = None
    """How much each token counts, see `fastrl methods`; none for all alike."""
    surrogate: str | None = None
    """What is maximised per token or per completion, see `fastrl methods`."""
    rollout_correction: str | None = None
    """Weights for what the sampler's and the trainer's log-probabilities differ by; or none."""
    regulariser: str | None = None
    """Per-token penalty, see `fastrl methods`; k3 where only beta is given."""
    value_loss: str | None = None
    """How the value model learns, see `fastrl methods`; of methods that have one."""
    reference_update: str | None = None
    """How the reference follows the policy, see `fastrl methods`; none for not at all."""
    aggregation: str | None = None
    """How tokens are averaged over the optimizer step, see `fastrl methods`."""
    loss: str | None = None
    """A loss of pairs or groups of completions in place of advantage and surrogate."""
    pairing: str | None = None
    """Which completions of a prompt a loss of pairs compares, see `fastrl methods`."""
    scores_from: Literal["auto", "sampler", "policy"] | None = None
    """Whose entropies pick tokens: those the sampler recorded, which drops tokens before they are
    packed, or those of a forward pass of the policy; auto takes the first where they are equal."""
    parameters: dict[str, float | str] = field(default_factory=dict)
    """Hyper-parameters of the choices by name, or by axis.name where the name is not unique.
    Those of a selection or of token weights may follow a schedule, such as "linear 0.2 1"."""
    epsilon_low: Fraction | None = None
    """How far below 1 the ratio may fall before its gradient stops."""
    epsilon_high: NonNegative | None = None
    """How far above 1 the ratio may rise before its gradient stops."""
    beta: NonNegative | None = None
    """Weight of the regulariser; 0 keeps no reference policy in memory."""
    entropy_coef: NonNegative | None = None
    """Weight of the exact entropy bonus."""
    mask_truncated_completions: bool | None = None
    """Leave out completions that the length limit cut."""
    advantage_after_selection: bool | None = None
    """Form advantages from the kept completions alone, rather than from all of a prompt."""
    denominator: Literal["kept", "masked"] | None = None
    """Average over the tokens that token_weights keeps, or over all that are not masked."""
    dynamic_sampling: bool | None = None
    """Sample other prompts for those that the selection leaves out, until the step is full."""
    max_sampling_rounds: Count | None = None
    """With dynamic sampling: how often prompts are sampled at most before a step is trained."""
    max_pass_rate: Annotated[float, Range(0, 1, open_low=True)] | None = None
    """Never ask a prompt again once so many of its completions, of all so far, have passed."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    optimizer: str = "adamw"
    """adamw; adamw_8bit: moments in 8 bits; adamw_offload: on the CPU; bnb_adamw_8bit,
    bnb_paged_adamw_8bit, torchao_adamw_8bit, torchao_adamw_4bit: of these libraries."""
    in_backward: Literal["off", "two_phase", "previous_norm"] = "off"
    """Step each weight in the backward pass and free its gradient; clipped by the gradient's norm
    from a backward pass before it, or by that of the last step."""
    learning_rate: Positive = 1e-6
    """Peak step size."""
    lr_scheduler_type: str = "constant"
    """Shape after the warm-up, by transformers' names: linear and cosine fall to zero after the
    last step, cosine_with_min_lr does not."""
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the shape is told, such as min_lr."""
    warmup_steps: CountOrZero = 0
    """Steps over which the step size rises linearly from zero."""
    adam_beta1: Annotated[float, Range(0, 0.999999)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Range(0, 0.999999)] = 0.999
    """Decay of the second moment."""
    weight_decay: NonNegative = 0.0
    """Decoupled decay of matrices; vectors and embeddings of norms are left alone."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this global norm."""


@dataclass(frozen=True)
class CriticConfig:
    """The value model of PPO and its kin; other methods have none."""

    model: str = "head"
    """head: on the layers of the policy; lora: an adapter of its own on the same weights; or the
    directory of a model with the policy's vocabulary. Its step size is the policy's, unless
    objective.parameters.critic_learning_rate is given."""


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised steps on the task's own solutions before reinforcement learning."""

    steps: CountOrZero = 0
    """Optimizer steps; 0 for none."""
    batch_size: Count = 64
    """Solutions a step."""
    learning_rate: Positive = 1e-3
    """Peak step size, reached over a tenth of the steps, then falling as a cosine to zero."""


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation: sampled completions, scored like those of training."""

    eval_steps: CountOrZero = 0
    """Evaluate every so many steps; always before the first and after the last. 0: only those."""
    patience: CountOrZero = 0
    """Stop after so many evaluations in a row without a better pass@1; 0: never."""
    num_samples: Count = 4
    """Completions a held-out prompt gets; pass@k is given for the powers of two up to it."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 takes the most likely token."""
    pass_threshold: float = 1.0
    """The reward from which a completion counts as correct."""


@dataclass(frozen=True)
class SaveConfig:
    """What a run leaves on disk, and how often."""

    save_steps: CountOrZero = 0
    """Checkpoint every so many steps; 0: only at the end or when interrupted."""
    save_total_limit: Count = 2
    """Newest checkpoints kept."""
    completions_per_step: CountOrZero = 4
    """Completions written to completions.jsonl each step, with their rewards."""


@dataclass(frozen=True)
class Config:
    """One training run."""

    task: str = ""
    """What to learn: reasoning_gym:NAME (see `fastrl tasks`), jsonl:PATH or mixture."""
    task_args: dict[str, Any] = field(default_factory=dict)
    """Parameters of the task's generator; of a mixture, its `tasks` with their weights."""
    rewards: tuple[str, ...] = ("task",)
    """What scores a completion: task, math, exact, MODULE:FUNCTION or FILE.py:FUNCTION."""
    reward_weights: tuple[float, ...] | None = None
    """One factor a reward; by default 1 each."""
    reward_workers: CountOrZero = 2
    """Processes that score completions while others are sampled; 0 scores in this one, where a
    reward that hangs or crashes takes the run along."""
    reward_timeout: Positive = 30.0
    """Seconds a reward may take for one call; then it is stopped, counted, and gives no score."""
    method: str = "grpo"
    """Policy-optimisation method, see `fastrl methods`."""
    objective: dict[str, Any] = field(default_factory=dict)
    """What the method does otherwise than published; the keys are those of ObjectiveConfig."""
    values_dir: str = "runs/values"
    """Where estimates of prompts' optimal values are kept for A*-PO."""
    output_dir: str = "runs/run"
    """Where the run writes; must not already hold one, unless resumed or overwritten."""
    seed: CountOrZero = 0
    """Same seed, same bits."""
    max_steps: Count = 100
    """Rollout batches to train on."""
    prompts_per_step: Count = 8
    """Prompts a step (P); the step trains on P * num_generations completions."""
    num_iterations: Count = 1
    """Times that a step's completions are trained on."""
    num_mini_batches: Count = 1
    """Optimizer steps that each of these is cut into, by prompts."""
    max_tokens_per_pass: Count = 4096
    """Most packed tokens in one forward and backward pass; a prompt counts once for its group, and
    the head's row of a trained token as the part of a packed token that it keeps in memory."""
    workspace_mb: Positive = 256
    """MiB that a loss may take at the head beside what goes in and comes out; more is faster."""
    memory_limit: str | None = None
    """Most memory of the device that the run takes, such as "8GiB", or a card's name; a pass that
    meets it is halved and done again. `fastrl plan` tells before what will be needed."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
