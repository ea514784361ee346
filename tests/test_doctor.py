"""What `fastrl doctor` says about attention, on this machine and on others."""

import pytest
import torch

from fastrl.doctor import ATTENTIONS, attention_rows, examine
from fastrl_kernels import make_segments, segment_attention
from fastrl_kernels.segment_attention.choice import IMPLEMENTATIONS, Machine

GPU = Machine("cuda", (9, 0), has_triton=True, has_flash_attn=False)


def test_here_every_implementation_has_one_state_and_it_is_true():
    states = {
        what.removeprefix("attention "): state
        for what, state in examine()
        if what.startswith("attention ")
    }
    assert set(states) == set(IMPLEMENTATIONS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    segments = make_segments([3, 2], [-1, 0]).to(device)
    q, k, v = torch.zeros(3, 5, 2, 16, dtype=torch.bfloat16, device=device)
    for name, state in states.items():
        if state.startswith("not available: "):
            with pytest.raises(ValueError, match=state.removeprefix("not available: ")):
                segment_attention(q, k, v, segments, implementation=name)
        else:
            segment_attention(q, k, v, segments, implementation=name)


def test_on_a_gpu_the_kernels_and_what_they_do_not_take():
    rows = attention_rows(GPU)
    name, reason = rows[0]
    assert name == "attention triton"
    assert [case for case in ATTENTIONS if case not in reason] == ["bf16/512"]
    assert rows[1][0] == "attention sdpa"
    assert "bf16/512" in rows[1][1]
    assert ("attention flex", "on request") in rows
    assert ("attention varlen", "on request, by PyTorch's flash attention") in rows


def test_on_a_gpu_without_triton_flash_attention_and_masks():
    rows = attention_rows(GPU._replace(has_triton=False, has_flash_attn=True))
    name, reason = rows[0]
    assert name == "attention varlen"
    assert "bf16/128," in reason
    assert "attention sdpa" in dict(rows)
    assert dict(rows)["attention triton"] == "not available: triton is not installed"
