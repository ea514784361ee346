"""What tune.py tries: groups of launch settings, and the case each is timed at.

The tasks stand in the order of the gain that benchmarks/TUNING.md predicts. A candidate is a label
and the settings that it changes; all of a group, today's included, are within a factor of two or
four. Tiles are those of the GPU's column; what cannot fit is left out before it is compiled.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import attention_cases
import cases
import decode_cases
import logits_cases
import loss_cases
import optimizer_cases
import selection_cases
import torch
from attention_cases import AttentionCase, Group
from cases import Case, Prepared
from decode_cases import Batch, DecodeCase
from implementations import LOGPS, MIN_MEMORY, POLICY, fastrl_variants, policy_loaders
from inputs import Shape
from loss_cases import LossCase
from optimizer_cases import AdamWCase, Elements
from selection_cases import SelectionCase, Tokens
from tune_settings import Settings, current

from fastrl_kernels.launch import column_of

SHARED_BYTES = {"large": 227 * 1024, "small": 99 * 1024}  # of a block
ACCUMULATORS = 128  # registers of a thread for sums: with more, nothing is left to work with
BF16 = torch.bfloat16
LOGITS_TILES = (
    (128, 256, 64, 8, 3), (64, 128, 64, 4, 3), (128, 64, 32, 8, 4), (64, 256, 64, 8, 3),
    (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 8, 4), (128, 128, 64, 8, 4),
)  # fmt: skip
PRODUCT_TILES = (
    (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3),
    (128, 256, 32, 8, 4), (128, 128, 64, 8, 4), (128, 128, 128, 8, 3), (128, 256, 64, 8, 3),
)  # fmt: skip


class Task(NamedTuple):
    """A group of settings and where it is timed."""

    name: str
    case: Any
    prepare: Callable[..., Prepared]
    implementation: str
    candidates: Callable[[], dict[str, Settings]]


def tasks(tiny: bool) -> list[Task]:
    """On a GPU at the suite's shapes; tiny: in the interpreter at small ones."""
    device = "cpu" if tiny else "cuda"
    head = Shape(*((16, 96, 32) if tiny else (16384, 151936, 2048)), BF16, device)
    logits = Shape(*((16, 96) if tiny else (8192, 151936)), 0, BF16, device)
    heads = (2, 1, 16) if tiny else (16, 8, 128)
    group = Group(*((12, 5, 2) if tiny else (2048, 512, 16)), *heads, BF16, device)
    batch = Batch(*((1, 2, 6, 4) if tiny else (8, 16, 2048, 512)), *heads, BF16, device)
    scores = Tokens(*((1, 128) if tiny else (1, 2**20)), device)
    gather = f"{POLICY} one_pass gather 4GiB"
    cublas = f"{POLICY} one_pass cublas 4GiB"
    launch = "fastrl_kernels.launch"
    column = column_of(torch.device(device))
    loss, rows = "fastrl_kernels.policy_loss.launch", "fastrl_kernels.linear_logps"
    selection = "fastrl_kernels.token_selection.op"
    attention = "fastrl_kernels.segment_attention.launch"
    decode = "fastrl_kernels.decode_attention.launch"
    tokens = "fastrl_kernels.token_loss.op"
    losses = LossCase("peers", loss_cases.Tokens(700 if tiny else 2**20, device))
    adamw = "fastrl_kernels.adamw.kernel"
    elements = Elements(2000 if tiny else 2**26, device)
    return [
        Task("tiles of logits", Case("forward", head), cases.prepare, LOGPS,
             of_blocks(f"HALF_TILES.{column}.logits", LOGITS_TILES, tiny)),
        Task("tiles of attention's key gradients", AttentionCase("attention", group),
             attention_cases.prepare, ATTENTION, of_key_tiles(attention, column, tiny)),
        Task("tiles of weight gradients", Case("policy_loss", head), prepare_policy, gather,
             of_blocks(f"HALF_TILES.{column}.weight_gradients", PRODUCT_TILES, tiny)),
        Task("tiles of hidden gradients", Case("policy_loss", head), prepare_policy, gather,
             of_blocks(f"HALF_TILES.{column}.hidden_gradients", PRODUCT_TILES, tiny)),
        Task("tiles of attention's queries", AttentionCase("attention", group),
             attention_cases.prepare, ATTENTION, of_query_tiles(attention, column, tiny)),
        Task("launch of the loss of tokens", losses, loss_cases.prepare, "fastrl token_loss",
             functools.partial(together, {f"{tokens}:BLOCK": (256, 1024, 2048, 2048),
                                          f"{tokens}:NUM_WARPS": (4, 8, 16, 32)})),
        Task("units of attention's keys", AttentionCase("attention", group),
             attention_cases.prepare, ATTENTION,
             of_numbers(f"{attention}:{'INTERPRETED_UNITS' if tiny else 'UNITS_PER_PROCESSOR'}",
                        (2, 4, 6, 8, 12))),
        Task("blocks of rows of logits", Case("selected_logps", logits), logits_cases.prepare,
             "fastrl selected_logps",
             of_pairs({f"{launch}:{'INTERPRETED_ROW_BLOCK' if tiny else 'ROW_BLOCK'}":
                       (1024, 4096, 8192), f"{launch}:ROW_WARPS": (4, 16)})),
        Task("columns of min_memory's slices", Case("policy_loss", head), prepare_policy,
             MIN_MEMORY, of_numbers(f"{launch}:{'INTERPRETED_SPLIT' if tiny else 'SPLIT'}",
                                    (64, 32) if tiny else (1024, 4096, 8192))),
        Task("rows of a chunk of one_pass", Case("policy_loss", head), prepare_policy, cublas,
             of_numbers("fastrl_kernels.plan:MAX_ROWS.cuda", (1024, 2048, 8192))),
        Task("splits of hidden gradients", Case("policy_loss", head, 0.2), prepare_policy, gather,
             of_pairs({f"{loss}:MAX_SPLITS": (1, 2, 8), f"{loss}:ENOUGH_PROGRAMS": (132, 528)})),
        Task("tiles of decoding", DecodeCase(batch), decode_cases.prepare, DECODE,
             of_decode_tiles(decode, tiny)),
        Task("parts of decoding", DecodeCase(batch), decode_cases.prepare, DECODE,
             of_pairs({f"{decode}:{'INTERPRETED_SPLIT' if tiny else 'SPLIT'}": (128, 512, 1024),
                       f"{decode}:ROWS_OF_A_TILE": (4, 16)})),
        Task("rows of a forward chunk", Case("forward", head), cases.prepare, LOGPS,
             of_numbers(f"{rows}.launch:MAX_ROWS", (4096, 16384))),
        *(Task(f"launch of AdamW{name}", AdamWCase(in_8bit, elements), optimizer_cases.prepare,
               optimizer_cases.KERNEL, of_pairs({f"{adamw}:NUM_BLOCKS": (2, 8, 16),
                                                 f"{adamw}:NUM_WARPS": (2, 8)}))
          for name, in_8bit in (("", False), (" in 8 bits", True))),
        Task("blocks of a selection", SelectionCase(scores), selection_cases.prepare,
             "fastrl select_tokens",
             of_pairs({f"{selection}:{'INTERPRETED_BLOCK' if tiny else 'BLOCK'}":
                       (16,) if tiny else (1024, 4096),
                       f"{selection}:MAX_PROGRAMS": (64, 256),
                       f"{selection}:BLOCKS_PER_PROGRAM": (2, 8)})),
    ]  # fmt: skip


