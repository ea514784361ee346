"""What the project set out to reach, beside what was measured: every goal that is a number.

P prompt tokens, R completion tokens, G completions of a prompt; S tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple


class Goal(NamedTuple):
    """One number to reach: at most `most` or at least `least`.

    quantity: what measures it; "" where nothing does yet.
    held_by: what fails, or calls no row correct, where the goal is not reached.
    """

    area: str
    text: str
    most: float | None = None
    least: float | None = None
    unit: str = "x"
    quantity: str = ""
    held_by: str = ""
    on_gpu: bool = False


LOSS, SHARED, SPARSE = "Losses", "Shared prefixes", "Down-sampling"
ROLLOUTS, TRAINER = "Rollouts", "The trainer"
DROP_IN = "Inside TRL's trainers"

GOALS = (
    Goal(
        LOSS,
        "time of policy_loss against logits and autograd, S=2048",
        most=0.85,
        quantity="loss_against_naive",
    ),
    Goal(
        LOSS,
        "time of linear_logps, forward and backward, against the same",
        most=1.1,
        quantity="logps_against_naive",
    ),
    Goal(LOSS, "policy_loss against TRL's fused head: time", most=1, quantity="loss_against_trl"),
    Goal(LOSS, "and memory", most=1, quantity="loss_memory_against_trl"),
    Goal(
        LOSS,
        "policy_loss against Liger's chunked GRPO loss: time",
        most=1,
        quantity="loss_against_liger",
    ),
    Goal(LOSS, "and memory", most=1, quantity="loss_memory_against_liger"),
    Goal(
        LOSS,
        "memory beyond results, S=4096 V=65536, against workspace_mb",
        most=1.1,
        held_by="tests/kernels/test_peak_memory.py::test_peak_is_the_workspace_and_the_gradients",
    ),
    Goal(LOSS, "time of the slowest objective against PPO-clip", most=2, quantity="objectives"),
    Goal(
        LOSS,
        "kernels compiled for sm_80 to sm_120 that spill or do not fit",
        most=0,
        unit="",
        quantity="spilling_kernels",
    ),
    Goal(
        LOSS,
        "time against three bare products, S=16384 V=151936 D=1024 to 4096",
        most=1.10,
        quantity="gpu_loss",
        on_gpu=True,
    ),
    Goal(
        LOSS,
        "time of forward alone against one bare product",
        most=1.10,
        quantity="gpu_forward",
        on_gpu=True,
    ),
    Goal(
        LOSS,
        "time with a fifth of the tokens trained against all of them",
        most=1.15 * 2.8 / 6,
        quantity="gpu_sparse_loss",
        on_gpu=True,
    ),
    Goal(
        LOSS,
        "extra memory (workspace_mb)",
        most=256,
        unit="MiB",
        quantity="gpu_loss_extra",
        on_gpu=True,
    ),
    Goal(
        LOSS,
        "speed against the best of Liger's and TRL's heads",
        least=1.35,
        quantity="gpu_loss_peers",
        on_gpu=True,
    ),
    Goal(
        LOSS,
        "extra memory against the best of them",
        most=0.5,
        quantity="gpu_loss_peers_extra",
        on_gpu=True,
    ),
    Goal(LOSS, "speed against verl's Triton head", least=2.5, on_gpu=True),
    Goal(
        LOSS,
        "time on logits of 8192 x 151936 against reading them once",
        most=1.15,
        quantity="gpu_logits",
        on_gpu=True,
    ),
    Goal(
        SHARED,
        "speed of the layers against padded rows, P=1024 R=64 G=16",
        least=7.2,
        quantity="shared_trunk",
    ),
    Goal(
        SHARED, "the same against one row per sequence", least=7.2, quantity="shared_trunk_of_rows"
    ),
    Goal(
        SHARED, "speed of a whole update against padded rows", least=5.6, quantity="shared_update"
    ),
    Goal(
        SHARED, "the same against one row per sequence", least=5.6, quantity="shared_update_of_rows"
    ),
    Goal(SHARED, "peak memory against padded rows, worst shape", most=1, quantity="shared_memory"),
    Goal(SHARED, "the same against one row per sequence", most=1, quantity="shared_memory_of_rows"),
    Goal(
        SHARED,
        "speed where nothing is shared against padded rows",
        least=0.98,
        quantity="nothing_shared",
    ),
    Goal(SHARED, "the same against packed rows", least=0.98, quantity="nothing_shared_packed"),
    Goal(SHARED, "time of a plan of 64k tokens", most=20, unit="ms", quantity="plans"),
    Goal(
        SHARED,
        "speed of attention forward by visible pair, against varlen flash",
        least=0.9,
        quantity="gpu_attention",
        on_gpu=True,
    ),
    Goal(
        SHARED,
        "time of its backward against the ideal makespan, P=512 to 8192",
        most=1.15,
        on_gpu=True,
    ),
    Goal(
        SHARED,
        "time against FlexAttention and PrefixGrouper, worst shape",
        most=1,
        quantity="gpu_attention_peers",
        on_gpu=True,
    ),
    Goal(
        SHARED,
        "speed of an update of 1.5B against the ratio of operations",
        least=0.85,
        on_gpu=True,
    ),
    Goal(
        SHARED, "time of a plan of 64k tokens", most=1, unit="ms", quantity="gpu_plans", on_gpu=True
    ),
    Goal(
        SPARSE,
        "time of the head with a fifth of the tokens against masking",
        most=0.65,
        quantity="sparse_head",
    ),
    Goal(
        SPARSE,
        "time of an update, 8 of 16 and a fifth of their tokens, against masking",
        most=0.5,
        quantity="sparse_update",
    ),
    Goal(SPARSE, "selecting, of an update's time", most=2, unit="%", quantity="selecting"),
    Goal(
        SPARSE,
        "time of the head with a fifth of the tokens against all of them",
        most=0.5,
        quantity="gpu_sparse_loss",
        on_gpu=True,
    ),
    Goal(
        SPARSE,
        "time of selecting among a million tokens",
        most=0.2,
        unit="ms",
        quantity="gpu_selection",
        on_gpu=True,
    ),
    Goal(
        ROLLOUTS,
        "speed against transformers' generate, worst case",
        least=1.5,
        quantity="rollout_against_generate",
    ),
    Goal(
        ROLLOUTS,
        "speed against its continuous batching, worst case",
        least=1.5,
        quantity="rollout_against_batching",
    ),
    Goal(
        ROLLOUTS,
        "memory of keys and values against generate, P=512 R=128 G=8",
        most=0.5,
        quantity="keys_and_values",
    ),
    Goal(
        ROLLOUTS,
        "speed of a whole GRPO step of the demo against TRL",
        least=2,
        quantity="demo_step",
    ),
    Goal(ROLLOUTS, "tokens per second against vLLM, batch 64, 1.5B to 4B", least=0.8, on_gpu=True),
    Goal(ROLLOUTS, "memory against vLLM", most=0.3, on_gpu=True),
    Goal(ROLLOUTS, "tokens per second against vLLM with LoRA", least=1, on_gpu=True),
    Goal(
        ROLLOUTS,
        "time of decode attention against reading its keys and values once",
        most=1.3,
        quantity="gpu_decode",
        on_gpu=True,
    ),
    Goal(TRAINER, "update against TRL's, P=512 R=128 G=8: time", most=0.40, quantity="update_time"),
    Goal(TRAINER, "and memory", most=0.45, quantity="update_memory"),
    Goal(
        TRAINER,
        "update against TRL's, P=1024 R=64 G=16: time",
        most=0.20,
        quantity="long_update_time",
    ),
    Goal(TRAINER, "and memory", most=0.25, quantity="long_update_memory"),
    Goal(
        DROP_IN,
        "update of TRL's trainer with it against without, P=512 R=128 G=8: time",
        most=0.5,
        quantity="drop_in_time",
    ),
    Goal(DROP_IN, "and memory", most=0.5, quantity="drop_in_memory"),
    Goal(DROP_IN, "speed of an update of 1.5B, 2k + 1k tokens, G = 8", least=1.5, on_gpu=True),
    Goal(DROP_IN, "and peak memory", most=0.7, on_gpu=True),
    Goal(
        TRAINER,
        "step of A*-PO against GRPO's, G = 8: time",
        most=0.5,
        quantity="astar_time_of_grpo",
    ),
    Goal(TRAINER, "and memory", most=0.7, quantity="astar_memory_of_grpo"),
    Goal(
        TRAINER,
        "step of A*-PO against PPO's with a value model: time",
        most=0.5,
        quantity="astar_time_of_ppo",
    ),
    Goal(TRAINER, "and memory", most=0.7, quantity="astar_memory_of_ppo"),
    Goal(
        TRAINER,
        "pass@1 that GRPO gains on the demo, worst of three seeds",
        least=0.3,
        unit="",
        quantity="demo_gain",
    ),
    Goal(TRAINER, "the same of PPO", least=0.3, unit="", quantity="demo_ppo_gain"),
    Goal(TRAINER, "the same of A*-PO", least=0.3, unit="", quantity="demo_astar_po_gain"),
    Goal(
        TRAINER,
        "losses of five steps against TRL's, relative difference",
        most=1e-5,
        unit="",
        held_by="benchmarks/bench_trainer.py::largest_difference",
    ),
    Goal(
        TRAINER,
        "bytes a parameter of full fine-tuning, activations aside",
        most=8,
        unit="",
        quantity="bytes_a_parameter",
        held_by="tests/test_optim_memory.py::"
        "test_a_step_takes_what_is_held_one_gradient_and_little_more",
    ),
    Goal(
        TRAINER,
        "planned peak against the measured one, highest of all configurations",
        most=1.05,
        quantity="plan_over",
    ),
    Goal(TRAINER, "and the lowest of them", least=0.98, quantity="plan_under"),
    Goal(
        TRAINER,
        "GiB of 7B, NF4 and LoRA, G = 8, 1k prompt, 4k completions",
        most=16,
        unit="",
        on_gpu=True,
    ),
    Goal(TRAINER, "GiB of 1.5B, full fine-tuning, 8k tokens", most=16, unit="", on_gpu=True),
    Goal(TRAINER, "GiB of 0.5B, full fine-tuning", most=8, unit="", on_gpu=True),
    Goal(
        TRAINER,
        "model FLOP utilisation of an update of 1.5B on an H200",
        least=50,
        unit="%",
        on_gpu=True,
    ),
)
