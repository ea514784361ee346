"""Decode attention against explicit softmax in float64, and against attention over whole rows."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import decode_attention, make_segments
from fastrl_kernels.decode_attention import decode_attention_reference, grouped
from fastrl_kernels.decode_attention.op import decode_attention_op
from fastrl_kernels.segment_attention import segment_attention_reference
from tests.kernels.decode_cases import LENGTHS, OPTIONS, SINKS, make_case, with_sinks

EVEN = (2, 2, 2, 2)
SHAPES: list[dict[str, Any]] = [
    {},
    {"rows": EVEN},
    {"rows": EVEN, "lengths": (37, 37, 37, 37)},
    {"rows": (0, 0, 7, 0)},
    {"lengths": (21, 12, 14, 19)},
    {"lengths": (0, 0, 0, 0)},
    {"lengths": (0, 0, 0, 0), "columns": (0, 19)},
    {"rows": (4,), "lengths": (5,), "heads": (3, 3), "sizes": (8, 8), "suffix_length": 1},
    {"heads": (5, 1), "sizes": (7, 13), "suffix_length": 19},
]


@pytest.mark.parametrize("implementation", ["auto", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_values_match_the_reference(
    options: dict[str, Any], shape: dict[str, Any], implementation: str
) -> None:
    tensors, where = make_case(**shape)
    options = with_sinks(options, torch.float64)
    if "sinks" in options:
        options["sinks"] = options["sinks"][: tensors[0].shape[1]]
    out = decode_attention(*tensors, **where, **options, implementation=implementation)
    expected = decode_attention_reference(*tensors, **where, **options)
    assert out.dtype == torch.float64
    assert out.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_reference_is_the_last_token_of_every_path(options: dict[str, Any]) -> None:
    """The same numbers as a packed row of prefixes with their rows below them."""
    tensors, where = make_case()
    options = with_sinks(options, torch.float64)
    out = decode_attention_reference(*tensors, **where, **options)
    groups, own = where["row_groups"].tolist(), where["suffix_length"]
    lengths: list[int] = []
    parents: list[int] = []
    packed: list[list[Tensor]] = [[], []]  # keys and values of each segment
    for group, length in enumerate(LENGTHS):
        root = len(lengths)
        lengths, parents = [*lengths, length], [*parents, -1]
        for parts, prefix in zip(packed, tensors[1:3], strict=True):
            parts.append(prefix[group, :, :length].transpose(0, 1))
        for row in (row for row, of in enumerate(groups) if of == group):
            lengths, parents = [*lengths, own], [*parents, root]
            for parts, suffix in zip(packed, tensors[3:], strict=True):
                parts.append(suffix[row, :, :own].transpose(0, 1))
    segments = make_segments(lengths, parents)
    last = (segments.starts + segments.lengths - 1)[torch.tensor(parents) >= 0]
    q = torch.zeros(segments.num_tokens, *tensors[0].shape[1:], dtype=torch.float64)
    q[last] = tensors[0]
    k, v = (torch.cat(parts) for parts in packed)
    expected = segment_attention_reference(q, k, v, segments, **options)[last]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 6e-4), (torch.bfloat16, 5e-3)]
)
def test_half_precision_is_rounded_once(
    options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    """Half an ulp of the largest output away from float64 on the same inputs, and float32's own."""
    tensors, where = make_case(dtype=dtype)
    options = with_sinks(options, torch.float32)
    out = decode_attention(*tensors, **where, **options, implementation="torch")
    wide = [x.double() for x in tensors]
    expected = decode_attention_reference(*wide, **where, **options)
    assert out.dtype == dtype
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()