ATTENTION, DECODE = "fastrl segment_attention", "fastrl decode_attention"


def prepare_policy(case: Case, only: str | None = None) -> Prepared:
    """With every engine of our loss to choose from."""
    return cases.prepare(case, only, policy_loaders() | fastrl_variants())


def of_blocks(
    entry: str, tiles: tuple[tuple[int, ...], ...], tiny: bool
) -> Callable[[], dict[str, Settings]]:
    """Tiles of a product in the order of what is expected of them."""
    if tiny:
        entry, tiles = "INTERPRETED_BLOCKS", ((16, 16, 16, 4, 1), (32, 32, 16, 4, 1))
    return functools.partial(product_tiles, f"fastrl_kernels.launch:{entry}", tiles)


def product_tiles(path: str, tiles: tuple[tuple[int, ...], ...]) -> dict[str, Settings]:
    """All that fit but today's."""
    today = current(path)
    found = [tile for tile in map(today._make, tiles) if tile != today and fits_product(tile)]
    return {label_of(tile): {path: tile} for tile in found}


def fits_product(tile: Any) -> bool:
    """Operands of all stages in shared memory, sums in registers."""
    operands = tile.num_stages * (tile.rows + tile.columns) * tile.depth * BF16.itemsize
    sums = tile.rows * tile.columns / (32 * tile.num_warps)
    return operands <= shared_bytes() and sums <= ACCUMULATORS


def shared_bytes() -> int:
    """Of a block of this GPU, or of an H200 where there is none."""
    return SHARED_BYTES[column_of(torch.device("cuda"))]


def of_key_tiles(module: str, column: str, tiny: bool) -> Callable[[], dict[str, Settings]]:
    """Tiles of the gradients of keys and values."""
    choices = {"queries": (32, 64), "keys": (64, 128), "num_stages": (1, 2, 3)}
    path = f"{module}:HALF_TILINGS.{column}.128.key_gradients"
    if tiny:
        path, choices = f"{module}:INTERPRETED_TILING.key_gradients", {"keys": (16, 32)}
    return functools.partial(tiles_around, path, choices, fits_attention, most=16)


