"""A loop of one's own with accelerate: groups of completions, their rewards, one step on them."""

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM

from fastrl.integrations.transformers import fuse

torch.manual_seed(0)
accelerator = Accelerator()
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97, "eos_token_id": 0}
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model, optimizer = accelerator.prepare(fuse(model), optimizer)

num_generations, length = 8, 12
prompts = torch.randint(1, 97, (4, 20), device=accelerator.device)
for step in range(12):
    with torch.no_grad():
        sequences = accelerator.unwrap_model(model).generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
            num_return_sequences=num_generations, min_new_tokens=length, max_new_tokens=length,
        )  # fmt: skip
    is_even = sequences[:, -length:] % 2 == 0  # the task: even tokens
    rewards = is_even.float().mean(1).view(-1, num_generations)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)

    labels = sequences.clone()
    labels[:, :-length] = -100  # what stands before a row's first label is its prompt
    logps = model(sequences, labels=labels).logps[:, -length:]  # no logits; prompts stand once
    ratios = (logps - logps.detach()).exp()  # 1, with the gradient of a policy gradient
    accelerator.backward(-(advantages.view(-1, 1) * ratios).mean())
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: reward {rewards.mean():.3f}")
