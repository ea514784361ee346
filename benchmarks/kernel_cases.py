"""Every kernel as it is launched on a GPU: half precision and float32, plain and with all.

For kernel_resources.py, which compiles them.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

TRITON_DTYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


ODD_VOCABULARY = ("num_columns", "gradients_stride", "logits_stride")


class Case(NamedTuple):
    """One kernel in one configuration."""

    name: str
    kernel: str  # "module:attribute"
    constants: dict[str, Any]  # functions as "module:attribute"
    pointers: dict[str, str]  # of those that are not float32
    absent: tuple[str, ...] = ()  # pointers that are None
    parameters: tuple[str, ...] = ()  # of an objective
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None  # registers of a thread, None for the assembler's choice
    odd: tuple[str, ...] = ()  # sizes and strides that are no multiples of 16


def cases(column: str) -> list[Case]:
    """Every kernel as it is launched on a GPU: half precision and float32, plain and with all.

    column: of the tables of tiles, `launch.column_of` of the GPU.
    """
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        found += _head_cases(dtype, column) + _product_cases(dtype, column)
        found += odd_cases(_head_cases(dtype, column) + _product_cases(dtype, column, is_odd=True))
        found += _row_cases(dtype)
        found += _attention_cases(dtype, column) + _decode_cases(dtype) + _selection_cases(dtype)
    return found + _shared_cases() + _optimizer_cases()


def odd_cases(found: list[Case]) -> list[Case]:
    """The same for a vocabulary that is no multiple of 16."""
    return [
        case._replace(name=case.name.replace(")", ", odd vocabulary)"), odd=ODD_VOCABULARY)
        for case in found
        if "adapt" not in case.name
    ]


def head_tiles(dtype: torch.dtype, column: str) -> Any:
    """As in `launch`, for a column."""
    from fastrl_kernels.launch import HALF_TILES, WIDE_TILES
    from fastrl_kernels.products import HALF

    return HALF_TILES[column] if dtype in HALF else WIDE_TILES


def _head_cases(dtype: torch.dtype, column: str) -> list[Case]:
    name, found, all_tiles = TRITON_DTYPE[dtype], [], head_tiles(dtype, column)
    for has_all in (False, True):
        blocks = all_tiles.logits_with_extras if has_all else all_tiles.logits
        tiles = {"BLOCK_M": blocks.rows, "BLOCK_V": blocks.columns, "BLOCK_D": blocks.depth}
        flags = dict.fromkeys(("HAS_BIAS", "HAS_LORA", "HAS_SOFTCAP"), has_all)
        absent = () if has_all else ("bias_ptr", "low_rank_ptr", "lora_b_ptr")
        constants = {**flags, **tiles, "BLOCK_R": 16, "UPCAST": False}
        pointers = dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr", "lora_b_ptr"), f"*{name}")
        what = f"{name}{', bias, adapter, softcap' if has_all else ''}"
        for stores in (False, True):
            found.append(
                Case(
                    f"logits ({what}{', stored' if stores else ''})",
                    "fastrl_kernels.linear_logps.kernel:logits_kernel",
                    {**constants, "STORE": stores}, pointers,
                    absent if stores else (*absent, "logits_ptr"), **blocks.threads,
                )
            )  # fmt: skip
        found.append(
            Case(
                f"slice gradients ({what})",
                "fastrl_kernels.linear_logps.kernel:slice_gradients_kernel", constants,
                {**pointers, "gradients_ptr": f"*{name}"}, absent, **blocks.threads,
            )
        )  # fmt: skip
    return found


def _product_cases(dtype: torch.dtype, column: str, is_odd: bool = False) -> list[Case]:
    from fastrl_kernels.launch import hidden_blocks

    module, name = "fastrl_kernels.gathered_products", TRITON_DTYPE[dtype]
    _, _, blocks, others = head_tiles(dtype, column)
    blocks = hidden_blocks(dtype, torch.device("cpu"), 17) if is_odd else blocks
    operands = dict.fromkeys(("gradients_ptr", "weight_ptr", "rows_ptr"), f"*{name}")
    hidden = {
        "ACCUMULATE": True, "BLOCK_M": blocks.rows, "BLOCK_N": blocks.columns,
        "BLOCK_V": blocks.depth, "UPCAST": False,
    }  # fmt: skip
    weight = {
        "ACCUMULATE": True, "BY_TOKEN": True, "BLOCK_V": others.rows, "BLOCK_N": others.columns,
        "BLOCK_M": others.depth, "UPCAST": False,
    }  # fmt: skip
    found = [
        Case(
            f"hidden gradients ({name})", f"{module}:hidden_gradients_kernel", hidden, operands,
            **blocks.threads,
        ),
        Case(
            f"weight gradients ({name})", f"{module}:weight_gradients_kernel", weight, operands,
            **others.threads,
        ),
        Case(
            f"column sums ({name})", f"{module}:column_sums_kernel",
            {"BLOCK_V": 128, "BLOCK_M": 16}, operands,
        ),
    ]  # fmt: skip
    if dtype != torch.float32:
        # The adapter's first half: hidden states of all tokens, found by 64-bit row numbers.
        adapted = {**hidden, "ACCUMULATE": False}
        found.append(
            Case(
                f"adapted rows ({name})", f"{module}:hidden_gradients_kernel", adapted,
                {**operands, "slots_ptr": "*i64"}, **blocks.threads,
            )
        )  # fmt: skip
        wide = head_tiles(torch.float32, column).weight_gradients
        adapter = {
            **weight, "BY_TOKEN": False, "BLOCK_V": wide.rows, "BLOCK_N": wide.columns,
            "BLOCK_M": wide.depth,
        }  # fmt: skip
        found.append(
            Case(
                f"adapter gradients ({name})", f"{module}:weight_gradients_kernel", adapter,
                {"gradients_ptr": f"*{name}"}, ("row_ids_ptr",), **wide.threads,
            )
        )  # fmt: skip
    return found


def _row_cases(dtype: torch.dtype) -> list[Case]:
    from fastrl_kernels.launch import row_block

    name, row = TRITON_DTYPE[dtype], row_block()
    warps, block = row["num_warps"], row["BLOCK_V"]
    stored = {"BY_SLOT": True, "REWRITE": True, "HAS_BIAS": True, "HAS_SOFTCAP": True}
    found = []
    for has_all in (False, True):
        fix_up = {
            **objective(has_all), "HAS_OLD": has_all, "HAS_REF": has_all, "HAS_ROLLOUT": has_all,
            "HAS_SOFTCAP": has_all, "GRADIENTS": True,
            "DENSE": has_all, "IS_RAW": has_all, "BLOCK_SPLITS": 128, "BLOCK_V": block,
        }  # fmt: skip
        absent = () if has_all else ("old_logps_ptr", "ref_logps_ptr", "rollout_weights_ptr")
        found.append(
            Case(
                f"fix-up ({name}{', everything' if has_all else ''})",
                "fastrl_kernels.policy_loss.kernel:fix_up_kernel", fix_up,
                {"gradients_ptr": f"*{name}"}, absent, parameters(has_all), num_warps=warps,
            )
        )  # fmt: skip
    if dtype != torch.float32:
        found.append(
            Case(
                "gradients (fp16)", "fastrl_kernels.policy_loss.kernel:gradients_kernel",
                {"HAS_SOFTCAP": True, "BLOCK_V": block}, {"gradients_ptr": "*fp16"},
                num_warps=warps,
            )
        )  # fmt: skip
    module = "fastrl_kernels.selected_logps.kernel"
    found.append(
        Case(
            f"stored gradients ({name})", f"{module}:stored_gradients_kernel", {"BLOCK_V": block},
            {"logits_ptr": f"*{name}", "out_ptr": f"*{name}"}, num_warps=warps,
        )
    )  # fmt: skip
    plain = {**dict.fromkeys(stored, False), "BLOCK_V": block}
    found.append(
        Case(
            f"stored logits ({name})", f"{module}:stored_logits_kernel", plain,
            {"logits_ptr": f"*{name}"}, ("bias_ptr",), num_warps=warps,
        )
    )  # fmt: skip
    if dtype == torch.float32:
        found.append(
            Case(
                "stored logits (fp32, bias, softcap)", f"{module}:stored_logits_kernel",
                {**stored, "BLOCK_V": block}, {"bias_ptr": "*bf16"}, num_warps=warps,
            )
        )  # fmt: skip
    return found


def _attention_cases(dtype: torch.dtype, column: str) -> list[Case]:
    from fastrl_kernels.products import HALF
    from fastrl_kernels.segment_attention.launch import HALF_TILINGS, WIDE_TILINGS

    tilings = HALF_TILINGS[column] if dtype in HALF else WIDE_TILINGS
    name, module = TRITON_DTYPE[dtype], "fastrl_kernels.segment_attention"
    tables = ("paths_ptr", "query_tiles_ptr", "key_units_ptr", "key_splits_ptr", "positions_ptr")
    tensors = ("q_ptr", "k_ptr", "v_ptr", "sinks_ptr", "out_ptr", "grad_ptr")
    pointers = {
        **dict.fromkeys(tables, "*i32"),
        **dict.fromkeys((*tensors, "dq_ptr", "dk_ptr", "dv_ptr"), f"*{name}"),
    }
    found = []
    for (size, tiling), has_all in itertools.product(tilings.items(), (False, True)):
        constants = {
            "HAS_SOFTCAP": has_all, "HAS_WINDOW": has_all, "HEAD_SIZE": size, "VALUE_SIZE": size,
            "BLOCK_K": size, "BLOCK_V": size, "UPCAST": False,
        }  # fmt: skip
        what = f"{name}, {size}{', window, softcap' if has_all else ''}"
        found += [
            Case(
                f"attention ({what}{', sinks' if has_all else ''})",
                f"{module}.kernel:forward_kernel",
                {**constants, "HAS_SINKS": has_all, **tiling.forward.blocks}, pointers,
                () if has_all else ("sinks_ptr",), **tiling.forward.threads,
            ),
            Case(
                f"attention's query gradients ({what})",
                f"{module}.backward_kernel:query_gradients_kernel",
                {**constants, **tiling.query_gradients.blocks}, pointers,
                **tiling.query_gradients.threads,
            ),
            Case(
                f"attention's key gradients ({what})",
                f"{module}.backward_kernel:key_gradients_kernel",
                {**constants, **tiling.key_gradients.blocks}, pointers,
                **tiling.key_gradients.threads,
            ),
        ]  # fmt: skip
    size, tiling = max(tilings.items())
    found += [
        Case(
            f"attention's deltas ({name})", f"{module}.backward_kernel:deltas_kernel",
            {"VALUE_SIZE": size, "BLOCK_V": size, "BLOCK_M": 4}, pointers,
        ),
        Case(
            f"attention's sums of units ({name})", f"{module}.backward_kernel:sum_units_kernel",
            {"SIZE": size, "BLOCK": size, "BLOCK_N": tiling.key_gradients.keys}, pointers,
        ),
    ]  # fmt: skip
    return found


def _decode_cases(dtype: torch.dtype) -> list[Case]:
    from fastrl_kernels.decode_attention import launch
    from fastrl_kernels.products import HALF

    name, module = TRITON_DTYPE[dtype], "fastrl_kernels.decode_attention.kernel"
    tables = ("row_groups_ptr", "tiles_ptr", "prefix_lengths_ptr", "suffix_length_ptr")
    pointers = dict.fromkeys(tables, "*i32")
    pointers |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "sinks_ptr", "out_ptr"), f"*{name}")
    found = []
    tiles = launch.HALF_TILES if dtype in HALF else launch.WIDE_TILES
    for (size, tile), has_all in itertools.product(tiles.items(), (False, True)):
        sizes = {"HEAD_SIZE": size, "VALUE_SIZE": size, "BLOCK_K": size, "BLOCK_V": size}
        shapes = {(True, min(tile.queries, queries)) for queries in (16, 32, 64)}
        for is_prefix, queries in sorted(shapes | {(False, 16), (False, tile.queries)}):
            constants = {
                **sizes, "IS_PREFIX": is_prefix, "HAS_SOFTCAP": has_all, "HAS_WINDOW": has_all,
                "BLOCK_M": queries, "BLOCK_N": tile.columns, "SPLIT": launch.SPLIT,
                "UPCAST": False,
            }  # fmt: skip
            what = f"{'prefix' if is_prefix else 'suffix'}, {name}, {size}, {queries} queries"
            found.append(
                Case(
                    f"decode attention ({what}{', window, softcap' if has_all else ''})",
                    f"{module}:parts_kernel", constants, pointers,
                    () if has_all else ("suffix_length_ptr",), **tile.threads(queries),
                )
            )  # fmt: skip
    found.append(
        Case(
            f"decode attention's merge ({name})", f"{module}:merge_kernel",
            {"HAS_SINKS": True, "VALUE_SIZE": 256, "BLOCK_V": 256, "BLOCK_M": launch.MERGED},
            pointers,
        )
    )  # fmt: skip
    if dtype == torch.float32:
        constants = {"BLOCK_M": 32, "BLOCK": launch.GROUP_BLOCK}
        found.append(
            Case("decode attention's tiles", f"{module}:tiles_kernel", constants, pointers)
        )
    return found


def _selection_cases(dtype: torch.dtype) -> list[Case]:
    from fastrl_kernels.token_selection.op import BLOCK, MAX_PROGRAMS, NUM_WARPS

    name, module = TRITON_DTYPE[dtype], "fastrl_kernels.token_selection.kernel"
    pointers = {
        "scores_ptr": f"*{name}", "mask_ptr": "*i1", "kept_ptr": "*i1", "bounds_ptr": "*i64",
        "ratio_ptr": "*fp64", "counts_ptr": "*i32", "state_ptr": "*i32",
    }  # fmt: skip
    found = []
    for has_all in (False, True):
        what = f"{name}{', mask, ratio' if has_all else ''}"
        constants = {"HAS_MASK": has_all, "HAS_RATIO": has_all, "BLOCK": BLOCK}
        absent = () if has_all else ("mask_ptr", "ratio_ptr")
        found += [
            Case(
                f"counts of digits ({what})", f"{module}:count_digits_kernel", constants, pointers,
                absent, num_warps=NUM_WARPS,
            ),
            Case(
                f"kept tokens ({what})", f"{module}:keep_kernel",
                {**constants, "MAX_PROGRAMS": MAX_PROGRAMS}, pointers, absent, num_warps=NUM_WARPS,
            ),
        ]  # fmt: skip
    return found


def objective(has_all: bool) -> dict[str, Any]:
    """PPO-clip; with two penalties, and with bounds and coefficients for each token."""
    regularisers = ("fastrl_kernels.objectives:k3", "fastrl_kernels.objectives:k2")
    return {
        "SURROGATE": "fastrl_kernels.objectives:clipped_ratio",
        "REGULARISERS": regularisers if has_all else (),
        "INPUTS": (0, 0) if has_all else (),
        "STRIDES": (1, 1, -1, 0, -1) if has_all else (-1, -1, -1),
        "OFFSETS": (2, 3, 4) if has_all else (2,),
    }


def parameters(has_all: bool) -> tuple[str, ...]:
    """Types of what `objective` takes, and of the weight of the entropy."""
    return ("*fp32", "*fp32", "fp32", "*fp32", "fp32") if has_all else ("fp32",) * 3


def _shared_cases() -> list[Case]:
    from fastrl_kernels.token_loss.op import BLOCK, NUM_SUMS, NUM_WARPS

    return [
        Case(
            "statistics", "fastrl_kernels.linear_logps.kernel:statistics_kernel",
            {"BLOCK_SPLITS": 128}, {},
        ),
        Case(
            "active slots", "fastrl_kernels.gathered_products:active_slots_kernel",
            {"HAS_ENTROPY": True, "BLOCK": 4096}, {},
        ),
        Case(
            "token loss", "fastrl_kernels.token_loss.kernel:token_losses_kernel",
            {
                **objective(True), "HAS_OLD": True, "HAS_REF": True, "HAS_ROLLOUT": True,
                "BLOCK": BLOCK, "NUM_SUMS": NUM_SUMS,
            },
            {}, parameters=parameters(True), num_warps=NUM_WARPS,
        ),
    ]  # fmt: skip


def _optimizer_cases() -> list[Case]:
    from fastrl_kernels.adamw.kernel import NUM_WARPS, constants

    found = []
    for kept, in_8bit in itertools.product(("float32", "split", "stochastic"), (False, True)):
        is_half = kept != "float32"
        half = dict.fromkeys(("weights_ptr", "gradients_ptr", "remainders_ptr"), "*i16")
        coded = {"first_ptr": "*i8", "second_ptr": "*u8"}
        found.append(
            Case(
                f"AdamW ({kept} weights, {'8 bits' if in_8bit else 'float32'})",
                "fastrl_kernels.adamw.kernel:adamw_kernel",
                constants(kept=kept, half_gradients=is_half, in_8bit=in_8bit),
                {**(half if is_half else {}), **(coded if in_8bit else {})},
                (
                    *(() if kept == "split" else ("remainders_ptr",)),
                    *(() if in_8bit else ("first_scales_ptr", "second_scales_ptr")),
                ),
                num_warps=NUM_WARPS,
            )
        )
    return found
