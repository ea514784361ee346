"""Attention along paths: any forest, bits that know nothing of the rest of the row, small tiles.

N packed tokens, H heads, Hkv key-value heads, K head size of queries and keys, Kv of values.
"""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastrl_kernels import Segments, make_segments
from fastrl_kernels import segment_attention as any_segment_attention
from fastrl_kernels.segment_attention import paths, segment_attention_reference, short_paths
from fastrl_kernels.segment_attention.op import path_attention_gradients_op, path_attention_op
from fastrl_kernels.segment_attention.scores import Options

segment_attention = functools.partial(any_segment_attention, implementation="torch")

H, HKV, K, KV = 6, 2, 13, 9


def make_inputs(
    num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64, value_size: int = KV
) -> list[Tensor]:
    """q, k, v, the sinks, and a gradient of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(H, K), (HKV, K), (HKV, value_size), (H,), (H, value_size)]
    shapes = [(num_tokens, *size) if len(size) == 2 else size for size in sizes]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def run(function: Any, inputs: list[Tensor], segments: Segments, **options: Any) -> list[Tensor]:
    """Outputs and all gradients, sinks included."""
    *tensors, grad_out = [x.detach() for x in inputs]
    for x in tensors:
        x.requires_grad_()
    out = function(*tensors[:3], segments, sinks=tensors[3], **options)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad_out)]


def random_forest(generator: torch.Generator, num_segments: int) -> Segments:
    lengths, parents, path = [], [], []
    for segment in range(num_segments):
        path = path[: int(torch.randint(0, len(path) + 1, (), generator=generator))]
        lengths.append(int(torch.randint(0, 6, (), generator=generator)))
        parents.append(path[-1] if path else -1)
        path.append(segment)
    return make_segments(lengths, parents)


@pytest.fixture(autouse=True)
def fresh_tables() -> Iterator[None]:
    """Tables are kept by forest; here their sizes differ from test to test."""
    paths._tables.cache_clear()
    yield
    paths._tables.cache_clear()


OPTIONS = [{}, {"window": 5}, {"window": 1}, {"softcap": 2.0, "window": 3, "scale": 0.9}]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("options", OPTIONS)
def test_any_forest_in_tiles_of_any_size(
    seed: int, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "MAX_TOKENS", 1 + seed % 4)
    monkeypatch.setattr(paths, "MIN_TOKENS", 1)
    monkeypatch.setattr(short_paths, "MAX_TOKENS", 1 + seed % 3)
    monkeypatch.setattr(short_paths, "MAX_PATH", (0, 7, 96)[seed % 3])
    segments = random_forest(torch.Generator().manual_seed(seed), num_segments=13)
    inputs = make_inputs(segments.num_tokens, seed)
    results = run(segment_attention, inputs, segments, **options)
    truth = run(segment_attention_reference, inputs, segments, **options)
    for result, expected in zip(results, truth, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"window": 70}, {"window": 150, "softcap": 3.0}])
def test_segments_of_many_tiles(options: dict) -> None:
    segments = make_segments([257, 123, 0, 63, 65, 1], [-1, 0, 0, 0, 3, -1])
    inputs = make_inputs(segments.num_tokens)
    results = run(segment_attention, inputs, segments, **options)
    truth = run(segment_attention_reference, inputs, segments, **options)
    for result, expected in zip(results, truth, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)


def test_hundreds_of_segments() -> None:
    segments = make_segments([5] + [1] * 300 + [2] * 20, [-1] + [0] * 300 + list(range(300, 320)))
    inputs = make_inputs(segments.num_tokens)
    results = run(segment_attention, inputs, segments)
    truth = run(segment_attention_reference, inputs, segments)
    for result, expected in zip(results, truth, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 50}, {"softcap": 3.0}])
@pytest.mark.parametrize("completion", [1, 7, 16, 93])
@pytest.mark.parametrize("prompt", [3, 70, 131])
def test_a_completion_has_the_same_bits_in_any_row(
    dtype: torch.dtype, options: dict, completion: int, prompt: int
) -> None:
    alone = make_segments([prompt, completion], [-1, 0])
    inputs = make_inputs(prompt + completion, dtype=dtype)
    expected = run(segment_attention, inputs, alone, **options)
    # Another group before it, siblings on both sides, another root after it.
    lengths = [37, 5, prompt, 11, 3, completion, 160, completion, 9]
    crowd = make_segments(lengths, [-1, 0, -1, 2, 3, 2, 2, 2, -1])
    own = [*range(42, 42 + prompt), *range(56 + prompt, 56 + prompt + completion)]
    many = make_inputs(crowd.num_tokens, seed=1, dtype=dtype)
    for x, y in zip(many, inputs, strict=True):
        x[own if x.dim() == 3 else slice(None)] = y
    result = run(segment_attention, many, crowd, **options)
    for ours, alone_ours in zip(result[:2], expected[:2], strict=True):  # outputs, dq
        assert torch.equal(ours[own], alone_ours)
    for ours, alone_ours in zip(result[2:4], expected[2:4], strict=True):  # dk, dv
        assert torch.equal(ours[own[prompt:]], alone_ours[prompt:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("completion", [19, 60])
def test_a_group_has_the_same_gradients_in_any_row(dtype: torch.dtype, completion: int) -> None:
    """Whether all of its paths are short, or some."""
    size = 97 + completion
    group = make_segments([67, completion, 0, 30], [-1, 0, 0, 0])
    inputs = make_inputs(size, dtype=dtype)
    expected = run(segment_attention, inputs, group)
    row = make_segments([9, 100, 67, completion, 0, 30, 41], [-1, 0, -1, 2, 2, 2, -1])
    many = make_inputs(109 + size + 41, seed=1, dtype=dtype)
    for x, y in zip(many, inputs, strict=True):
        x[slice(109, 109 + size) if x.dim() == 3 else slice(None)] = y
    for ours, alone in zip(run(segment_attention, many, row)[:4], expected[:4], strict=True):
        assert torch.equal(ours[109 : 109 + size], alone)


@pytest.mark.parametrize("longest_short_path", [0, 96])
def test_nothing_of_a_sibling_leaks_not_even_nan(
    longest_short_path: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_paths, "MAX_PATH", longest_short_path)
    segments = make_segments([20, 6, 9, 2], [-1, 0, 0, 2])
    inputs = make_inputs(segments.num_tokens, dtype=torch.float32)
    before = run(segment_attention, inputs, segments)
    for x in inputs[:3]:
        x[20:26] = torch.nan
    after = run(segment_attention, inputs, segments)
    others = [*range(20), *range(26, 37)]
    for x, y in zip(before[:2], after[:2], strict=True):
        assert torch.equal(x[others], y[others])
    for x, y in zip(before[2:4], after[2:4], strict=True):
        assert torch.equal(x[26:], y[26:])
        assert y[:20].isnan().any()  # the prompt's gradient is a sum over all that see it


def test_prompt_gradient_is_rounded_once() -> None:
    segments = make_segments([40] + [9] * 40, [-1] + [0] * 40)
    inputs = make_inputs(segments.num_tokens, dtype=torch.bfloat16)
    grad = run(segment_attention, inputs, segments)[3]
    exact = run(segment_attention, [x.float() for x in inputs], segments)[3]
    assert torch.equal(grad, exact.bfloat16())


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 2.0), (torch.bfloat16, 1.1)])
def test_errors_are_those_of_pytorch_on_repeated_rows(dtype: torch.dtype, factor: float) -> None:
    prompt, completion, count = 100, 33, 5
    segments = make_segments([prompt] + [completion] * count, [-1] + [0] * count)
    q, k, v, _, grad_out = make_inputs(segments.num_tokens, dtype=dtype, value_size=K)
    grad_out[:prompt] = 0

    def packed(attention: Any, *tensors: Tensor) -> list[Tensor]:
        tensors = tuple(x.detach().requires_grad_() for x in tensors)
        out = attention(*tensors, segments)
        grads = torch.autograd.grad(out, tensors, grad_out.to(out.dtype))
        return [out.detach()[prompt:], *grads]

    def repeated(q: Tensor, k: Tensor, v: Tensor, _: Segments) -> Tensor:
        rows = [
            torch.cat([torch.arange(prompt), torch.arange(completion) + prompt + i * completion])
            for i in range(count)
        ]
        batch = (x[torch.stack(rows)].transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)
        return torch.cat([out[0, :, :prompt], *out[:, :, prompt:]], 1).transpose(0, 1)

    truth = packed(segment_attention_reference, q.double(), k.double(), v.double())
    ours, theirs = packed(segment_attention, q, k, v), packed(repeated, q, k, v)
    for x, y, z in zip(ours, theirs, truth, strict=True):
        assert (x - z).norm() <= factor * (y - z).norm()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def arguments_of(
    segments: Segments, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor, paths.Tables, Options]:
    *tensors, grad_out = make_inputs(segments.num_tokens, dtype=dtype)
    tables = paths.tables_of(segments.lengths, segments.parents, H, torch.device("cpu"))
    return tensors, grad_out, tables, Options(0.3, None, None)


@pytest.mark.parametrize("prompt", [1500, 40])
def test_no_tensor_is_larger_than_a_tile_or_the_inputs(prompt: int) -> None:
    segments = make_segments([prompt] + [50] * 60, [-1] + [0] * 60)
    tensors, grad_out, tables, options = arguments_of(segments)
    with LargestTensor() as largest:
        out = paths.forward(*tensors, tables, options)
        paths.backward(grad_out, out, *tensors, tables, options)
    # A sink is one more column of the scores, of which there are at least 16.
    assert largest.numel <= max(paths.MAX_SCORES * 17 // 16, segments.num_tokens * H * K)


def test_work_follows_the_visible_pairs() -> None:
    segments = make_segments([300] + [40] * 16 + [64], [-1] + [0] * 16 + [-1])
    tensors, _, tables, options = arguments_of(segments)
    with FlopCounterMode(display=False) as counter:
        paths.forward(*tensors, tables, options)
    visible = int(segments.visibility().sum())
    assert counter.get_total_flops() <= 1.25 * 2 * visible * H * (K + KV)


def operator_arguments(with_sinks: bool) -> tuple[Any, ...]:
    segments = make_segments([7, 5, 0, 3], [-1, 0, 0, 0])
    q, k, v, sinks, _ = make_inputs(15, dtype=torch.float32)
    tensors = [x.requires_grad_() for x in (q, k, v, sinks)]
    forest = (segments.lengths, segments.parents)
    if with_sinks:
        return (*tensors, *forest, 0.3, 4, 2.0)
    return (*tensors[:3], None, *forest, 0.3, None, None)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_operators_pass_opcheck(with_sinks: bool) -> None:
    arguments = operator_arguments(with_sinks)
    torch.library.opcheck(path_attention_op, arguments)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    grad_out, out = torch.randn(2, 15, H, KV, generator=torch.Generator().manual_seed(1))
    torch.library.opcheck(path_attention_gradients_op, (grad_out, out, *detached))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(dtype: torch.dtype) -> None:
    segments = make_segments([7, 5], [-1, 0])
    tensors = make_inputs(12, dtype=dtype)[:3]
    real = segment_attention(*tensors, segments)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = segment_attention(*[mode.from_tensor(x) for x in tensors], segments)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_compiled_function_gives_the_same_bits() -> None:
    segments = make_segments([30, 9, 12], [-1, 0, 0])
    inputs = make_inputs(51, dtype=torch.float32)

    def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, sinks: Tensor) -> Tensor:
        return segment_attention(q * 2, k, v, segments, sinks=sinks, window=17)

    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    results = zip(run(compiled, inputs, segments), run(attention, inputs, segments), strict=True)
    assert all(torch.equal(x, y) for x, y in results)


def test_autocast_changes_nothing() -> None:
    segments = make_segments([30, 9], [-1, 0])
    inputs = make_inputs(39, dtype=torch.float32)
    expected = run(segment_attention, inputs, segments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = run(segment_attention, inputs, segments)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_heads_first_layout_gives_the_same_bits() -> None:
    segments = make_segments([70, 9, 30], [-1, 0, 0])
    inputs = make_inputs(109, dtype=torch.float32)
    heads_first = [
        x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() == 3 else x for x in inputs
    ]
    expected = run(segment_attention, inputs, segments)
    results = run(segment_attention, heads_first, segments)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
