"""TRL's GRPOTrainer with FastRL's forward and backward passes: one import is all that changes."""

from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM
from trl import GRPOConfig

from fastrl.integrations.tokenizer import train_tokenizer
from fastrl.integrations.trl import FastGRPOTrainer


def reward_digits(completions: list[str], **_: object) -> list[float]:
    """How much of a completion is digits."""
    return [sum(letter.isdigit() for letter in text) / (len(text) + 1) for text in completions]


prompts = [f"What is {a} + {b}?" for a in range(4) for b in range(4)]
tokenizer = train_tokenizer(prompts, vocab_size=300)  # yours: AutoTokenizer.from_pretrained(...)
sizes = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer),
    "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
}  # fmt: skip
trainer = FastGRPOTrainer(  # was: GRPOTrainer(
    model=AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes)),
    reward_funcs=reward_digits,
    args=GRPOConfig(
        output_dir="runs/trl", max_steps=3, num_generations=4, per_device_train_batch_size=8,
        max_completion_length=16, learning_rate=1e-3, logging_steps=1, save_strategy="no",
        report_to=[], use_cpu=True, bf16=False,
    ),
    train_dataset=Dataset.from_dict({"prompt": prompts}),
    processing_class=tokenizer,
)  # fmt: skip
trainer.train()
print([entry["reward"] for entry in trainer.state.log_history if "reward" in entry])
