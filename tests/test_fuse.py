"""Fused models beside themselves unfused: numbers, gradients, copies, refusals."""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastrl.errors import InputError
from fastrl.integrations.replaced_forward import replace_forward, restore_forward
from fastrl.integrations.transformers import FusedOutput, fuse, unfuse
from tests.helpers import tiny_model
from tests.kernels.test_linear_logps_memory import OPERATORS, MemoryLog

V = 61
EXACT = {"atol": 1e-5, "rtol": 1e-5}
GPT2 = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
SHARED: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gemma2": {},  # a softcap
    "cohere": {},  # a scale, and a head that is the embedding
    "mixtral": {"num_local_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
PADDED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({"state_size": 4}, "linear_attention"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "attention interface"),
    "gpt2": (GPT2, "counts the positions of padding"),
}


class Batch(NamedTuple):
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self._asdict()

    @property
    def places(self) -> Tensor:
        return self.labels[:, 1:] >= 0


def batch_of(num_prompts: int = 2, *, vocab_size: int = V, length: int = 14) -> Batch:
    """Three completions a prompt, padded on both sides, with untrained tokens and a whole row."""
    generator = torch.Generator().manual_seed(5)
    rows = 3 * num_prompts
    ids = torch.randint(3, vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        prompt = 3 + row // 3 % 4
        ids[row, 6 - prompt : 6] = ids[row - row % 3, 6 - prompt : 6]
        mask[row, : 6 - prompt] = 0
        mask[row, length - row % 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :6] = -100
    labels[1, 8:10] = -100
    labels[rows - 1] = -100
    return Batch(ids, mask, labels)


def model_of(model_type: str = "qwen3", **fields: Any) -> Any:
    return tiny_model(model_type, vocab_size=V, dtype=torch.float32, **fields)


def gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def own_statistics(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(B, L - 1) log-probabilities and entropies from all the logits, zero without label."""
    logps = logits[:, :-1].float().log_softmax(-1)
    entropies = -(logps.exp() * logps).sum(-1)
    targets = batch.labels[:, 1:].clamp(min=0)
    return logps.gather(2, targets[..., None])[..., 0] * batch.places, entropies * batch.places


def assert_same(model: Any, batch: Batch) -> None:
    """Loss, tables and all gradients of `fuse(model)` are the model's own."""
    own = model(**batch.inputs)
    expected = gradients(own.loss, model)
    logps, entropies = own_statistics(model(**batch.inputs).logits, batch)
    own_sum = gradients((logps + 0.3 * entropies).sum(), model)
    fused = fuse(model)(**batch.inputs)
    assert type(fused) is FusedOutput
    assert list(fused) == ["loss", "logps", "entropies"]
    torch.testing.assert_close(fused.loss, own.loss, **EXACT)
    torch.testing.assert_close(fused.logps, logps, **EXACT)
    torch.testing.assert_close(fused.entropies, entropies, **EXACT)
    torch.testing.assert_close(gradients(fused.loss, model), expected, **EXACT)
    fused = model(**batch.inputs)
    summed = gradients((fused.logps + 0.3 * fused.entropies).sum(), model)
    torch.testing.assert_close(summed, own_sum, atol=3e-5, rtol=1e-5)
    unfuse(model)


@pytest.mark.parametrize("model_type", SHARED)
def test_a_model_that_shares_prompts(model_type: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(model_of(model_type, **SHARED[model_type]), batch_of())


@pytest.mark.parametrize("model_type", PADDED)
def test_a_model_that_does_not_warns_once_and_pads_rows(model_type: str) -> None:
    fields, reason = PADDED[model_type]
    model = model_of(model_type, **fields)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(model, batch_of())
    messages = [str(w.message) for w in caught if "prompts are not shared" in str(w.message)]
    assert len(messages) == 1
    assert reason in messages[0]


@pytest.mark.parametrize("model_type", PADDED)
def test_strict_raises_where_prompts_are_not_shared(model_type: str) -> None:
    fields, reason = PADDED[model_type]
    model = model_of(model_type, **fields)
    with pytest.raises(InputError, match=reason):
        fuse(model, strict=True)(**batch_of().inputs)


def test_padded_rows_on_request_without_a_warning() -> None:
    model, batch = model_of(), batch_of()
    own = model(**batch.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = fuse(model, share_prefixes=False)(**batch.inputs)
    torch.testing.assert_close(fused.loss, own.loss, **EXACT)


@pytest.mark.parametrize("kwargs", [{"position_ids": torch.arange(14)[None] * 2}])
def test_positions_of_the_caller_are_kept(kwargs: dict[str, Tensor]) -> None:
    model, batch = model_of(), batch_of()
    own = model(**batch.inputs, **kwargs).loss
    assert abs(own - model(**batch.inputs).loss) > 0.01
    fuse(model)
    with pytest.warns(UserWarning, match="position_ids"):
        torch.testing.assert_close(model(**batch.inputs, **kwargs).loss, own, **EXACT)
    with pytest.raises(InputError, match="position_ids"):
        fuse(unfuse(model), strict=True)(**batch.inputs, **kwargs)


def test_a_mask_with_a_gap_keeps_positions() -> None:
    model, batch = model_of(), batch_of()
    batch.attention_mask[0, 4] = 0
    own = model(**batch.inputs).loss
    with pytest.warns(UserWarning, match="between others"):
        torch.testing.assert_close(fuse(model)(**batch.inputs).loss, own, **EXACT)


def test_without_a_mask_and_with_one_prompt_a_row() -> None:
    model, batch = model_of(), batch_of()
    batch = Batch(batch.input_ids, torch.ones_like(batch.input_ids), batch.input_ids.clone())
    own = model(batch.input_ids, labels=batch.labels)
    fused = fuse(model)(batch.input_ids, labels=batch.labels)  # by position, too
    torch.testing.assert_close(fused.loss, own.loss, **EXACT)
    torch.testing.assert_close(fused.logps, own_statistics(own.logits, batch)[0], **EXACT)


def test_labels_that_are_not_the_tokens_read() -> None:
    model, batch = model_of(), batch_of()
    batch.labels[batch.labels >= 0] = 7
    assert_same(model, batch)


def test_temperature_divides_the_logits() -> None:
    model, batch = model_of(), batch_of()
    logps, entropies = own_statistics(model(**batch.inputs).logits / 0.7, batch)
    fused = fuse(model, temperature=0.7)(**batch.inputs)
    torch.testing.assert_close(fused.logps, logps, **EXACT)
    torch.testing.assert_close(fused.entropies, entropies, **EXACT)
    torch.testing.assert_close(fused.loss, -logps.sum() / batch.places.sum(), **EXACT)


@pytest.mark.parametrize("num_items", [17, torch.tensor(17)])
def test_num_items_in_batch_takes_the_place_of_the_count(num_items: int | Tensor) -> None:
    model, batch = model_of(), batch_of()
    own = model(**batch.inputs, num_items_in_batch=num_items).loss
    fused = fuse(model)(**batch.inputs, num_items_in_batch=num_items).loss
    torch.testing.assert_close(fused, own, **EXACT)


@pytest.mark.parametrize("share_prefixes", ["auto", False])
def test_target_ids_reach_past_the_last_column(share_prefixes: Any) -> None:
    model, batch = model_of(), batch_of()
    last = torch.tensor([5, -100, -100, 9, -1, -100])  # of rows whose last column is no padding
    targets = torch.cat([batch.labels[:, 1:], last[:, None]], 1)
    logits = model(batch.input_ids, batch.attention_mask).logits
    logps = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    logps = logps * (targets >= 0)
    fused = fuse(model, share_prefixes=share_prefixes)(
        batch.input_ids, attention_mask=batch.attention_mask, target_ids=targets
    )
    torch.testing.assert_close(fused.logps, logps, **EXACT)
    torch.testing.assert_close(fused.loss, -logps.sum() / (targets >= 0).sum(), **EXACT)


def test_target_ids_are_labels_shifted() -> None:
    model, batch = fuse(model_of()), batch_of()
    targets = torch.cat([batch.labels[:, 1:], torch.full((6, 1), -100)], 1)
    of_labels = model(**batch.inputs)
    of_targets = model(batch.input_ids, batch.attention_mask, target_ids=targets)
    assert of_targets.logps.shape == batch.input_ids.shape
    assert torch.equal(of_targets.logps[:, :-1], of_labels.logps)
    assert torch.equal(of_targets.loss, of_labels.loss)
    assert not of_targets.entropies[:, -1].any()


def test_a_batch_without_labels_is_a_zero_that_has_a_gradient() -> None:
    model, batch = fuse(model_of()), batch_of()
    batch.labels.fill_(-100)
    fused = model(**batch.inputs)
    assert fused.loss == 0
    found = gradients(fused.loss, model)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"target_ids": torch.zeros(6, 14, dtype=torch.int64)}, "both labels and target_ids"),
        ({"shift_labels": torch.zeros(6, 14, dtype=torch.int64)}, "shift_labels.* target_ids"),
        ({"logits_to_keep": 3}, "logits_to_keep"),
        ({"logits_to_keep": torch.arange(3)}, "logits_to_keep"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"use_cache": True}, "use_cache"),
        ({"return_dict": False}, "return_dict"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_router_logits": True}, "output_router_logits"),
        ({"inputs_embeds": torch.zeros(6, 14, 32)}, "inputs_embeds"),
        ({"skip_logits": True}, "skip_logits"),
        ({"labels": torch.zeros(6, 13, dtype=torch.int64)}, r"\(6, 13\)"),
        ({"attention_mask": torch.ones(6, 1, 14, 14)}, r"\(6, 1, 14, 14\)"),
        ({"input_ids": None}, "needs input_ids"),
    ],
)
def test_what_gives_no_logps_is_refused_by_name(kwargs: dict[str, Any], named: str) -> None:
    model, batch = fuse(model_of()), batch_of()
    with pytest.raises(InputError, match=named):
        model(**{**batch.inputs, **kwargs})


