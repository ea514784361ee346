"""decode_attention's kernels against explicit softmax in float64, and bit for bit across batches.

R rows, P groups, H heads, Hkv key-value heads, K head size of queries and keys, Kv of values.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import decode_attention
from fastrl_kernels.decode_attention import decode_attention_reference, launch
from fastrl_kernels.decode_attention.op import decode_attention_op
from tests.kernels.decode_cases import OPTIONS, SINKS, make_case, with_sinks
from tests.kernels.interpreted.test_wide_offsets import LIMIT, far_apart

# Several parts of the interpreter's 32 columns, and blocks of 16 that they do not fill.
LONG = {"lengths": (75, 33, 64, 0), "columns": (79, 53), "suffix_length": 49}
SHAPES: dict[str, dict[str, Any]] = {
    "long": LONG,
    "uneven": {**LONG, "rows": (0, 14, 0, 2)},  # several tiles of a group, groups of none
    "even": {**LONG, "rows": (2, 2, 2, 2), "heads": (4, 4), "sizes": (16, 16)},
    "one key head": {**LONG, "rows": (1, 0, 1, 1), "heads": (19, 1), "sizes": (7, 40)},
    "no prefix": {"lengths": (0, 0, 0, 0), "columns": (0, 5), "suffix_length": 1},
}
EVERYTHING = {"window": 70, "softcap": 2.0, "sinks": SINKS, "scale": -1.3}


def run(tensors: list[Tensor], where: dict[str, Any], **options: Any) -> Tensor:
    return decode_attention(*tensors, **where, **options, implementation="triton")


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        *(("long", options) for options in OPTIONS),
        *((shape, {}) for shape in SHAPES if shape != "long"),
        *((shape, EVERYTHING) for shape in SHAPES),
        ("even", {"window": 70}),
        ("uneven", {"window": 49, "softcap": 3.0}),
    ],
)
def test_values(shape: str, options: dict[str, Any]) -> None:
    """float32 against float64: 2e-6."""
    tensors, where = make_case(**SHAPES[shape], dtype=torch.float32)
    options = with_sinks(options, torch.float32)
    if "sinks" in options:
        options["sinks"] = options["sinks"].repeat(4)[: tensors[0].shape[1]]
    out = run(tensors, where, **options)
    truth = decode_attention_reference(*(x.double() for x in tensors), **where, **options)
    assert out.dtype == torch.float32
    assert (out - truth).abs().max() <= 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]])
def test_low_precision(options: dict[str, Any], dtype: torch.dtype) -> None:
    """The error of rounding the exact result once, and as much again for that of the weights."""
    tensors, where = make_case(**LONG, dtype=dtype)
    options = with_sinks(options, torch.float32)
    out = run(tensors, where, **options)
    truth = decode_attention_reference(*(x.double() for x in tensors), **where, **options)
    assert out.dtype == dtype
    assert (out - truth).norm() <= 2 * (truth.to(dtype) - truth).norm()


@pytest.mark.parametrize("shift", [30.0, -30.0])
def test_large_scores(shift: float) -> None:
    """At most twice the error of the plain softmax in float32, where scores are around 330."""
    tensors, where = make_case(**LONG, dtype=torch.float32)
    tensors[0][..., 0], tensors[1][..., 0], tensors[3][..., 0] = 40.0, shift, shift
    truth = decode_attention_reference(*(x.double() for x in tensors), **where)
    plain = decode_attention_reference(*tensors, **where)
    assert (run(tensors, where) - truth).norm() <= 2 * (plain - truth).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_a_row_alone_and_among_others(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Bit for bit, whatever the others hold and however much room there is."""
    shape = {**LONG, "rows": (1, 2, 10, 1)}
    tensors, where = make_case(**shape, dtype=dtype)
    options = with_sinks(options, torch.float32)
    row, group = 9, 2  # in the middle of a tile
    alone = [x[row : row + 1] for x in tensors]
    alone[1:3] = [x[group : group + 1, :, :64] for x in tensors[1:3]]
    alone[3:] = [x[row : row + 1, :, :49] for x in tensors[3:]]
    alone_where = {
        "row_groups": torch.zeros(1, dtype=torch.int32),
        "prefix_lengths": where["prefix_lengths"][group : group + 1],
        "suffix_length": 49,
    }
    expected = run(alone, alone_where, **options)
    others = torch.arange(len(tensors[0])) != row
    for x in (tensors[0], *tensors[3:]):
        x[others] = torch.nan
    out = run(tensors, where, **options)
    assert torch.equal(out[row : row + 1], expected)
    assert out[others].isnan().all()
    assert torch.equal(run(tensors, where, **options)[row], out[row])


