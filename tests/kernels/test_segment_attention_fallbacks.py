"""The fallbacks of segment attention against explicit softmax in float64: one contract, other code.

On a CPU "varlen" runs in plain PyTorch, so that what is around the flash kernels (which rows, which
merge, which gradients) is tested here, and the kernels themselves on a GPU.
N packed tokens, H heads, Hkv key-value heads, K head size of queries and keys, Kv of values.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastrl_kernels import Segments, make_segments, segment_attention
from fastrl_kernels.segment_attention import flex, segment_attention_reference
from tests.kernels.test_segment_attention import LENGTHS, NUM_TOKENS, OPTIONS, PARENTS, inputs

FALLBACKS = ["sdpa", "flex", "varlen"]
UNSUPPORTED = {"sdpa": {"softcap", "sinks"}, "flex": set(), "varlen": {"window"}}
LONG = ([257, 123, 0, 63, 65, 1], [-1, 0, 0, 0, 3, -1])
HUNDREDS = ([5] + [1] * 300 + [2] * 20, [-1] + [0] * 300 + list(range(300, 320)))
CHAIN = ([1, 0, 2, 3] * 9, list(range(-1, 35)))


def cases(implementations: list[str], all_options: list[dict]) -> list[Any]:
    return [
        pytest.param(name, options, id=f"{name}-{'-'.join(options) or 'plain'}")
        for name in implementations
        for options in all_options
        if not UNSUPPORTED[name] & set(options)
    ]


def function_of(implementation: str) -> Callable[..., Tensor]:
    """The public function; of FlexAttention, what it calls past its refusal of gradients."""
    if implementation != "flex":
        return lambda *args, **options: segment_attention(
            *args, **options, implementation=implementation
        )

    def flex_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, **options: Any) -> Any:
        mask = flex.block_mask_of(segments, options.get("window"))
        scale = options.get("scale", q.shape[2] ** -0.5)
        return flex.attend(q, k, v, mask, scale, options.get("softcap"), options.get("sinks"))

    return flex_attention


@pytest.fixture
def gradients_of_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses them on a CPU, where they would be slow; its code for them is right there."""
    guard = "torch.nn.attention.flex_attention._validate_device"
    monkeypatch.setattr(guard, lambda *tensors: None)


def random_inputs(
    num_tokens: int, dtype: torch.dtype = torch.float64, heads: tuple[int, int] = (6, 2)
) -> list[Tensor]:
    """q, k, v, of head size 13."""
    generator = torch.Generator().manual_seed(num_tokens)
    return [
        torch.randn(num_tokens, count, 13, generator=generator, dtype=torch.float64).to(dtype)
        for count in (heads[0], heads[1], heads[1])
    ]