def test_arguments_at_their_defaults_are_taken() -> None:
    model, batch = fuse(model_of()), batch_of()
    names = ("past_key_values", "output_attentions", "output_hidden_states", "return_dict")
    fused = model(**batch.inputs, **dict.fromkeys(names), use_cache=False, logits_to_keep=0)
    assert torch.equal(fused.loss, model(**batch.inputs).loss)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_router_logits", "return_dict"])
def test_what_a_config_asks_for_is_refused_by_name(name: str) -> None:
    model = fuse(model_of("mixtral", num_local_experts=4))
    setattr(model.config, name, name != "return_dict")
    with pytest.raises(InputError, match=rf"config\.{name}"):
        model(**batch_of().inputs)


def test_arguments_of_fuse_are_checked() -> None:
    for settings, named in (
        ({"temperature": 0.0}, "temperature"),
        ({"workspace_mb": -1}, "workspace_mb"),
        ({"share_prefixes": True}, "share_prefixes"),
        ({"share_prefixes": False, "strict": True}, "strict"),
    ):
        model = model_of()
        with pytest.raises(InputError, match=named):
            fuse(model, **settings)
        assert "forward" not in vars(model)


def test_models_that_cannot_be_fused() -> None:
    model = model_of()
    with pytest.raises(InputError, match="got Linear"):
        fuse(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="before it is wrapped"):
        fuse(torch.nn.DataParallel(model))
    with pytest.raises(InputError, match="output embedding"):
        fuse(model.model)
    with pytest.raises(InputError, match="already"):
        fuse(fuse(model))
    with pytest.raises(InputError, match="not fused"):
        unfuse(unfuse(model))


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("bert", {"is_decoder": True}, "not what its head makes"),  # a layer before the head
        ("bart", {"is_decoder": True, "d_model": 32, "decoder_layers": 1}, "its loss is"),
        ("bamba", {"z_loss_coefficient": 0.01}, "its loss is"),
    ],
)
def test_a_model_with_another_loss_is_found_out(
    model_type: str, fields: dict[str, Any], reason: str
) -> None:
    sizes = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
    model = model_of(model_type, **fields, **(sizes if model_type == "bamba" else {}))
    model.config.is_encoder_decoder = False
    with pytest.raises(InputError, match=f"cannot be fused.*{reason}"):
        fuse(model)(**batch_of().inputs)