def of_query_tiles(module: str, column: str, tiny: bool) -> Callable[[], dict[str, Settings]]:
    """Tiles of outputs and of the gradients of queries, which share tables of queries."""
    path = f"{module}:{'INTERPRETED_TILING' if tiny else f'HALF_TILINGS.{column}.128'}"
    sizes: Any = itertools.product((128, 64), (64, 32), (8, 4), (2, 3))
    return functools.partial(query_tiles, path, ((16, 16, 4, 1),) if tiny else tuple(sizes))


def query_tiles(path: str, sizes: tuple[tuple[int, ...], ...]) -> dict[str, Settings]:
    """By queries, keys, warps and stages."""
    today, found = current(path), {}
    for queries, keys, num_warps, num_stages in sizes:
        shape = {"queries": queries, "num_warps": num_warps, "num_stages": num_stages}
        forward = today.forward._replace(keys=keys, **shape)
        others = today.query_gradients._replace(keys=min(keys, 64), **shape)
        if fits_attention(forward) and forward != today.forward:
            tiling = today._replace(forward=forward, query_gradients=others)
            found[label_of(forward)] = {path: tiling}
    if "large" in path:
        small = current(path.replace("large", "small"))._replace(key_gradients=today.key_gradients)
        found = {f"{label_of(small.forward)}, small": {path: small}, **found}
    return found


def fits_attention(tile: Any) -> bool:
    """Queries, and keys and values of all stages, of heads of 128; outputs and scores."""
    operands = (tile.queries + 2 * tile.num_stages * tile.keys) * 128 * BF16.itemsize
    sums = tile.queries * (128 + tile.keys) / (32 * tile.num_warps)
    return operands <= shared_bytes() and sums <= ACCUMULATORS


def of_decode_tiles(module: str, tiny: bool) -> Callable[[], dict[str, Settings]]:
    """Tiles of the parts of rows."""
    choices = {"queries": (32, 64, 128), "columns": (32, 64, 128), "num_warps": (4, 8),
               "num_stages": (2, 3, 4)}  # fmt: skip
    path = f"{module}:HALF_TILES.128"
    if tiny:
        path, choices = f"{module}:INTERPRETED_TILE", {"columns": (16, 32)}

    return functools.partial(tiles_around, path, choices, fits_decoding, most=12)


def fits_decoding(tile: Any) -> bool:
    """Queries, and keys and values of all stages, of heads of 128."""
    operands = (tile.queries + 2 * tile.num_stages * tile.columns) * 128 * BF16.itemsize
    return operands <= shared_bytes()


def tiles_around(
    path: str, choices: dict[str, tuple[int, ...]], fits: Callable[[Any], bool], most: int
) -> dict[str, Settings]:
    """All combinations that fit, those with the most operations for a byte first."""
    today = current(path)
    found = []
    for values in itertools.product(*choices.values()):
        tile = today._replace(**dict(zip(choices, values, strict=True)))
        if tile != today and fits(tile):
            found.append(tile)
    found.sort(key=lambda tile: (1 / tile[0] + 1 / tile[1], distance(tile, today)))
    return {label_of(tile): {path: tile} for tile in found[:most]}


def distance(tile: Any, today: Any) -> int:
    """How many fields differ."""
    return sum(a != b for a, b in zip(tile, today, strict=True))


def label_of(tile: Any) -> str:
    """All fields in their order."""
    return "x".join("-" if value is None else str(value) for value in tile)


def of_numbers(path: str, values: tuple[int, ...]) -> Callable[[], dict[str, Settings]]:
    """One setting."""
    return of_pairs({path: values})


def of_pairs(choices: dict[str, tuple[int, ...]]) -> Callable[[], dict[str, Settings]]:
    """Each setting with each of its values, one at a time."""
    return functools.partial(one_at_a_time, choices)


def together(choices: dict[str, tuple[int, ...]]) -> dict[str, Settings]:
    """The first values of all settings, the second ones, and so on, but for today's."""
    found = {}
    for values in zip(*choices.values(), strict=True):
        settings = dict(zip(choices, values, strict=True))
        new = {path: value for path, value in settings.items() if value != current(path)}
        found[label_of(values)] = new
    return found


def one_at_a_time(choices: dict[str, tuple[int, ...]]) -> dict[str, Settings]:
    """All but today's."""
    return {
        f"{path.split(':')[1]} {value}": {path: value}
        for path, values in choices.items()
        for value in values
        if value != current(path)
    }
