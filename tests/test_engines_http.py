"""A completions server: what is sent to it, what it records, and everything that it can get wrong.

The server of most tests answers in vLLM's manner from a real model; `transformers serve` is real.
"""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from fastrl.errors import InputError
from fastrl.rollout import Sampling, make_engine
from fastrl.rollout.http import HTTPEngine
from fastrl.types import Example, Prompts
from tests.helpers import tiny_policy
from tests.helpers_engines import generator, prompts_of, same_completions, worst_gap


class Server(ThreadingHTTPServer):
    """Samples from a policy of its own; `spoil` changes an answer, `before` may fail or wait."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.policy = tiny_policy()
        self.lock = threading.Lock()
        self.bodies = []
        self.spoil = lambda answer: answer
        self.before = lambda body: None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, body):
        sampling = Sampling(
            body["n"], body["max_tokens"], temperature=body["temperature"], top_p=body["top_p"],
            top_k=max(body["top_k"], 0), stop_strings=tuple(body["stop"]),
        )  # fmt: skip
        with self.lock:
            self.policy.eos_token_ids = body["stop_token_ids"]
            prompts = Prompts((torch.tensor(body["prompt"]),), (Example(prompt="x"),))
            engine = make_engine("generate", self.policy)
            rollouts = engine.generate(prompts, sampling, generator(body["seed"]))
        rows = zip(rollouts.completion_ids, rollouts.rollout_logps, rollouts.finished, strict=True)
        return {
            "choices": [
                {
                    "index": index,
                    "text": self.policy.tokenizer.decode(ids),
                    "token_ids": ids.tolist(),
                    "prompt_token_ids": body["prompt"],
                    "finish_reason": "stop" if finished else "length",
                    "logprobs": {"token_logprobs": logps.tolist(), "tokens": ["?"] * len(ids)},
                }
                for index, (ids, logps, finished) in enumerate(rows)
            ]
        }


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        status = self.server.before(body)
        if status is None and self.path == "/v1/completions":
            payload = json.dumps(self.server.spoil(self.server.answer(body))).encode()
        else:
            payload = b'{"detail": "no such thing"}'
        with contextlib.suppress(OSError):  # the client may be gone
            self.send_response(status or (200 if self.path == "/v1/completions" else 404))
            self.end_headers()
            self.wfile.write(payload)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def policy():
    policy = tiny_policy()
    policy.eos_token_ids = list(range(0, 300, 12))
    return policy


def engine_of(policy, server, **arguments):
    return HTTPEngine(policy, url=server.url, model="tiny", **{"num_retries": 0, **arguments})


def test_greedy_completions_are_asked_for_one_by_one(policy, server):
    """vLLM refuses n > 1 then."""
    server.before = lambda body: 400 if body["temperature"] == 0.0 and body["n"] > 1 else None
    sampling, prompts = Sampling(3, 8, temperature=0.0, top_k=4), prompts_of([5, 6])
    rollouts = engine_of(policy, server).generate(prompts, sampling, generator())
    expected = make_engine("generate", policy).generate(prompts, sampling, generator())
    assert same_completions(rollouts, expected)
    assert worst_gap(policy, rollouts, sampling) < 1e-5
    for logps in rollouts.processed_logps:
        assert torch.equal(logps, torch.zeros(len(logps)))


def test_a_text_may_begin_with_what_the_prompt_left_unfinished(policy, server):
    """A byte that is no character yet is held back, until vLLM writes it with the completion."""
    server.spoil = each(lambda choice: choice.update(text="\ufffdx " + choice["text"]))
    sampling = Sampling(3, 8)
    rollouts = engine_of(policy, server).generate(prompts_of([5]), sampling, generator())
    assert worst_gap(policy, rollouts, sampling) < 1e-5


@pytest.mark.parametrize("logps", ["raw", "processed"])
def test_ids_and_logps_are_those_of_the_served_model(policy, server, logps):
    sampling = Sampling(4, 12, temperature=1.0 if logps == "raw" else 0.7)
    seen = {}
    engine = engine_of(policy, server, logps=logps)
    rollouts = engine.generate(prompts_of([5, 1, 30]), sampling, generator(), seen.__setitem__)
    assert worst_gap(policy, rollouts, sampling) < 1e-5
    assert rollouts.processed_logps is None
    for b, (ids, finished) in enumerate(
        zip(rollouts.completion_ids, rollouts.finished, strict=True)
    ):
        assert torch.equal(seen[b], ids)
        assert bool(finished) == (int(ids[-1]) in policy.eos_token_ids)
        assert finished or len(ids) == 12
    assert not engine.shares_weights


def test_every_setting_is_sent(policy, server):
    sampling = Sampling(
        3, 9, temperature=1.0, top_p=0.9, top_k=7, min_p=0.05, repetition_penalty=1.1,
        stop_strings=("4",),
    )  # fmt: skip
    engine_of(policy, server).generate(prompts_of([5, 6]), sampling, generator())
    expected = {
        "n": 3, "max_tokens": 9, "temperature": 1.0, "top_p": 0.9, "top_k": 7, "min_p": 0.05,
        "repetition_penalty": 1.1, "stop": ["4"], "stop_token_ids": policy.eos_token_ids,
        "model": "tiny", "return_token_ids": True,
    }  # fmt: skip
    for body in server.bodies:
        assert {name: body[name] for name in expected} == expected
    assert len({body["seed"] for body in server.bodies}) == 2


def test_truncated_logps_are_called_processed_where_they_are(policy, server):
    sampling, prompts = Sampling(3, 6, top_k=5), prompts_of([5])
    raw = engine_of(policy, server, logps="raw").generate(prompts, sampling, generator())
    processed = engine_of(policy, server, logps="processed").generate(
        prompts, sampling, generator()
    )
    assert worst_gap(policy, raw, sampling) < 1e-5
    assert raw.processed_logps is None
    assert processed.rollout_logps is None
    pairs = zip(raw.rollout_logps, processed.processed_logps, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_raw_logps_at_another_temperature_are_refused(policy, server):
    with pytest.raises(InputError, match=r"temperature must be 1, got 0\.5"):
        engine_of(policy, server).generate(
            prompts_of([5]), Sampling(1, 4, temperature=0.5), generator()
        )
    assert server.bodies == []


def test_same_generator_same_completions_from_a_server_that_heeds_seeds(policy, server):
    engine, prompts, sampling = engine_of(policy, server), prompts_of([5, 9]), Sampling(4, 8)
    first = engine.generate(prompts, sampling, generator(3))
    assert same_completions(first, engine.generate(prompts, sampling, generator(3)))
    assert not same_completions(first, engine.generate(prompts, sampling, generator(4)))


def test_ids_may_be_spelt_in_the_tokens_of_the_logps(policy, server):
    prompts, sampling = prompts_of([5]), Sampling(2, 6)
    plain = engine_of(policy, server).generate(prompts, sampling, generator())

    def spell(answer):
        for choice in answer["choices"]:
            ids = choice.pop("token_ids")
            choice["logprobs"]["tokens"] = [f"token_id:{token}" for token in ids]
        return answer

    server.spoil = spell
    assert same_completions(
        plain, engine_of(policy, server).generate(prompts, sampling, generator())
    )


def test_the_server_has_its_own_weights(policy, server):
    sampling, prompts = Sampling(2, 6), prompts_of([5])
    first = engine_of(policy, server).generate(prompts, sampling, generator())
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(-1.0)
    second = engine_of(policy, server).generate(prompts, sampling, generator())
    assert same_completions(first, second)
    assert worst_gap(policy, second, sampling) > 0.1  # what a check against the trainer would see


def one_logp_more(choice):
    choice["logprobs"]["token_logprobs"].append(-1.0)


def one_token_less(choice):
    choice["token_ids"].pop()
    choice["logprobs"]["token_logprobs"].pop()
    choice.pop("text")


def each(change):
    def spoil(answer):
        for choice in answer["choices"]:
            change(choice)
        return answer

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (each(lambda c: c.pop("logprobs")), "no log-probabilities"),
        (each(lambda c: c["logprobs"].update(token_logprobs=None)), "no log-probabilities"),
        (each(one_logp_more), r"log-probabilities for \d+"),
        (each(lambda c: c.pop("token_ids")), "no token ids"),
        (each(lambda c: c["token_ids"].__setitem__(0, 5000)), "token 5000 but the policy has"),
        (each(lambda c: c.update(text="an other tokenizer's")), "its tokenizer is another one"),
        (each(lambda c: c["prompt_token_ids"].append(3)), "other prompt tokens"),
        (each(one_token_less), "ends neither with"),
        (lambda answer: {"choices": answer["choices"][:-1]}, "2 choices where 3 were asked for"),
        (lambda answer: {"choices": answer["choices"] * 2}, "6 choices where 3 were asked for"),
        (lambda answer: {"error": "busy"}, "no list of choices"),
        (lambda answer: ["?"], "no list of choices"),
    ],
)  # fmt: skip
def test_an_answer_that_does_not_fit_is_said(policy, server, spoil, message):
    policy.eos_token_ids = [0]
    server.spoil = spoil
    with pytest.raises(InputError, match=message):
        engine_of(policy, server).generate(prompts_of([5, 6]), Sampling(3, 8), generator())


def test_unreachable(policy):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    engine = HTTPEngine(policy, url=url, model="tiny", num_retries=0)
    with pytest.raises(InputError, match=r"no answer .* in 1 attempts, ConnectionRefusedError"):
        engine.generate(prompts_of([5]), Sampling(1, 4), generator())


def test_a_server_that_takes_too_long_is_asked_again_so_often(policy, server):
    server.before = lambda body: time.sleep(3)
    start = time.monotonic()
    engine = engine_of(policy, server, timeout_s=0.2, num_retries=1)
    with pytest.raises(InputError, match=r"in 2 attempts, it took longer than timeout_s = 0\.2"):
        engine.generate(prompts_of([5]), Sampling(1, 4), generator())
    assert time.monotonic() - start < 2.9
    assert len(server.bodies) == 2


def test_a_server_that_is_busy_is_asked_again(policy, server):
    server.before = lambda body: 503 if len(server.bodies) == 1 else None
    sampling = Sampling(2, 6)
    engine = engine_of(policy, server, num_retries=1)
    rollouts = engine.generate(prompts_of([5]), sampling, generator())
    assert worst_gap(policy, rollouts, sampling) < 1e-5
    assert server.bodies[0] == server.bodies[1]


def test_a_refusal_is_not_asked_again(policy, server):
    server.before = lambda body: 404
    engine = engine_of(policy, server, num_retries=5)
    with pytest.raises(InputError, match=r"refuses a request with status 404: .*no such thing"):
        engine.generate(prompts_of([5]), Sampling(1, 4), generator())
    assert len(server.bodies) == 1


def test_a_failure_does_not_wait_for_the_other_requests(policy, server):
    release = threading.Event()
    server.before = lambda body: 503 if len(body["prompt"]) == 6 and release.wait(20) else None

    def fails(b, ids):
        raise KeyError("mine")

    start = time.monotonic()
    with pytest.raises(KeyError, match="mine"):
        engine_of(policy, server).generate(
            prompts_of([5, 6]), Sampling(1, 4), generator(), on_completion=fails
        )
    assert time.monotonic() - start < 10
    release.set()


def test_arguments_are_checked(policy):
    for arguments, message in (
        ({"url": "localhost:8000"}, "must be like http://localhost:8000"),
        ({"url": "http://localhost:port"}, "no valid port"),
        ({"url": "http://a", "logps": "raww"}, "did you mean 'raw'"),
        ({"url": "http://a", "timeout_s": 0.0}, "timeout_s must be at least"),
        ({"url": "http://a", "num_retries": -1}, "num_retries must be at least 0"),
    ):
        with pytest.raises(InputError, match=message):
            HTTPEngine(policy, model="tiny", **arguments)
