"""reasoning_gym tasks: determinism, held-out prompts, verifiers and every bad input."""

from __future__ import annotations

import itertools
import logging
import threading
import time

import pytest
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from fastrl.errors import InputError
from fastrl.tasks import load_task
from fastrl.tasks import procedural as procedural_module
from fastrl.tasks.procedural import CHUNK, tag_text
from fastrl.tasks.time_limit import TimeLimitExceeded, time_limit

TWENTY_PROBLEMS = {"min_n": 1, "max_n": 20}  # count_bits of 1 .. 20


def gym(name, args=None, *, seed=0, eval_size=5, **options):
    return load_task(f"reasoning_gym:{name}", args or {}, seed=seed, eval_size=eval_size, **options)


@pytest.mark.parametrize("name", ["chain_sum", "gcd", "countdown"])
def test_examples_are_a_function_of_seed_and_index(name):
    first, second, other = gym(name, seed=3), gym(name, seed=3), gym(name, seed=4)
    indices = [5, 0, CHUNK + 1, 2, 10**9]
    prompts = [first.train_example(index).prompt for index in indices]
    in_other_order = {i: second.train_example(i).prompt for i in sorted(indices)}
    assert prompts == [in_other_order[index] for index in indices]
    assert first.eval_examples() == second.eval_examples()
    assert prompts != [other.train_example(index).prompt for index in indices]


def test_neighbouring_seeds_and_chunks_share_no_problems():
    # reasoning_gym seeds problem i with seed + i: unmixed, run 8 would be run 7 shifted by one.
    args = {"min_digits": 6, "max_digits": 6}
    runs = [gym("chain_sum", args, seed=seed) for seed in (7, 8)]
    prompts = [
        {run.train_example(start + i).prompt for i in range(50)}
        for run, start in itertools.product(runs, (0, CHUNK))
    ]
    assert len(set.union(*prompts)) == 200


@pytest.mark.parametrize("name", ["chain_sum", "gcd", "countdown"])
def test_the_reference_answer_scores_one_and_another_does_not(name):
    task = gym(name, seed=1)
    for example in [*task.eval_examples(), task.train_example(17)]:
        assert task.score(example.answer, example) == 1.0
        assert task.score(f"  {example.answer}\n", example) == 1.0
        assert task.score("@@", example) < 0.1
        assert example.columns["metadata"] is example.columns["entry"]["metadata"]


def test_partial_credit_is_kept_raw():
    task = gym("chain_sum")
    example = task.train_example(0)
    text = f"It is {example.answer}."
    assert task.score(text, example) == len(example.answer) / len(text)


def test_held_out_prompts_are_distinct_and_never_trained_on():
    task = gym("count_bits", TWENTY_PROBLEMS, eval_size=12)
    held_out = {example.prompt for example in task.eval_examples()}
    trained = {task.train_example(index).prompt for index in range(300)}
    assert len(held_out) == 12
    assert trained.isdisjoint(held_out)
    assert len(trained) == 8
    repeat = gym("count_bits", TWENTY_PROBLEMS, eval_size=12)
    assert [repeat.train_example(i) for i in range(50)] == [
        task.train_example(i) for i in range(50)
    ]


def test_system_prompt_makes_a_chat_and_keeps_the_sets_disjoint():
    task = gym("count_bits", TWENTY_PROBLEMS, eval_size=12, system_prompt="Be brief.")
    plain = gym("count_bits", TWENTY_PROBLEMS, eval_size=12)
    example = task.train_example(3)
    assert example.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": plain.train_example(3).prompt},
    ]
    assert all(example.prompt != held_out.prompt for held_out in task.eval_examples())


def test_eval_size_zero_holds_nothing_out():
    assert gym("gcd", eval_size=0).eval_examples() == []


def test_answer_tag_selects_what_the_verifier_sees():
    task = gym("gcd", answer_tag="answer")
    example = task.train_example(0)
    right = example.answer
    assert task.score(f"<answer>x</answer> no: <answer> {right}\n</answer> yes", example) == 1.0
    assert task.score(f"<answer>{right}</answer><answer>x</answer>", example) == 0.0
    assert task.score(right, example) == 0.0
    assert task.score(f"<answer>{right}", example) == 0.0


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("<a>1</a>", "1"),
        ("<a>1</a> then <a>2", "1"),
        ("<a><a>3</a>", "3"),
        ("</a>4<a>", None),
        ("<a></a>", ""),
        ("", None),
    ],
)
def test_tag_text(text, inside):
    assert tag_text(text, "a") == inside