def run(function: Callable[..., Tensor], tensors: list[Tensor], *args: Any, **options: Any) -> list:
    """Outputs and all gradients, of the sinks too if there are any."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    if "sinks" in options:
        options["sinks"] = options["sinks"].detach().clone().requires_grad_()
    out = function(*leaves, *args, **options)
    slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    leaves += [options["sinks"]] if "sinks" in options else []
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


def assert_equal_to_reference(
    implementation: str, tensors: list[Tensor], segments: Segments, **options: Any
) -> None:
    found = run(function_of(implementation), tensors, segments, **options)
    truth = run(segment_attention_reference, tensors, segments, **options)
    for value, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-11)


@pytest.mark.usefixtures("gradients_of_flex")
@pytest.mark.parametrize(("implementation", "options"), cases(FALLBACKS, OPTIONS))
@pytest.mark.parametrize(("kv_heads", "value_size"), [(3, 13), (6, 7), (1, 13)])
def test_values_and_gradients_match_the_reference(
    implementation: str, options: dict, kv_heads: int, value_size: int
) -> None:
    tensors = list(inputs(0, kv_heads=kv_heads, value_size=value_size))
    assert_equal_to_reference(implementation, tensors, make_segments(LENGTHS, PARENTS), **options)


@pytest.mark.usefixtures("gradients_of_flex")
@pytest.mark.parametrize("implementation", FALLBACKS)
@pytest.mark.parametrize("forest", [LONG, HUNDREDS, CHAIN], ids=["long", "hundreds", "chain"])
def test_long_segments_many_segments_deep_forests(implementation: str, forest: Any) -> None:
    segments = make_segments(*forest)
    assert_equal_to_reference(implementation, random_inputs(segments.num_tokens), segments)


@pytest.mark.usefixtures("gradients_of_flex")
@pytest.mark.parametrize("implementation", ["sdpa", "flex"])
@pytest.mark.parametrize("window", [1, 70, 150])
def test_windows_over_many_blocks(implementation: str, window: int) -> None:
    segments = make_segments(*LONG)
    tensors = random_inputs(segments.num_tokens)
    assert_equal_to_reference(implementation, tensors, segments, window=window)


@st.composite
def forests(draw: st.DrawFn) -> Segments:
    lengths, parents, path = [], [], []
    for segment in range(draw(st.integers(1, 12))):
        path = path[: draw(st.integers(0, len(path)))]
        lengths.append(draw(st.integers(0, 5)))
        parents.append(path[-1] if path else -1)
        path.append(segment)
    lengths[0] += not sum(lengths)
    return make_segments(lengths, parents)


@settings(max_examples=60, deadline=None)
@given(forests(), st.booleans())
def test_any_forest(segments: Segments, has_extras: bool) -> None:
    tensors = random_inputs(segments.num_tokens)
    extras = {"softcap": 1.5, "sinks": torch.linspace(-2, 3, 6, dtype=torch.float64)}
    assert_equal_to_reference("varlen", tensors, segments, **(extras if has_extras else {}))
    assert_equal_to_reference("sdpa", tensors, segments, window=3 if has_extras else None)


@pytest.mark.parametrize("implementation", FALLBACKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_sibling_never_leaks(implementation: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs(3))
    segments = make_segments(LENGTHS, PARENTS)
    sibling = slice(7, 12)  # segment 1
    before = segment_attention(q, k, v, segments, implementation=implementation)
    for x in (q, k, v):
        x[sibling] = x[sibling] * -30 + 5
    after = segment_attention(q, k, v, segments, implementation=implementation)
    others = torch.ones(NUM_TOKENS, dtype=torch.bool)
    others[sibling] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[sibling], after[sibling])


@pytest.mark.usefixtures("gradients_of_flex")
@pytest.mark.parametrize("implementation", ["auto", *FALLBACKS])
@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 2.0), (torch.bfloat16, 1.1)])
def test_errors_are_those_of_pytorch_on_repeated_rows(
    implementation: str, dtype: torch.dtype, factor: float
) -> None:
    prompt, completion, count = 100, 33, 5
    segments = make_segments([prompt] + [completion] * count, [-1] + [0] * count)
    tensors = random_inputs(segments.num_tokens, dtype)

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = torch.arange(count)[:, None] * completion + torch.arange(prompt, prompt + completion)
        rows = torch.cat([torch.arange(prompt).expand(count, -1), own], dim=1)
        batch = (x[rows].transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)
        return out[:, :, prompt:].transpose(1, 2).flatten(0, 1)

    def packed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: function(*args, segments)[prompt:]

    truth = run(packed(segment_attention_reference), [x.double() for x in tensors])
    ours, theirs = run(packed(function_of(implementation)), tensors), run(repeated, tensors)
    for x, y, z in zip(ours, theirs, truth, strict=True):
        assert x.dtype == dtype
        assert (x - z).norm() <= factor * (y - z).norm()


@pytest.mark.parametrize("implementation", FALLBACKS)
def test_autocast_changes_nothing(implementation: str) -> None:
    segments = make_segments([30, 9], [-1, 0])
    tensors = random_inputs(39, torch.float32)
    expected = segment_attention(*tensors, segments, implementation=implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = segment_attention(*tensors, segments, implementation=implementation)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("implementation", FALLBACKS)
def test_tables_made_under_inference_mode_serve_the_update(
    implementation: str, gradients_of_flex: None
) -> None:
    segments = make_segments(LENGTHS, PARENTS)
    with torch.inference_mode():
        segment_attention(*inputs(8), segments, implementation=implementation)
    assert_equal_to_reference(implementation, list(inputs(8)), segments)


@pytest.mark.parametrize("implementation", ["sdpa", "varlen"])
def test_inside_a_compiled_function(implementation: str) -> None:
    segments, tensors = make_segments(LENGTHS, PARENTS), list(inputs(9))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function_of(implementation)(q * 2, k, v, segments) + 1

    compiled = torch.compile(attention, backend="aot_eager")
    for found, expected in zip(run(compiled, tensors), run(attention, tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", FALLBACKS)
def test_empty_row(implementation: str) -> None:
    q, kv = torch.zeros(0, 4, 8, requires_grad=True), torch.zeros(0, 2, 8)
    out = segment_attention(
        q, kv, kv[..., :5], make_segments([], []), implementation=implementation
    )
    assert out.shape == (0, 4, 5)


SINKS = torch.zeros(6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("implementation", "options", "message"),
    [
        ("sdpa", {"softcap": 2.0}, '"sdpa" is impossible: .* no softcap'),
        ("sdpa", {"sinks": SINKS}, '"sdpa" is impossible: .* no sinks'),
        ("varlen", {"window": 4}, "at least 16 tokens.*got 4"),
        ("triton", {}, '"triton" is impossible'),
        ("cuda", {}, '"auto", "torch", "triton", "sdpa", "flex", "varlen", got \'cuda\''),
    ],
)
def test_what_cannot_be_computed_raises(implementation: str, options: dict, message: str) -> None:
    segments = make_segments(LENGTHS, PARENTS)
    with pytest.raises(ValueError, match=message):
        segment_attention(*inputs(7), segments, **options, implementation=implementation)


def test_flex_has_no_gradients_on_a_cpu() -> None:
    segments = make_segments(LENGTHS, PARENTS)
    q, k, v = inputs(7)
    with pytest.raises(ValueError, match="gradients on a GPU only"):
        segment_attention(q.requires_grad_(), k, v, segments, implementation="flex")
    with torch.no_grad():
        out = segment_attention(q, k, v, segments, implementation="flex")
    torch.testing.assert_close(
        out, segment_attention_reference(q, k, v, segments), rtol=0, atol=1e-12
    )