def test_the_length_can_stay_on_the_device() -> None:
    tensors, where = make_case(**LONG, dtype=torch.float32)
    options = {"window": 70, "sinks": torch.tensor(SINKS)}
    expected = run(tensors, where, **options)
    where["suffix_length"] = torch.tensor(49, dtype=torch.int32)
    assert torch.equal(run(tensors, where, **options), expected)


def test_any_strides() -> None:
    """Columns before heads, slices of larger blocks, a query with its elements apart."""
    tensors, where = make_case(**LONG, dtype=torch.float32)
    expected = run(tensors, where)
    strided = [
        tensors[0].repeat_interleave(2, 2)[..., ::2],
        *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[1:3]),
        *(torch.cat([x, x * torch.nan], 1)[:, : x.shape[1]] for x in tensors[3:]),
    ]
    assert not any(x.is_contiguous() for x in strided)
    assert torch.equal(run(strided, where), expected)


def test_offsets_past_32_bits(tmp_path: Path) -> None:
    near, where = make_case(
        (1, 0, 2), (3, 5, 4), columns=(5, 4), suffix_length=3, dtype=torch.float32, sizes=(13, 13)
    )
    far = [
        far_apart(x.flatten(1), tmp_path / str(index)).unflatten(1, x.shape[1:])
        for index, x in enumerate(near)
    ]
    assert all(x[-1].storage_offset() > LIMIT for x in far)
    assert torch.equal(run(far, where), run(near, where))


def test_keys_that_cannot_be_read_raise() -> None:
    tensors, where = make_case(dtype=torch.float32)
    tensors[3] = tensors[3].repeat_interleave(2, 3)[..., ::2]
    with pytest.raises(ValueError, match="suffix_k must have the elements of a head side by side"):
        run(tensors, where)


def test_a_head_too_large_raises() -> None:
    tensors, where = make_case(dtype=torch.float32, sizes=(13, 257))
    with pytest.raises(ValueError, match="heads of at most 256, not 257"):
        run(tensors, where)


def test_no_rows() -> None:
    tensors, where = make_case((0, 0), (3, 5), dtype=torch.float32)
    assert run(tensors, where).shape == (0, 6, 7)


def test_every_tile_has_its_queries() -> None:
    """All queries of all groups, each once, whatever the numbers of rows."""
    for rows in ((3, 0, 5, 1), (0, 0, 40, 7), (1, 1, 1, 1), (0, 9, 0, 0)):
        for num_sharing in (1, 3, 5, 16):
            size = launch.tile_queries(launch.INTERPRETED_TILE, num_sharing, is_prefix=True)
            groups = torch.repeat_interleave(torch.tensor(rows)).int()
            tiles = launch.make_tiles(groups, 4, num_sharing, size)
            found = []
            for group, start, offset, count in tiles.tolist():
                queries = range(offset, offset + min(count, size))
                found += [(group, start * num_sharing + query) for query in queries]
            expected = [
                (g, n) for n, g in enumerate(groups.repeat_interleave(num_sharing).tolist())
            ]
            assert found == expected


def test_the_operator_keeps_its_contract() -> None:
    tensors, where = make_case(dtype=torch.float32)
    groups, lengths, own = where.values()
    for length in (None, torch.tensor(own, dtype=torch.int32)):
        arguments = (*tensors, groups, lengths, own, length, None, 0.3, 4, None, "triton")
        torch.library.opcheck(
            decode_attention_op, arguments, test_utils=("test_schema", "test_faketensor")
        )