def test_the_check_leaves_modes_and_random_numbers_alone() -> None:
    model, batch = fuse(model_of()).train(), batch_of()
    model.model.layers[0].eval()
    torch.manual_seed(0)
    model(**batch.inputs)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))
    assert model.training
    assert model.model.layers[1].mlp.training
    assert not model.model.layers[0].mlp.training


def test_undone_exactly_and_generating_meanwhile() -> None:
    model, batch = model_of(), batch_of()
    before, signature = dict(vars(model)), inspect.signature(model.forward)
    prompt = batch.input_ids[:2, 2:6]
    logits = model(prompt).logits
    tokens = model.generate(prompt, max_new_tokens=5, do_sample=False)
    fuse(model)
    assert torch.equal(model(prompt).logits, logits)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), tokens)
    assert unfuse(model) is model
    assert vars(model) == before
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model(prompt, labels=prompt).logits, logits)


def test_the_signature_is_the_models_own_and_target_ids() -> None:
    model = model_of()
    own = inspect.signature(model.forward).parameters
    fused = inspect.signature(fuse(model).forward).parameters
    assert fused.keys() == own.keys() | {"target_ids"}
    assert all(fused[name] == own[name] for name in own)


def test_copies_and_pickles_are_fused_and_their_own() -> None:
    model, batch = model_of(), batch_of()
    loss = fuse(model, temperature=0.5)(**batch.inputs).loss
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert model(**batch.inputs).loss != loss
    for other in copies:
        assert torch.equal(other(**batch.inputs).loss, loss)
        assert other(batch.input_ids).logits.any()
        unfuse(other)
        assert vars(other).keys() == vars(unfuse(copy.deepcopy(model))).keys()
        assert torch.equal(other(batch.input_ids).logits, other.forward(batch.input_ids).logits)


