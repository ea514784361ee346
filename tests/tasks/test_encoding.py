"""Prompts to tokens and back, with real tokenizers of one token per character."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from fastrl.encoding import decode_completions, encode_prompts, encode_solution
from fastrl.errors import InputError
from fastrl.types import Example

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
BOS, EOS = 1, 2
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools\nhere') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def build_tokenizer(*, chat_template=None, single="<bos> $A <eos>", eos_token="<eos>"):
    characters = [chr(code) for code in range(32, 127)]
    vocab = {token: index for index, token in enumerate(SPECIAL + characters)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    special_tokens = [("<bos>", BOS), ("<eos>", EOS)]
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=special_tokens
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token=eos_token, pad_token="<pad>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def ids_of(text):
    return [len(SPECIAL) + ord(character) - 32 for character in text]


def encode(prompt, tokenizer, *, max_prompt_length=100, chat_template=None):
    prompts = encode_prompts(
        [Example(prompt)],
        tokenizer,
        max_prompt_length=max_prompt_length,
        chat_template=chat_template,
    )
    return prompts.token_ids[0].tolist()


CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]


def test_a_plain_prompt_keeps_bos_and_loses_the_added_eos():
    tokenizer = build_tokenizer()
    assert encode("hi a", tokenizer) == [BOS, *ids_of("hi a")]
    assert encode("hi", build_tokenizer(single="<bos> $A")) == [BOS, *ids_of("hi")]
    without_eos = build_tokenizer(single="<bos> $A", eos_token=None)
    assert encode("hi", without_eos) == [BOS, *ids_of("hi")]


def test_an_eos_written_in_the_prompt_is_kept():
    assert encode("hi<eos>", build_tokenizer(single="<bos> $A")) == [BOS, *ids_of("hi"), EOS]


def test_messages_and_wrapped_strings_go_through_the_template():
    tokenizer = build_tokenizer(chat_template=TEMPLATE)
    assert encode(CHAT, tokenizer) == ids_of("[system]s[user]hi[assistant]")
    assert encode(CHAT, tokenizer, chat_template=True) == ids_of("[system]s[user]hi[assistant]")
    assert encode("hi", tokenizer) == ids_of("[user]hi[assistant]")
    assert encode("hi", tokenizer, chat_template=True) == ids_of("[user]hi[assistant]")
    assert encode("hi", tokenizer, chat_template=False) == [BOS, *ids_of("hi")]


def test_prompts_keep_their_examples_and_order():
    examples = [Example("one"), Example("b", answer="2")]
    prompts = encode_prompts(examples, build_tokenizer(), max_prompt_length=4, chat_template=None)
    assert prompts.examples == tuple(examples)
    assert [ids.tolist() for ids in prompts.token_ids] == [
        [BOS, *ids_of("one")],
        [BOS, *ids_of("b")],
    ]


@pytest.mark.parametrize(
    ("prompt", "template", "options", "message"),
    [
        ("x" * 100, None, {"max_prompt_length": 9}, r"max_prompt_length=9 tokens, got 101 for 'xx"),
        ("hi", None, {"chat_template": True}, "chat_template=True needs a tokenizer with a chat"),
        (CHAT, None, {}, "the prompt 'hi' is a chat, which needs a tokenizer with a chat template"),
        (CHAT, TEMPLATE, {"chat_template": False}, "the prompt 'hi' is a chat, which needs"),
        (
            [{"role": "tool", "content": "t"}],
            TEMPLATE,
            {},
            "template refuses the prompt 't': no tools here; change",
        ),
    ],
)
def test_bad_prompts(prompt, template, options, message):
    with pytest.raises(InputError, match=message) as caught:
        encode(prompt, build_tokenizer(chat_template=template), **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(InputError, match="must have 1 to max_prompt_length=100 tokens, got 0"):
        encode("", build_tokenizer(single="$A <eos>"))


def test_decoding_skips_special_tokens_and_keeps_spaces():
    completions = [
        torch.tensor([*ids_of(" a , b ."), EOS]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([BOS, *ids_of("x")]),
    ]
    assert decode_completions(completions, build_tokenizer()) == [" a , b .", "", "x"]


def test_a_solution_is_the_answer_and_one_eos():
    ids = encode_solution(Example("q", answer="42"), build_tokenizer(), max_completion_length=9)
    assert ids.tolist() == [*ids_of("42"), EOS]
    assert ids.dtype == torch.int64


def test_bad_solutions():
    with pytest.raises(InputError, match="the prompt 'q' has no reference answer to learn from"):
        encode_solution(Example("q"), build_tokenizer(), max_completion_length=9)
    with pytest.raises(InputError, match="the tokenizer has no eos_token"):
        encode_solution(
            Example("q", answer="1"), build_tokenizer(eos_token=None), max_completion_length=9
        )


def test_solution_over_the_limit_is_refused():
    example = Example("q", answer="42 42 42 42")
    with pytest.raises(InputError, match="more than max_completion_length=3; raise it"):
        encode_solution(example, build_tokenizer(), max_completion_length=3)
