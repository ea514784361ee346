"""Offline DPO with LoRA on layers and head: no logits, and every prompt is encoded once."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

import fastrl
from fastrl.preferences import LOSSES, PreferenceInputs, preference_terms
from fastrl_kernels import LMHead, linear_logps

torch.manual_seed(0)
sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, tie_word_embeddings=False))
model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "lm_head"]))
optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=5e-3)

prompts = [torch.randint(97, (n,)) for n in (9, 4, 6)]
pairs = [[torch.randint(97, (n,)) for n in lengths] for lengths in ((5, 7), (3, 6), (8, 2))]
plan = fastrl.pack(prompts, pairs)  # of each pair the chosen one comes first
rewards, groups = torch.tensor([1.0, 0.0] * 3), torch.arange(3).repeat_interleave(2)
of_rows = (plan.completion_index, torch.tensor(plan.completion_lengths), groups, rewards)


def token_logps() -> torch.Tensor:
    """(S,) log-probabilities of every token of every completion."""
    with plan.attach(model):
        hidden = model.get_decoder()(**plan.inputs).last_hidden_state[0]
    return linear_logps(hidden[plan.source_index], LMHead.from_model(model), plan.target_ids).logps


with torch.no_grad(), model.disable_adapter():
    ref_logps = token_logps()
for step in range(6):
    logps = token_logps()
    terms = preference_terms(LOSSES["dpo"], PreferenceInputs(logps.detach(), *of_rows, ref_logps))
    (logps * terms.slopes).sum().backward()  # the slope of the loss at each token
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {terms.loss:.4f}")