def test_weights_are_saved_and_read_as_before(tmp_path: Any) -> None:
    model, batch = model_of(), batch_of()
    keys = list(model.state_dict())
    loss = fuse(model)(**batch.inputs).loss
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(read) is type(model)
    assert "logits" in read(**batch.inputs)
    assert torch.equal(fuse(read)(**batch.inputs).loss, loss)


def double(model: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    return 2 * original(*args, **kwargs).logits


def test_a_forward_of_the_instance_comes_back() -> None:
    model, batch = model_of(), batch_of()
    replace_forward(model, double)
    with pytest.raises(InputError, match="already"):
        fuse(model)
    with pytest.raises(InputError, match="not fused"):
        unfuse(model)
    logits = model(batch.input_ids) / 2
    restore_forward(model)
    assert torch.equal(model(batch.input_ids).logits, logits)
    model.forward = own = type(model).forward.__get__(model)  # as hooks and patches leave it
    fuse(model)(**batch.inputs)
    unfuse(model)
    assert model.forward is own


class LargestTensor(MemoryLog):
    """A log that looks inside the operators of the head alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastrl" and func not in OPERATORS:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_no_logits_forward_or_backward_and_few_tokens_in_the_trunk() -> None:
    """S x V is more than any tensor; the trunk sees the row in which a prompt stands once."""
    vocab_size = 4099
    batch = batch_of(40, vocab_size=vocab_size)
    model = tiny_model(vocab_size=vocab_size, dtype=torch.float32)
    fuse(model, workspace_mb=1)(**batch_of(1, vocab_size=vocab_size).inputs)  # checked
    seen = []
    model.model.layers[0].register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    num_tokens = int(batch.places.sum())
    with LargestTensor() as log:
        model(**batch.inputs).loss.backward()
    assert log.largest <= 2**20 / 4  # the workspace, and more than a gradient of V x D
    assert num_tokens * vocab_size > 3 * 2**20 / 4
    prompts = 10 * (3 + 4 + 5 + 6)
    last = [int(row.nonzero().max()) for row in batch.labels[:-1] >= 0]
    assert seen == [(1, prompts + sum(column - 6 for column in last), 32)]
