"""The tiles of a large GPU at small sizes: fewer rows, columns and queries than a tile has."""

from contextlib import AbstractContextManager

import pytest
import torch

from benchmarks.tune_settings import overridden
from fastrl_kernels import make_segments
from fastrl_kernels.launch import HALF_TILES, Blocks
from fastrl_kernels.segment_attention.launch import HALF_TILINGS, Tilings
from tests.kernels.interpreted.conftest import ENGINES, OPTIONS, make_case, with_tokens
from tests.kernels.interpreted.test_linear_logps import check_linear_logps, triton_logps
from tests.kernels.interpreted.test_policy_loss import REGULARISED, check_policy_loss
from tests.kernels.interpreted.test_segment_attention import check, inputs

LAUNCH, ATTENTION = "fastrl_kernels.launch", "fastrl_kernels.segment_attention.launch"
LARGE = HALF_TILES["large"]
SPLIT = 256  # a multiple of the columns of every tile


def with_tile(tile: Blocks) -> AbstractContextManager[None]:
    """The interpreter's launches take this tile."""
    return overridden({f"{LAUNCH}:INTERPRETED_BLOCKS": tile, f"{LAUNCH}:INTERPRETED_SPLIT": SPLIT})


@pytest.mark.parametrize("columns", [135, 301])
@pytest.mark.parametrize("tile", sorted({*LARGE}), ids=str)
def test_statistics_and_gradients_of_a_head(tile: Blocks, columns: int) -> None:
    with with_tile(tile):
        check_linear_logps(make_case("plain", torch.float32, columns=columns), triton_logps)


@pytest.mark.parametrize("tile", sorted({*LARGE}), ids=str)
def test_the_loss_with_everything_that_a_head_has(tile: Blocks) -> None:
    case, tokens = with_tokens(make_case("everything", torch.float32, columns=301))
    with with_tile(tile):
        check_policy_loss(
            case, tokens, OPTIONS, objective=REGULARISED, entropy_coef=0.1, **ENGINES["gather"]
        )


@pytest.mark.parametrize("tiling", HALF_TILINGS["large"].values(), ids=str)
def test_attention_of_segments_below_and_above_a_tile(tiling: Tilings) -> None:
    segments = make_segments([133, 1, 0, 35, 131], [-1, 0, 0, 0, -1])
    with overridden({f"{ATTENTION}:INTERPRETED_TILING": tiling}):
        check(inputs(segments.num_tokens, 2, 1, 13, 24), segments)
        check(inputs(segments.num_tokens, 2, 2, 24, 13), segments, window=21, softcap=2.0)
