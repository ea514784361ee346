"""Numbers that pages and goals speak of, each by name: from which rows, and how.

Documents quote one as `<!-- measured:NAME -->0.13x`, and report_results.py writes the number.

P prompt tokens, R completion tokens, G completions of a prompt; S tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from committed import Row
from measures import (
    MEMORY,
    MIB,
    Measured,
    against,
    against_best,
    bytes_a_parameter,
    case_of_case,
    fastest,
    gain,
    inverse,
    kept_keys_and_values,
    longest_context,
    most,
    not_sharing,
    of_floor,
    over_objectives,
    part_of_best,
    per_pair,
    plan_error,
    selecting,
    slowest_plan,
    spilling,
    worst,
    worst_against,
)


class Quantity(NamedTuple):
    """file: its name without ".json"; unit: "x", "%", "ms", "MiB", "bytes", "" (a count)."""

    file: str
    unit: str
    measure: Callable[[list[Row]], Measured]


HEAD = "policy_loss S=2048 V=65536 D=256 float32"
LONG = "prompts=1 P=1024 R=64 G=16 float32"
GROUP = "prompts=1 P=512 R=128 G=8 float32"
DROP_IN = f"update dapo, {GROUP}"
OF_METHODS = "step prompts=2 P=128 R=64 float32"
SHARED = "fastrl shared prefix"
LOSS = "fastrl policy_loss"
BIG = tuple(f"S=16384 V=151936 D={D}" for D in (1024, 2048, 4096))  # and on a GPU
EXTRA = "beyond_gradients_bytes"
GPU = "gpu_suite"

QUANTITIES: dict[str, Quantity] = {
    "loss_against_naive": Quantity("policy_loss", "x", against(HEAD, LOSS, "naive")),
    "loss_against_trl": Quantity("policy_loss", "x", against(HEAD, LOSS, "trl")),
    "loss_against_liger": Quantity("policy_loss", "x", against(HEAD, LOSS, "liger chunked grpo")),
    "loss_memory_against_trl": Quantity("policy_loss", "x", against(HEAD, LOSS, "trl", MEMORY)),
    "loss_memory_against_liger": Quantity(
        "policy_loss", "x", against(HEAD, LOSS, "liger chunked grpo", MEMORY)
    ),
    "logps_against_naive": Quantity(
        "policy_loss", "x",
        against("linear_logps S=2048 V=65536 D=256 float32", "fastrl linear_logps", "naive"),
    ),
    "objectives": Quantity("objectives", "x", over_objectives),
    "spilling_kernels": Quantity("kernel_resources", "", spilling),
    "shared_trunk": Quantity(
        "shared_prefix", "x", inverse(against(f"trunk {LONG}", SHARED, "padded rows"))
    ),
    "shared_trunk_of_rows": Quantity(
        "shared_prefix", "x", inverse(against(f"trunk {LONG}", SHARED, "one row per sequence"))
    ),
    "shared_update": Quantity(
        "shared_prefix", "x", inverse(against(f"update {LONG}", SHARED, "padded rows"))
    ),
    "shared_update_of_rows": Quantity(
        "shared_prefix", "x", inverse(against(f"update {LONG}", SHARED, "one row per sequence"))
    ),
    "shared_memory": Quantity(
        "shared_prefix", "x", worst_against("update", SHARED, "padded rows", MEMORY)
    ),
    "shared_memory_of_rows": Quantity(
        "shared_prefix", "x", worst_against("update", SHARED, "one row per sequence", MEMORY)
    ),
    "nothing_shared": Quantity("shared_prefix", "x", not_sharing("padded rows")),
    "nothing_shared_packed": Quantity("shared_prefix", "x", not_sharing("packed rows")),
    "plans": Quantity("plans", "ms", slowest_plan),
    "sparse_head": Quantity(
        "down_sampling", "x", worst_against("head", "fastrl scores from the policy", "masking")
    ),
    "sparse_update": Quantity(
        "down_sampling", "x", worst_against("update", "fastrl scores from the policy", "masking")
    ),
    "selecting": Quantity("down_sampling", "%", selecting),
    "rollout_against_generate": Quantity(
        "rollout", "x", inverse(worst_against("prompts=", "fastrl native", "transformers generate"))
    ),
    "rollout_against_batching": Quantity(
        "rollout", "x",
        inverse(worst_against("prompts=", "fastrl native", "transformers continuous batching")),
    ),
    "keys_and_values": Quantity("rollout", "x", kept_keys_and_values),
    "demo_step": Quantity(
        "step", "x",
        inverse(worst_against("GRPO step of the demo", "fastrl step", "TRL GRPOTrainer")),
    ),
    "update_time": Quantity("trainer", "x", against_best(f"update {GROUP}", "fastrl", "TRL")),
    "update_memory": Quantity(
        "trainer", "x", against_best(f"update {GROUP}", "fastrl", "TRL", MEMORY)
    ),
    "long_update_time": Quantity("trainer", "x", against_best(f"update {LONG}", "fastrl", "TRL")),
    "long_update_memory": Quantity(
        "trainer", "x", against_best(f"update {LONG}", "fastrl", "TRL", MEMORY)
    ),
    "drop_in_time": Quantity("drop_in", "x", against(DROP_IN, "fastrl in TRL", "TRL")),
    "drop_in_memory": Quantity("drop_in", "x", against(DROP_IN, "fastrl in TRL", "TRL", MEMORY)),
    "plan_over": Quantity("memory_plan", "x", plan_error(max)),
    "plan_under": Quantity("memory_plan", "x", plan_error(min)),
    "longest_context": Quantity("frontier", "", longest_context(512, "fastrl, recomputing")),
    "longest_context_of_trl": Quantity(
        "frontier", "", longest_context(512, "TRL GRPOTrainer, recomputing")
    ),
    "astar_time_of_grpo": Quantity(
        "methods", "x", against(OF_METHODS, "fastrl A*-PO, G=1", "fastrl GRPO, G=8")
    ),
    "astar_memory_of_grpo": Quantity(
        "methods", "x", against(OF_METHODS, "fastrl A*-PO, G=1", "fastrl GRPO, G=8", MEMORY)
    ),
    "astar_time_of_ppo": Quantity(
        "methods", "x", against(OF_METHODS, "fastrl A*-PO, G=1", "fastrl PPO, value model, G=8")
    ),
    "astar_memory_of_ppo": Quantity(
        "methods", "x",
        against(OF_METHODS, "fastrl A*-PO, G=1", "fastrl PPO, value model, G=8", MEMORY),
    ),
    "bytes_a_parameter": Quantity("optimizer", "", bytes_a_parameter),
    "demo_gain": Quantity("demo", "", gain),
    "demo_ppo_gain": Quantity("demo_ppo", "", gain),
    "demo_astar_po_gain": Quantity("demo_astar_po", "", gain),
    "gpu_plans": Quantity(GPU, "ms", slowest_plan),
    "gpu_loss": Quantity(GPU, "x", of_floor(*(f"policy_loss {size}" for size in BIG))),
    "gpu_forward": Quantity(GPU, "x", of_floor(*(f"forward {size}" for size in BIG))),
    "gpu_sparse_loss": Quantity(
        GPU, "x", case_of_case(f"policy_loss rho=0.2 {BIG[1]}", f"policy_loss {BIG[1]}", LOSS)
    ),
    "gpu_loss_extra": Quantity(GPU, "MiB", most(f"policy_loss {BIG[1]}", LOSS, EXTRA, MIB)),
    "gpu_loss_peers": Quantity(
        GPU, "x",
        inverse(worst(*(part_of_best(f"policy_loss {x}", LOSS, ("liger", "trl")) for x in BIG))),
    ),
    "gpu_loss_peers_extra": Quantity(
        GPU, "x",
        worst(*(part_of_best(f"policy_loss {x}", LOSS, ("liger", "trl"), EXTRA) for x in BIG)),
    ),
    "gpu_logits": Quantity(GPU, "x", of_floor("selected_forward S=8192 V=151936")),
    "gpu_attention": Quantity(
        GPU, "x",
        per_pair(
            "attention_forward P=2048 R=512 G=16", "fastrl segment_attention",
            "varlen flash, repeated rows",
        ),
    ),
    "gpu_attention_peers": Quantity(
        GPU, "x",
        worst(*(
            part_of_best(f"attention P={P}", "fastrl", ("flex", "prefix_grouper"))
            for P in (512, 2048, 8192)
        )),
    ),
    "gpu_selection": Quantity(GPU, "ms", fastest("select_tokens ratio=0.2 B=1 C=1048576")),
    "gpu_decode": Quantity(
        GPU, "x", of_floor(*(f"decode_attention P=8 G={G}" for G in (8, 16)))
    ),
}  # fmt: skip
