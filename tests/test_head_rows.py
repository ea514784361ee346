"""Padded batches as rows at the head: shared prompts against the model's own padded forward."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastrl.errors import InputError
from fastrl.integrations.head_rows import RowMaker, head_rows, why_not_shared

V, L = 61, 14
PROMPTS = [[3, 4, 5, 6], [7, 8]]
COMPLETIONS = [(0, [9, 10, 11]), (1, [12]), (0, [13, 14, 15, 16, 17]), (1, [18, 19, 20])]


def tiny_model(kind: str = "qwen3", **fields):
    config = AutoConfig.for_model(
        kind, vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double()


def batch():
    """Prompts padded on the left, completions on the right, one token in between not trained."""
    ids, mask = torch.zeros(4, L, dtype=torch.int64), torch.zeros(4, L, dtype=torch.int64)
    labels = torch.full((4, L), -100)
    for row, (prompt, completion) in enumerate(COMPLETIONS):
        begin = 6 - len(PROMPTS[prompt])
        tokens = torch.tensor(PROMPTS[prompt] + completion)
        ids[row, begin : begin + len(tokens)] = tokens
        mask[row, begin : begin + len(tokens)] = 1
        labels[row, 6 : 6 + len(completion)] = torch.tensor(completion)
    labels[2, 8] = -100
    return ids, mask, labels


def expected_logps(model, ids, mask, labels):
    """From all logits of one forward per sequence without padding."""
    table = torch.zeros(4, L - 1, dtype=torch.float64)
    for row in range(4):
        positions = mask[row].nonzero()[:, 0]
        logps = model(ids[row, positions][None]).logits[0].log_softmax(-1)
        for place, position in enumerate(positions.tolist()):
            if labels[row, position] >= 0:
                table[row, position - 1] = logps[place - 1, ids[row, position]]
    return table


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_logps_and_gradients_are_those_of_one_forward_per_sequence(share_prefixes):
    model, weights = tiny_model(), torch.randn(4, L - 1, dtype=torch.float64)
    expected = expected_logps(model, *batch())
    (expected * weights).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    rows = head_rows(model, *batch(), share_prefixes=share_prefixes)
    table = rows.table(rows.linear_logps().logps)
    # Norms and rotary angles of a float64 model are float32.
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-7)
    (table * weights).sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)
    assert torch.equal(rows.table(rows.tokens(expected)), expected)


def test_equal_prompts_stand_once_and_padding_not_at_all():
    model, lengths = tiny_model(), []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    head_rows(model, *batch())
    # Each prompt once; the last token of a completion predicts nothing.
    assert lengths == [4 + 2 + 2 + 0 + 4 + 2]


def test_sequences_without_labels_are_not_there_and_none_at_all_keeps_the_graph():
    model, (ids, mask, labels) = tiny_model(), batch()
    whole = head_rows(model, ids, mask, labels).linear_logps().logps
    labels[3] = -100
    rows = head_rows(model, ids, mask, labels)
    assert len(rows.target_ids) == 3 + 1 + 4
    assert set((rows.places // (L - 1)).tolist()) == {0, 1, 2}
    assert len(whole) == len(rows.target_ids) + 3
    for share_prefixes in (True, False):
        rows = head_rows(model, ids, mask, labels.fill_(-100), share_prefixes=share_prefixes)
        table = rows.table(rows.linear_logps().logps)
        assert table.shape == (4, L - 1)
        model.zero_grad()
        table.sum().backward()
        assert all(not parameter.grad.any() for parameter in model.parameters())


def test_no_mask_is_no_padding_and_a_plain_sequence_has_its_first_token_as_prompt():
    model = tiny_model()
    ids = torch.randint(1, V, (3, 6), generator=torch.Generator().manual_seed(1))
    rows = head_rows(model, ids, None, ids)
    logits = model(ids).logits[:, :-1].log_softmax(-1)
    expected = logits.gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(rows.table(rows.linear_logps().logps), expected, atol=1e-7, rtol=0)


def test_autocast_takes_the_head_in_its_dtype_and_sums_in_float32():
    model, (ids, mask, labels) = tiny_model().float(), batch()
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = RowMaker()(model, ids, mask, labels)
        out = rows.linear_logps()
    assert rows.hidden_states.dtype == rows.lm_head.weight.dtype == torch.bfloat16
    assert out.logps.dtype == torch.float32
    logits = rows.hidden_states.float() @ rows.lm_head.weight.float().T
    expected = logits.log_softmax(-1).gather(1, rows.target_ids[:, None])[:, 0]
    torch.testing.assert_close(out.logps, expected, atol=1e-5, rtol=0)
    out.logps.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_bad_batches_are_refused():
    model, (ids, mask, labels) = tiny_model(), batch()
    with pytest.raises(InputError, match="one shape"):
        head_rows(model, ids, mask[:, 1:], labels)
    with pytest.raises(InputError, match="attention_mask leaves out"):
        head_rows(model, ids, mask, labels.clone().index_fill_(1, torch.tensor([L - 1]), 3))
    first = labels.clone()
    first[1, 4] = 7
    with pytest.raises(InputError, match="first token of sequence 1 is trained"):
        head_rows(model, ids, mask, first)
    with pytest.raises(InputError, match="no place for position_ids"):
        head_rows(model, ids, mask, labels, position_ids=ids)


def test_what_cannot_share_falls_back_with_one_warning_or_raises_if_strict():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_model("qwen3", rope_parameters=rope)
    rows = RowMaker()
    with pytest.warns(UserWarning, match=r"rows are padded: .*rotary embeddings"):
        rows(model, *batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows(model, *batch())
    with pytest.raises(InputError, match=r"prompts cannot be shared: .*rotary embeddings"):
        RowMaker(strict=True)(model, *batch())


def test_a_model_that_shows_it_only_while_it_runs_falls_back(monkeypatch):
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def biased(*args, **kwargs):
        if kwargs.get("segments") is not None:
            kwargs["bias_of_this_layer"] = torch.zeros(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(attention, "forward", biased)
    assert why_not_shared(model, {}) is None
    with pytest.warns(UserWarning, match="adds a mask or bias of its own"):
        rows = RowMaker()(model, *batch())
    assert rows.linear_logps().logps.isfinite().all()
    with pytest.raises(InputError, match="adds a mask or bias"):
        RowMaker(strict=True)(model, *batch())


def test_arguments_that_a_packed_row_lacks_go_to_the_padded_forward():
    model, (ids, mask, labels) = tiny_model(), batch()
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with pytest.warns(UserWarning, match="no place for position_ids"):
        padded = RowMaker()(model, ids, mask, labels, position_ids=position_ids, pixel_values=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared = RowMaker()(model, ids, mask, labels, position_ids=None)
    torch.testing.assert_close(
        padded.table(padded.linear_logps().logps), shared.table(shared.linear_logps().logps),
        atol=1e-7, rtol=0,
    )  # fmt: skip


def test_padding_that_moves_positions_stays():
    model, (ids, mask, labels) = tiny_model(), batch()
    gap = mask.clone()
    gap[0, 4] = 0
    with pytest.warns(UserWarning, match="leaves out tokens between others"):
        RowMaker()(model, ids, gap, labels)
    config = AutoConfig.for_model(
        "gpt2", vocab_size=V, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    learned = AutoModelForCausalLM.from_config(config)
    rows = RowMaker()
    with pytest.warns(UserWarning, match="GPT2LMHeadModel counts the positions of padding"):
        padded = rows(learned, ids, mask, labels)
    logits = learned(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    expected = logits.gather(2, ids[:, 1:, None])[..., 0]
    found = padded.table(padded.linear_logps().logps)
    torch.testing.assert_close(found, padded.table(padded.tokens(expected)), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="counts the positions of padding"):
        RowMaker(strict=True)(learned, ids, mask, labels)
    with warnings.catch_warnings():  # padding behind a sequence moves nothing
        warnings.simplefilter("error")
        whole = torch.ones_like(mask)
        whole[:, 9:] = 0
        rows(learned, ids, whole, labels.masked_fill(whole == 0, -100))