def test_half_precision_some_groups_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, whatever number of groups is copied at a time."""
    tensors, where = make_case(dtype=torch.bfloat16)
    expected = decode_attention(*tensors, **where, window=20)
    for num_bytes in (1, 30_000, 45_000):
        monkeypatch.setattr(grouped, "COPIED_BYTES", num_bytes)
        out = decode_attention(*tensors, **where, window=20)
        torch.testing.assert_close(out, expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("shift", [30.0, -30.0])
def test_large_scores(shift: float) -> None:
    """At most twice the error of the plain softmax in float32, where scores are around 330."""
    tensors, where = make_case(dtype=torch.float32)
    tensors[0][..., 0], tensors[1][..., 0], tensors[3][..., 0] = 40.0, shift, shift
    truth = decode_attention_reference(*(x.double() for x in tensors), **where)
    plain = decode_attention_reference(*tensors, **where)
    out = decode_attention(*tensors, **where, implementation="torch")
    assert (out - truth).norm() <= 2 * (plain - truth).norm()


@pytest.mark.parametrize("shape", [{}, {"rows": EVEN}])
def test_padding_makes_no_difference(shape: dict[str, Any]) -> None:
    """NaN, infinite, or finite as a prefill leaves it: the same bits."""
    tensors, where = make_case(**shape)
    expected = decode_attention(*tensors, **where)
    for value in (torch.inf, 1e30, 0.0):
        other = [x.nan_to_num(value) for x in tensors]
        assert torch.equal(decode_attention(*other, **where), expected)


def test_the_length_can_be_a_tensor() -> None:
    tensors, where = make_case()
    expected = decode_attention(*tensors, **where)
    where["suffix_length"] = torch.tensor(11, dtype=torch.int32)
    assert torch.equal(decode_attention(*tensors, **where), expected)


@pytest.mark.parametrize("shape", [{}, {"rows": EVEN}])
def test_any_strides(shape: dict[str, Any]) -> None:
    """Columns before heads, and a slice of the rows of a larger block."""
    tensors, where = make_case(**shape)
    expected = decode_attention(*tensors, **where)
    strided = [
        tensors[0].transpose(0, 1).contiguous().transpose(0, 1),
        *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[1:3]),
        *(torch.cat([x, x * torch.nan], 1)[:, : x.shape[1]] for x in tensors[3:]),
    ]
    assert not any(x.is_contiguous() for x in strided)
    out = decode_attention(*strided, **where)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_other_rows_do_not_touch_the_bits_of_a_row() -> None:
    tensors, where = make_case(dtype=torch.float32)
    expected = decode_attention(*tensors, **where)
    others = torch.arange(9) != 4
    for x in (tensors[0], *tensors[3:]):
        x[others] = torch.nan
    for x in tensors[1:3]:
        x[[0, 1, 3]] = torch.nan
    out = decode_attention(*tensors, **where)
    assert torch.equal(out[4], expected[4])
    assert out[others].isnan().all()


def test_no_rows() -> None:
    tensors, where = make_case((0, 0), (3, 5))
    assert decode_attention(*tensors, **where).shape == (0, 6, 7)


def test_autocast_leaves_float32_alone() -> None:
    tensors, where = make_case(dtype=torch.float32)
    expected = decode_attention(*tensors, **where)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decode_attention(*tensors, **where), expected)


def test_the_operator_keeps_its_contract_and_compiles() -> None:
    tensors, where = make_case(dtype=torch.float32)
    sinks = torch.tensor(SINKS)
    groups, lengths, own = where.values()
    for length in (None, torch.tensor(own, dtype=torch.int32)):
        arguments = (*tensors, groups, lengths, own, length, sinks, 0.3, 4, None, "torch")
        torch.library.opcheck(
            decode_attention_op, arguments, test_utils=("test_schema", "test_faketensor")
        )
    compiled = torch.compile(decode_attention, fullgraph=True, backend="eager")
    expected = decode_attention(*tensors, **where, sinks=sinks)
    assert torch.equal(compiled(*tensors, **where, sinks=sinks), expected)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"suffix_length": 0}, "suffix_length must be from 1 to 19"),
    ({"suffix_length": 20}, "suffix_length must be from 1 to 19"),
    ({"suffix_length": torch.tensor(20, dtype=torch.int32)}, "suffix_length must be from 1 to 19"),
    ({"suffix_length": torch.tensor(3)}, "torch.int32 tensor of shape"),
    ({"window": 0}, "window must be a positive"),
    ({"softcap": 0.0}, "softcap must be positive"),
    ({"sinks": torch.zeros(5)}, "sinks must have one value per head"),
    ({"row_groups": torch.zeros(8, dtype=torch.int32)}, "row_groups must be torch.int32 of shape"),
    ({"row_groups": torch.zeros(9)}, "row_groups must be torch.int32 of shape"),
    ({"row_groups": torch.arange(9).flip(0).int() // 3}, "row_groups must not decrease"),
    ({"row_groups": torch.arange(9).int()}, "name one of 4 prefixes"),
    ({"prefix_lengths": torch.zeros(4)}, "prefix_lengths must be torch.int32 of shape"),
    ({"prefix_lengths": torch.tensor([1, 38, 2, 3]).int()}, "prefix_lengths must be from 0 to 37"),
    ({"prefix_lengths": torch.tensor([1, 3, -2, 3]).int()}, "prefix_lengths must be from 0 to 37"),
    ({"implementation": "triton"}, "no kernels for float64"),
    ({"implementation": "flash"}, "implementation must be"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_options_raise(change: dict[str, Any], message: str) -> None:
    tensors, where = make_case()
    with pytest.raises(ValueError, match=message):
        decode_attention(*tensors, **{**where, **change})


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: x[:, None], "no dimension for tokens"),
        (0, lambda x: x[:, :5], "heads of q must be a multiple"),
        (0, lambda x: x[..., :12], "prefix_k must have shape"),
        (1, lambda x: x[:, :, :36], "prefix_v must have shape"),
        (2, lambda x: x[:3], "prefix_v must have shape"),
        (3, lambda x: x[:8], "suffix_k must have shape"),
        (4, lambda x: x[:, :, :18], "suffix_v must have shape"),
        (4, lambda x: x.float(), "must have one floating-point dtype"),
    ],
)
def test_wrong_shapes_raise(index: int, change: Any, message: str) -> None:
    tensors, where = make_case()
    tensors[index] = change(tensors[index])
    with pytest.raises(ValueError, match=message):
        decode_attention(*tensors, **where)
