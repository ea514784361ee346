"""The HTTP engine against a real server process: `transformers serve` on a tiny model directory.

It returns text only, so that every token of the test's vocabulary is one character.
"""

import json
import os
import socket
import string
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastrl.errors import InputError
from fastrl.policy import Policy
from fastrl.rollout import Sampling, make_engine
from fastrl.rollout.http import HTTPEngine
from fastrl.types import Example, Prompts
from tests.helpers import tiny_model
from tests.helpers_engines import all_logps, generator, same_completions

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason="transformers serve needs transformers[serving]")

START_SECONDS = 120


def character_tokenizer():
    """One token a character: text has only one way of being tokens, and lacks only the end."""
    characters = string.ascii_letters + string.digits
    vocab = {"<|end|>": 0} | {c: n + 1 for n, c in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )


@pytest.fixture(scope="module")
def policy():
    tokenizer = character_tokenizer()
    model = tiny_model(
        vocab_size=len(tokenizer), dtype=torch.float32, eos_token_id=0, pad_token_id=0,
        max_position_embeddings=256,
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight[0] *= 2.0  # ends are drawn now and then
    return Policy(model, tokenizer)


@pytest.fixture(scope="module")
def served(policy, tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    policy.save(directory)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (directory / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", "serve", str(directory),
         "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"],
        stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(process, address, directory / "log")
        yield address, str(directory)
    finally:
        process.kill()
        process.wait()
        log.close()


def wait_until_healthy(process, address, log):
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=1) as response:
                if json.load(response)["status"] == "ok":
                    return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


def engine_of(policy, served, **settings):
    generation_config = {"eos_token_id": 0, "pad_token_id": 0, "top_k": 0, **settings}
    url, name = served
    return HTTPEngine(
        policy, url=url, model=name, logps="none", timeout_s=60,
        extra_body={"generation_config": json.dumps(generation_config)},
    )  # fmt: skip


def prompts_of(*texts):
    ids = tuple(torch.tensor(character_tokenizer()(text)["input_ids"]) for text in texts)
    return Prompts(ids, tuple(Example(prompt=text) for text in texts))


def test_greedy_completions_are_those_of_generate(policy, served):
    sampling, prompts = Sampling(1, 20, temperature=0.0), prompts_of("What", "is7", "1")
    expected = make_engine("generate", policy).generate(prompts, sampling, generator())
    rollouts = engine_of(policy, served, do_sample=False).generate(prompts, sampling, generator())
    assert same_completions(rollouts, expected)
    assert torch.equal(rollouts.finished, expected.finished)
    assert rollouts.rollout_logps is None
    assert rollouts.processed_logps is None


def test_sampled_completions_follow_the_softmax(policy, served):
    sampling, prompts = Sampling(200, 3, temperature=1.5), prompts_of("What")
    seen = {}
    rollouts = engine_of(policy, served, do_sample=True).generate(
        prompts, sampling, generator(), seen.__setitem__
    )
    drawn = torch.stack([ids[0] for ids in rollouts.completion_ids])
    counts = torch.bincount(drawn, minlength=len(policy.tokenizer)).double() / 200
    expected = all_logps(policy, rollouts, sampling, 0)[0].exp()
    spread = (expected * (1 - expected) / 200).sqrt()
    assert ((counts - expected).abs() < 5 * spread + 5e-3).all()
    assert len({tuple(ids.tolist()) for ids in rollouts.completion_ids}) > 100
    for b, ids in enumerate(rollouts.completion_ids):
        assert torch.equal(seen[b], ids)
        assert bool(rollouts.finished[b]) == (int(ids[-1]) == 0)
    assert rollouts.finished.any()
    assert not rollouts.finished.all()


def test_a_stop_string_ends_a_completion(policy, served):
    prompts = prompts_of("What", "is7", "1", "Zq")
    whole = make_engine("generate", policy).generate(
        prompts, Sampling(1, 20, temperature=0.0), generator()
    )
    texts = [policy.tokenizer.decode(ids) for ids in whole.completion_ids]
    stop = max(texts, key=len)[1:3]
    stopping = Sampling(1, 20, temperature=0.0, stop_strings=(stop,))
    rollouts = engine_of(policy, served, do_sample=False).generate(prompts, stopping, generator())
    lengths = []
    for ids, text, stopped in zip(
        whole.completion_ids, texts, rollouts.completion_ids, strict=True
    ):
        lengths.append(text.index(stop) + 2 if stop in text else len(ids))
        assert stopped.tolist() == ids[: lengths[-1]].tolist()
    assert min(lengths) < 20


def test_what_it_does_not_return_is_said(policy, served):
    engine = HTTPEngine(policy, url=served[0], model=served[1], num_retries=0)
    with pytest.raises(InputError, match=r"status 422: .*Unexpected fields"):
        engine.generate(prompts_of("What"), Sampling(1, 4), generator())


def test_a_model_it_does_not_serve_is_said(policy, served):
    engine = HTTPEngine(policy, url=served[0], model="another", logps="none", num_retries=0)
    with pytest.raises(InputError, match=r"status 400: .*requested 'another'"):
        engine.generate(prompts_of("What"), Sampling(1, 4), generator())


@pytest.mark.parametrize("setting", [{"top_k": 3}, {"min_p": 0.1}, {"repetition_penalty": 1.2}])
def test_what_cannot_be_asked_for_is_said(policy, served, setting):
    with pytest.raises(InputError, match="no part of OpenAI's protocol"):
        engine_of(policy, served).generate(
            prompts_of("What"), Sampling(1, 4, **setting), generator()
        )
