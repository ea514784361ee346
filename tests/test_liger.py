"""liger-kernel's norms, rotations and SiLU products in one model's layers, against the model's own.

On a machine without a GPU its kernels run in Triton's interpreter, in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from fastrl.errors import InputError
from fastrl.integrations.liger import check_liger, use_liger_kernel
from tests.helpers import tiny_model

needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)
SCRIPT = """
import copy, sys
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

device = "cuda" if torch.cuda.is_available() else "cpu"
as_it_was = interpreter._implicit_cvt

def scalars_too(value):  # a compiled kernel gets a float as a scalar, the interpreter leaves it
    if isinstance(value, float):
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return as_it_was(value)

interpreter._implicit_cvt = scalars_too
if device == "cpu":  # which knows no functions of CUDA's library
    import liger_kernel.ops.rms_norm as norms
    norms.rsqrt = lambda x: tl.rsqrt(x)  # which the interpreter puts there anew
from fastrl.integrations.chunked_mlp import chunk_mlps
from fastrl.integrations.liger import use_liger_kernel
from fastrl.packing import pack
from fastrl.policy import Policy
from tests.helpers import random_ids, tiny_policy

kind = sys.argv[1]
fields = {"query_pre_attn_scalar": 8} if kind == "gemma2" else {}
plain = tiny_policy(model_type=kind, **fields)
untouched = copy.deepcopy(plain.model)
fused = Policy(copy.deepcopy(plain.model).to(device), plain.tokenizer)
use_liger_kernel(fused.model)
names = {type(m).__name__ for m in fused.model.modules() if type(m).__name__.startswith("Liger")}
print(len(names))
plan = pack(random_ids([5, 3]), [random_ids([4, 2], seed=1), random_ids([6, 1], seed=2)])
found = []
for policy in (plain, fused):
    there = plan.to(policy.device)
    hidden = policy.hidden_states(there)
    rows = hidden[there.source_index]
    # Not their squares: those are the same for all rows behind a norm, so without a gradient.
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    (rows * weights.to(rows)).sum().backward()
    gradients = [x.grad.cpu() for x in policy.model.parameters() if x.grad is not None]
    found.append([hidden.detach()[there.source_index].cpu(), *gradients])
for a, b in zip(*found, strict=True):
    assert a.shape == b.shape
    torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5 * float(a.abs().max()))
# A copy is of its own weights, and other models of the class are as they were.
copied = copy.deepcopy(fused.model)
with torch.no_grad():
    for parameter in fused.model.parameters():
        parameter.zero_()
again = Policy(copied, plain.tokenizer).hidden_states(plan.to(fused.device))
assert torch.equal(again[plan.source_index].detach().cpu(), found[1][0])
chunk_mlps(copied, 4)
chunked = Policy(copied, plain.tokenizer).hidden_states(plan.to(fused.device))
torch.testing.assert_close(chunked.detach().cpu(), again.detach().cpu(), rtol=1e-4, atol=1e-5)
assert {type(m).__name__[:7] for m in copied.modules() if "MLP" in type(m).__name__} == {"Chunked"}
theirs = Policy(untouched, plain.tokenizer).hidden_states(plan)
assert torch.equal(theirs[plan.source_index].detach(), found[0][0])
"""


@needs_liger
@pytest.mark.parametrize(("kind", "num_classes"), [("qwen3", 3), ("llama", 3), ("gemma2", 2)])
def test_fused_layers_are_the_model_s_own(kind, num_classes):
    """gemma2 has another activation, so its MLP stays as it is."""
    given = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    paths = os.pathsep.join(["kernels", ".", *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind], capture_output=True, text=True, check=False,
        env={**os.environ, **given, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(num_classes)]


def test_what_liger_cannot_do_is_refused(monkeypatch):
    with pytest.raises(InputError, match=r"knows llama, .*, got gpt2"):
        use_liger_kernel(tiny_model("gpt2", n_embd=32, n_head=4, n_layer=2))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(InputError, match=r"runs on a GPU, got model\.device 'cpu'"):
        check_liger(torch.device("cpu"))
