"""Tasks from files: what a record may be, the held-out split, epochs and every bad input."""

from __future__ import annotations

import json

import pytest

from fastrl.errors import InputError
from fastrl.tasks import load_task


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return str(path)


def load(path, *, seed=0, eval_size=0, args=None, **options):
    return load_task(f"jsonl:{path}", args or {}, seed=seed, eval_size=eval_size, **options)


def numbered(count):
    return [{"prompt": f"question {i}", "answer": i, "level": i % 3} for i in range(count)]


def prompts(task, start, stop):
    return [task.train_example(index).prompt for index in range(start, stop)]


@pytest.mark.parametrize(
    ("record", "prompt", "answer", "columns"),
    [
        ({"prompt": "a", "answer": "x", "n": [1]}, "a", "x", {"n": [1]}),
        ({"prompt": "a", "answer": 3}, "a", "3", {}),
        ({"prompt": "a", "answer": 0.5}, "a", "0.5", {}),
        ({"prompt": "a", "answer": None}, "a", None, {}),
        (
            {"prompt": [{"role": "user", "content": "é"}]},
            [{"role": "user", "content": "é"}],
            None,
            {},
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "r"},
                ]
            },
            [{"role": "user", "content": "q"}],
            "r",
            {},
        ),
        (
            {"messages": [{"role": "user", "content": "q"}], "answer": "r"},
            [{"role": "user", "content": "q"}],
            "r",
            {},
        ),
    ],
)
def test_records(tmp_path, record, prompt, answer, columns):
    example = load(write(tmp_path / "t.jsonl", [record])).train_example(0)
    assert (example.prompt, example.answer, dict(example.columns)) == (prompt, answer, columns)


def test_turns_are_asked_one_after_the_other(tmp_path):
    """All that the user says; what is held out is a conversation, not its first message."""
    scripts = [["hi", "a"], ["hi", "b"], ["hi"], ["hi", "a", "c"]]
    path = write(tmp_path / "t.jsonl", [{"turns": x, "answer": x[-1], "n": 1} for x in scripts])
    task = load(path, eval_size=2)
    found = [task.train_example(i) for i in range(2)] + task.eval_examples()
    asked = {(x.prompt[0]["content"], *x.later_turns): (x.prompt, x.answer) for x in found}
    assert asked == {tuple(x): ([{"role": "user", "content": x[0]}], x[-1]) for x in scripts}
    assert all(dict(x.columns) == {"n": 1} for x in found)


def test_a_mixture_tells_conversations_by_all_of_their_turns(tmp_path):
    first = write(tmp_path / "a.jsonl", [{"turns": ["hi", f"{k}"]} for k in range(4)])
    second = write(tmp_path / "b.jsonl", [{"turns": ["hi", f"{k}"]} for k in range(8)])
    parts = [{"task": f"jsonl:{path}"} for path in (first, second)]
    mixture = load_task("mixture", {"tasks": parts}, seed=0, eval_size=4)
    held_out = {x.later_turns for x in mixture.eval_examples()}
    trained = {x.later_turns for x in map(mixture.train_example, range(60))}
    assert trained == {(f"{k}",) for k in range(8)} - held_out


def test_a_key_of_some_records_is_none_in_the_others(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"prompt": "a", "n": 1}, {"prompt": "b", "m": 2}])
    task = load(path)
    columns = {task.train_example(i).prompt: dict(task.train_example(i).columns) for i in range(2)}
    assert columns == {"a": {"n": 1, "m": None}, "b": {"n": None, "m": 2}}


