"""4-bit weights: rows against loops over single values, and against bitsandbytes itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl_kernels import LMHead, linear_logps
from fastrl_kernels.head import check_inputs, weight_rows
from fastrl_kernels.nf4 import NF4Weight, from_params4bit

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [x / 12 for x in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)]
HALF = [torch.bfloat16, torch.float16]
SHAPES = [(63, 123), (123, 63), (257, 5), (5, 257), (7, 64), (1, 1)]


class Packed(SimpleNamespace):
    """A quantised weight and, by loops over its values, what it stands for."""

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    values: list[float]  # products of two float32, exact


def pack(shape: tuple[int, int], block_size: int, table: list[float] = NF4) -> Packed:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.tensor(table)
    levels = codebook.tolist()
    weight = torch.randn(shape, generator=generator).flatten().tolist()
    num_blocks = -(-len(weight) // block_size)
    blocks = [weight[i * block_size : (i + 1) * block_size] for i in range(num_blocks)]
    absmax = torch.tensor([max(map(abs, block)) for block in blocks])
    factors = absmax.tolist()
    nibbles, values = [], []
    for factor, block in zip(factors, blocks, strict=True):
        for value in block:
            nibble = min(range(16), key=lambda i: abs(levels[i] - value / factor))
            nibbles.append(nibble)
            values.append(levels[nibble] * factor)
    padded = [*nibbles, 0] if len(nibbles) % 2 else nibbles
    packed = [16 * padded[i] + padded[i + 1] for i in range(0, len(padded), 2)]
    return Packed(
        packed=torch.tensor(packed, dtype=torch.uint8),
        absmax=absmax,
        codebook=codebook,
        values=values,
    )


def make_weight(
    shape: tuple[int, int], dtype: torch.dtype, block_size: int = 64
) -> tuple[NF4Weight, Tensor]:
    """The weight, and all its rows by the loops above."""
    made = pack(shape, block_size)
    weight = NF4Weight(made.packed, made.absmax, made.codebook, block_size, *shape, dtype)
    return weight, torch.tensor(made.values).to(dtype).view(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("block_size", [2, 64])
def test_rows_are_those_of_the_loop(
    shape: tuple[int, int], dtype: torch.dtype, block_size: int
) -> None:
    weight, expected = make_weight(shape, dtype, block_size)
    assert (weight.shape, weight.device) == (shape, torch.device("cpu"))
    num_rows = shape[0]
    slices = [(0, num_rows), (num_rows // 3, num_rows // 2), (num_rows - 1, num_rows), (0, 0)]
    for start, stop in [*slices, *((row, row + 1) for row in range(min(num_rows, 9)))]:
        rows = weight.rows(start, stop)
        assert rows.dtype == dtype
        assert torch.equal(rows, expected[start:stop])
    head = LMHead(weight)
    assert torch.equal(weight_rows(head, slice(1, None)), expected[1:])
    assert torch.equal(weight_rows(head, slice(0, 3)), weight_rows(LMHead(expected), slice(0, 3)))


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made inside."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out._is_view():
            self.num_bytes = max(self.num_bytes, out.numel() * out.itemsize)
        return out


def test_a_slice_costs_memory_for_itself_and_reads_nothing_else() -> None:
    weight, expected = make_weight((257, 123), torch.float32)
    first_block, last_block = 31 * 123 // 64, -(-50 * 123 // 64)
    weight.absmax[:first_block] = weight.absmax[last_block:] = torch.nan
    with Largest() as largest:
        rows = weight.rows(31, 50)
    assert torch.equal(rows, expected[31:50])
    assert largest.num_bytes <= 4 * (19 * 123 + 2 * 64)


def make_params4bit(made: Packed, shape: tuple[int, int], **changes: Any) -> nn.Parameter:
    """As much of a Params4bit as is looked at: one column of bytes and a quant_state."""
    weight = nn.Parameter(made.packed[:, None], requires_grad=False)
    state = {"shape": torch.Size(shape), "dtype": torch.float32, "blocksize": 64, "nested": False}
    state |= {"absmax": made.absmax, "code": made.codebook} | changes
    weight.quant_state = SimpleNamespace(**state)  # type: ignore[attr-defined]
    return weight


@pytest.mark.parametrize("table", [NF4, FP4])
def test_reading_a_quantised_parameter(table: list[float]) -> None:
    made = pack((63, 123), 64, table)
    expected = torch.tensor(made.values).view(63, 123)
    weight = from_params4bit(make_params4bit(made, (63, 123)), torch.bfloat16)
    assert weight.packed.data_ptr() == made.packed.data_ptr()
    assert torch.equal(weight.rows(0, 63), expected.bfloat16())
    assert from_params4bit(make_params4bit(made, (63, 123)), None).dtype == torch.float32
    stored = make_params4bit(made, (63, 123))
    stored.data = nn.functional.pad(made.packed, (0, 1)).view(torch.bfloat16)[:, None]
    assert torch.equal(from_params4bit(stored, torch.float32).rows(0, 63), expected)


def test_statistics_that_are_quantised_themselves() -> None:
    made = pack((63, 123), 64)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(256, made.absmax.shape, generator=generator, dtype=torch.uint8)
    code = torch.randn(256, generator=generator)
    factors = torch.rand(-(-codes.numel() // 50), generator=generator)
    offset = torch.tensor(0.7)
    # Rounded after the product and after the sum, as bitsandbytes does in two kernels.
    resolved = [code[c] * factors[i // 50] + offset for i, c in enumerate(codes.tolist())]
    changes = {
        "absmax": codes,
        "nested": True,
        "offset": offset,
        "state2": SimpleNamespace(code=code, absmax=factors, blocksize=50, dtype=torch.float32),
    }
    weight = from_params4bit(make_params4bit(made, (63, 123), **changes), torch.float32)
    assert torch.equal(weight.absmax, torch.stack(resolved))


class FakeModel:
    """As much of a model as from_model looks at."""

    def __init__(self, output_layer: Any, vocab_size: int) -> None:
        self.output_layer = output_layer
        self.config = SimpleNamespace(vocab_size=vocab_size)

    def get_output_embeddings(self) -> Any:
        return self.output_layer


@pytest.mark.parametrize("compute_dtype", [torch.float64, None])
def test_logps_of_a_4_bit_head(compute_dtype: torch.dtype | None) -> None:
    made = pack((257, 63), 64)
    weight = make_params4bit(made, (257, 63), dtype=torch.float64)
    bias = torch.arange(257.0, dtype=torch.float64) / 100
    layer = SimpleNamespace(weight=weight, bias=bias, compute_dtype=compute_dtype)
    head = LMHead.from_model(FakeModel(layer, 257))
    dense = LMHead(torch.tensor(made.values).double().view(257, 63), bias)
    hidden = torch.randn(9, 63, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    hidden.requires_grad_()
    target_ids = torch.arange(9) * 28
    ours = linear_logps(hidden, head, target_ids).logps
    expected = linear_logps(hidden, dense, target_ids).logps
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(ours.sum(), hidden)
    torch.testing.assert_close(
        grad, torch.autograd.grad(expected.sum(), hidden)[0], rtol=0, atol=1e-12
    )
    assert LMHead.from_model(FakeModel(layer, 250)).num_columns == 250


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 62}, "shape"),
        ({"dtype": torch.bfloat16}, "one dtype"),
        ({"num_rows": 255}, "packed"),
        ({"absmax": torch.zeros(7)}, "absmax"),
        ({"absmax": torch.zeros(253, dtype=torch.bfloat16)}, "absmax"),
        ({"codebook": torch.zeros(16, device="meta")}, "meta"),
        ({"block_size": 63}, "even block_size"),
    ],
)
def test_parts_that_do_not_fit_raise(changes: dict[str, Any], message: str) -> None:
    weight, _ = make_weight((257, 63), torch.float32)
    inputs = torch.zeros(3, 63), torch.zeros(3, dtype=torch.int64)
    check_inputs(inputs[0], LMHead(weight), inputs[1])
    with pytest.raises(ValueError, match=message):
        check_inputs(inputs[0], LMHead(weight._replace(**changes)), inputs[1])


@pytest.mark.parametrize("shape", [(3, 1), (5, 3), (1, 1)])
def test_an_odd_number_of_values_adds_no_row(shape: tuple[int, int]) -> None:
    weight, dense = make_weight(shape, torch.float32)
    hidden = torch.ones(2, shape[1])
    target_ids = torch.tensor([0, shape[0] - 1])
    ours = linear_logps(hidden, LMHead(weight), target_ids)
    expected = linear_logps(hidden, LMHead(dense), target_ids)
    assert all(map(torch.equal, ours, expected))
    with pytest.raises(ValueError, match=f"below the vocabulary size {shape[0]}"):
        linear_logps(hidden, LMHead(weight), target_ids + 1)


def test_weights_that_cannot_be_read_raise() -> None:
    made = pack((5, 257), 64)
    repacked = make_params4bit(made, (5, 257), packing_format_for_cpu=True)
    with pytest.raises(ValueError, match="packed anew"):
        from_params4bit(repacked, torch.float32)
    with pytest.raises(ValueError, match="without quant_state"):
        from_params4bit(nn.Parameter(torch.zeros(5, 257)), torch.float32)
    with pytest.raises(ValueError, match="of shape"):
        from_params4bit(make_params4bit(made, (5, 259)), torch.float32)


@pytest.mark.parametrize("shape", [(63, 124), (257, 122), (63, 123), (5, 257), (33, 512)])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_rows_are_those_of_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype, quant_type: str, nested: bool
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    parameter = bnb.nn.Params4bit(dense, quant_type=quant_type, compress_statistics=nested)
    parameter = parameter.to("cpu")
    weight = from_params4bit(parameter, None)
    assert (weight.dtype, type(weight.packed)) == (dtype, Tensor)
    with torch.compiler.set_stance("force_eager"):  # it compiles what it does for odd sizes
        expected = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    assert torch.equal(weight.rows(0, shape[0]), expected)
    assert torch.equal(weight.rows(2, 5), expected[2:5])


def make_4bit_model(compute_dtype: torch.dtype | None = None) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=83, hidden_size=24, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    layer = bnb.nn.Linear4bit(24, 83, bias=False, compute_dtype=compute_dtype)
    dense = torch.randn(83, 24, generator=torch.Generator().manual_seed(4))
    layer.weight = bnb.nn.Params4bit(dense, quant_type="nf4", module=layer)
    # In eval mode a CPU with bfloat16 instructions gets the weight packed anew.
    model.lm_head = layer.to("cpu")
    return model.requires_grad_(False).train()


def check_model(model: Any, language_model: Any) -> LMHead:
    """Compare with the model's own logits, which are rounded to the dtype of the weight."""
    input_ids = torch.randint(3, 83, (1, 17), generator=torch.Generator().manual_seed(5))
    head = LMHead.from_model(model)
    logits = model(input_ids=input_ids).logits[0, :-1]
    hidden = language_model.model(input_ids=input_ids).last_hidden_state[0, :-1]
    target_ids = input_ids[0, 1:]
    ours = linear_logps(hidden.to(head.weight.dtype), head, target_ids).logps
    expected = logits.double().log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]
    rounding = torch.finfo(head.weight.dtype).eps * float(logits.detach().abs().max())
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=max(1e-5, rounding))
    return head


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16])
def test_logits_of_a_model_with_a_4_bit_head(compute_dtype: torch.dtype | None) -> None:
    model = make_4bit_model(compute_dtype=compute_dtype)
    head = check_model(model, model)
    assert isinstance(head.weight, NF4Weight)
    assert head.weight.dtype == (compute_dtype or torch.float32)


def test_logits_of_a_4_bit_head_under_lora() -> None:
    peft = pytest.importorskip("peft")
    model = make_4bit_model(compute_dtype=torch.float32)
    model.is_loaded_in_4bit = True  # by this PEFT chooses its layer
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], r=3))
    layer = model.get_output_embeddings()
    nn.init.normal_(layer.lora_B["default"].weight, generator=torch.Generator().manual_seed(6))
    head = check_model(model, model.get_base_model())
    assert isinstance(head.weight, NF4Weight)
    assert head.lora_b is layer.lora_B["default"].weight


def test_other_heads_of_bitsandbytes_raise() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = make_4bit_model()
    model.lm_head = bnb.nn.Linear8bitLt(24, 83, bias=False, has_fp16_weights=False)
    with pytest.raises(ValueError, match="Int8Params"):
        LMHead.from_model(model)
    model.lm_head = bnb.nn.Linear4bit(24, 83, bias=False)
    with pytest.raises(ValueError, match="without quant_state"):
        LMHead.from_model(model)