def test_an_answer_the_scorer_cannot_read_is_wrong():
    task = gym("prime_factorization")  # its scorer calls int() on every word
    example = task.train_example(0)
    assert task.score("no idea", example) == 0.0
    assert task.score(example.answer, example) == 1.0


def test_an_expression_that_takes_forever_is_wrong(monkeypatch, caplog):
    monkeypatch.setattr(procedural_module, "SCORE_SECONDS", 0.3)
    task = gym("countdown")
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        assert task.score("9**9**9**9", task.train_example(0)) == 0.0
    assert time.perf_counter() - start < 3.0
    assert "took over 0.3 s" in caplog.text


def test_time_limit_ends_the_block_and_leaves_no_alarm():
    with pytest.raises(TimeLimitExceeded), time_limit(0.05):
        time.sleep(5.0)
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_time_limit_is_absent_outside_the_main_thread():
    finished = []

    def work():
        with time_limit(0.01):
            time.sleep(0.05)
            finished.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert finished == [True]


def test_composite_mixes_datasets():
    parts = [{"name": name, "weight": 1.0, "config": {}} for name in ("gcd", "chain_sum")]
    task = gym("composite", {"datasets": parts})
    examples = [task.train_example(index) for index in range(20)]
    sources = {example.columns["metadata"]["source_dataset"] for example in examples}
    assert sources == {"gcd", "chain_sum"}
    assert all(task.score(example.answer, example) == 1.0 for example in examples)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("chain_summ", {}, r"unknown reasoning_gym task 'chain_summ'; did you mean 'chain_sum'\?"),
        ("chain_sum", {"min_term": 3}, r"no parameter 'min_term'; did you mean 'min_terms'\?"),
        ("chain_sum", {"min_terms": 9}, r"does not accept min_terms=9: .*defaults are min_terms="),
        ("chain_sum", {"min_terms": "two"}, r"does not accept min_terms=two: "),
        ("chain_sum", {"seed": 1}, "'seed' is not a parameter of a task"),
        ("chain_sum", {"size": 1}, "'size' is not a parameter of a task"),
        ("composite", {}, "does not accept its default parameters: Must specify at least one"),
        ("composite", {"datasets": [{"nam": "gcd"}]}, "list of {name, weight, config} records"),
        (
            "composite",
            {"datasets": [{"name": "gcd", "weight": 1.0, "config": {"seed": 1}}]},
            "'seed' is not a parameter",
        ),
        ("count_bits", {"min_n": 1, "max_n": 1}, "eval_size=5 .* gave only 1 in 306 draws; lower"),
        ("count_bits", {"min_n": 1, "max_n": 5}, "no training prompt outside the 5 held-out ones"),
    ],
)
def test_bad_names_and_parameters(name, args, message):
    with pytest.raises(InputError, match=message) as caught:
        gym(name, args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer_tag": "<answer>"}, "answer_tag must be a bare name .* leave out the brackets"),
        ({"eval_path": "held_out.jsonl"}, "eval_path is for jsonl tasks"),
        ({"eval_size": -1}, "eval_size must be >= 0"),
        ({"seed": -1}, "seed and eval_size must be >= 0, got -1 and 5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        gym("gcd", **options)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("reasoning-gym:gcd", r"unknown kind of task 'reasoning-gym' .*mean 'reasoning_gym'\?"),
        ("gcd", "'reasoning_gym:chain_sum' or 'jsonl:PATH', or 'mixture', got 'gcd'"),
        ("jsonl:", "expected a task like"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(InputError, match=message):
        load_task(spec, {}, seed=0, eval_size=1)


class BrokenDataset(ProceduralDataset):
    """Fails where its config says."""

    def __init__(self, config):
        super().__init__(config, config.seed, config.size)

    def __getitem__(self, idx):
        if self.config.max_n == 1:
            raise RuntimeError("no\nproblem")
        return {"question": f"problem {idx}", "answer": "1", "metadata": {}}

    def score_answer(self, answer, entry):
        raise KeyError("broken scorer")


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setitem(DATASETS, "broken", (BrokenDataset, DATASETS["count_bits"][1]))


@pytest.mark.usefixtures("broken")
def test_a_generator_that_fails_is_reported_with_its_parameters():
    with pytest.raises(
        InputError, match="could not make a problem with min_n=1, max_n=1: no problem; "
    ):
        gym("broken", {"min_n": 1, "max_n": 1})


@pytest.mark.usefixtures("broken")
def test_a_scorer_that_cannot_read_its_own_answer_is_a_defect():
    with pytest.raises(KeyError, match="broken scorer"):
        gym("broken")