def test_byte_order_mark_and_blank_lines_are_ignored(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": "b"}')
    assert sorted(prompts(load(path), 0, 2)) == ["a", "b"]


def test_relative_paths_start_at_the_current_directory(tmp_path, monkeypatch):
    write(tmp_path / "t.jsonl", [{"prompt": "a"}])
    monkeypatch.chdir(tmp_path)
    assert load("t.jsonl").train_example(0).prompt == "a"


def test_every_epoch_is_a_new_order_of_all_records(tmp_path):
    path = write(tmp_path / "t.jsonl", numbered(30))
    task, same, other = load(path, seed=2), load(path, seed=2), load(path, seed=3)
    epochs = [prompts(task, 30 * epoch, 30 * epoch + 30) for epoch in range(3)]
    everything = sorted(record["prompt"] for record in numbered(30))
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert prompts(same, 60, 90) == epochs[2]
    assert prompts(other, 0, 30) != epochs[0]


def test_held_out_records_are_not_trained_on(tmp_path):
    records = [record for record in numbered(10) for _ in range(2)]  # every prompt twice
    path = write(tmp_path / "t.jsonl", records)
    task = load(path, eval_size=4)
    held_out = {example.prompt for example in task.eval_examples()}
    trained = set(prompts(task, 0, 100))
    assert len(task.eval_examples()) == 4
    assert trained.isdisjoint(held_out)
    assert trained | held_out == {record["prompt"] for record in records}
    assert load(path, eval_size=4).eval_examples() == task.eval_examples()


def test_a_held_out_file_is_used_and_removed_from_training(tmp_path):
    path = write(tmp_path / "t.jsonl", numbered(6))
    as_chat = {"prompt": [{"role": "user", "content": "question 2"}]}
    eval_path = write(tmp_path / "e.jsonl", [as_chat, {"prompt": "new"}, {"prompt": "question 5"}])
    task = load(path, eval_size=None, eval_path=eval_path)
    assert [example.prompt for example in task.eval_examples()] == [
        as_chat["prompt"],
        "new",
        "question 5",
    ]
    assert set(prompts(task, 0, 40)) == {f"question {i}" for i in (0, 1, 3, 4)}
    task = load(path, eval_size=2, eval_path=eval_path)
    assert [example.prompt for example in task.eval_examples()] == [as_chat["prompt"], "new"]
    assert set(prompts(task, 0, 40)) == {f"question {i}" for i in (0, 1, 3, 4, 5)}
    with pytest.raises(InputError, match=r"eval_size=4, and .*e.jsonl has 3 records; lower"):
        load(path, eval_size=4, eval_path=eval_path)


def test_without_a_size_as_many_are_held_out_as_by_default(tmp_path):
    path = write(tmp_path / "t.jsonl", numbered(140))
    assert len(load(path, eval_size=None).eval_examples()) == 128


def test_system_prompt_is_put_in_front(tmp_path):
    chat = [{"role": "user", "content": "b"}]
    path = write(tmp_path / "t.jsonl", [{"prompt": "a"}, {"prompt": chat}])
    task = load(path, system_prompt="S")
    found = sorted(prompts(task, 0, 2), key=lambda messages: messages[-1]["content"])
    assert found == [
        [{"role": "system", "content": "S"}, {"role": "user", "content": text}] for text in "ab"
    ]


def test_a_file_has_no_verifier(tmp_path):
    task = load(write(tmp_path / "t.jsonl", numbered(2)))
    assert not task.has_verifier
    with pytest.raises(InputError, match="no verifier; set rewards to 'exact', 'math'"):
        task.score("1", task.train_example(0))


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"t.jsonl:2: .*malformed JSON \(.* at column \d+\)"),
        ("[1]", r"t.jsonl:2: expected a JSON object, got a list \(\[1\]\)"),
        ('{"answer": "a"}', "t.jsonl:2: expected exactly one of the keys .*, got 'answer'"),
        ("{}", "t.jsonl:2: expected exactly one of the keys .*, got no key at all"),
        ('{"prompt": "a", "messages": []}', "t.jsonl:2: expected exactly one of the keys"),
        ('{"prompt": "a", "turns": ["b"]}', "exactly one .*'turns', got 'prompt', 'turns'"),
        ('{"turns": []}', r"t.jsonl:2: 'turns' must be a non-empty list of what the user says"),
        ('{"turns": "a"}', "what the user says, got a string"),
        ('{"turns": ["a", 3]}', r"t.jsonl:2: turn 2 must be a string, got a number \(3\)"),
        ('{"turns": ["a", " "]}', "t.jsonl:2: turn 2 is empty"),
        ('{"prompt": 3}', r"t.jsonl:2: 'prompt' must be a string or messages, got a number \(3\)"),
        ('{"prompt": " "}', "t.jsonl:2: 'prompt' is empty"),
        ('{"prompt": []}', r"t.jsonl:2: 'prompt' must be a non-empty list, got a list \(\[\]\)"),
        ('{"messages": "q"}', "t.jsonl:2: 'messages' must be a non-empty list, got a string"),
        ('{"messages": [{"role": "user"}]}', r"must have 'role' and 'content', got an .*'role'"),
        ('{"messages": ["q"]}', "t.jsonl:2: message 0 of 'messages' must have 'role'"),
        (
            json.dumps({"messages": [{"role": "user", "content": ["q"]}]}),
            "t.jsonl:2: 'content' of message 0 of 'messages' must be a string, got a list",
        ),
        (
            json.dumps({"messages": [{"role": "user", "content": ""}]}),
            "t.jsonl:2: the last message of 'messages' is empty",
        ),
        (
            json.dumps({"messages": [{"role": "assistant", "content": "r"}]}),
            "t.jsonl:2: 'messages' holds only the answer",
        ),
        (
            json.dumps({"messages": [USER, {"role": "assistant", "content": "r"}], "answer": "r"}),
            "t.jsonl:2: both 'answer' and a last assistant message",
        ),
        (
            json.dumps({"prompt": [USER, {"role": "assistant", "content": "r"}]}),
            "t.jsonl:2: 'prompt' ends with an assistant message; call the key 'messages'",
        ),
        ('{"prompt": "a", "answer": true}', r"'answer' must be .* got a boolean \(true\)"),
        ('{"prompt": "a", "answer": ["b"]}', r"'answer' must be a string or a number, got a list"),
        ('{"prompt": "a", "completions": 1}', "t.jsonl:2: the key 'completions' is reserved"),
    ],
)
def test_bad_records_are_reported_with_their_line(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(
        InputError, match=r"cannot read the task file .*missing.jsonl: No such file"
    ):
        load(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match=r"cannot read the task file .*: Is a directory"):
        load(tmp_path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(InputError, match=r"empty.jsonl is empty; expected one JSON object a line"):
        load(empty)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(InputError, match=r"latin.jsonl must be UTF-8 text"):
        load(latin)
    broken_eval = tmp_path / "e.jsonl"
    broken_eval.write_text("nonsense")
    with pytest.raises(InputError, match=r"e.jsonl:1: "):
        load(write(tmp_path / "t.jsonl", numbered(3)), eval_path=str(broken_eval))


def test_bad_splits_and_options(tmp_path):
    path = write(tmp_path / "t.jsonl", numbered(3))
    with pytest.raises(InputError, match="has 3 records and holding out 3 leaves no other prompt"):
        load(path, eval_size=3)
    with pytest.raises(InputError, match="has 3 records and holding out 3 leaves no other prompt"):
        load(path, eval_size=None, eval_path=path)
    with pytest.raises(InputError, match="a jsonl task takes no task_args, got level"):
        load(path, args={"level": 2})
    with pytest.raises(InputError, match="answer_tag='answer' tells a verifier"):
        load(path, answer_tag="answer")
    system = {"prompt": [{"role": "system", "content": "s"}, USER]}
    with pytest.raises(InputError, match=r"s.jsonl:1: system_prompt was set, but the prompt 'q' "):
        load(write(tmp_path / "s.jsonl", [system]), system_prompt="S")
