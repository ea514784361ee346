"""`fastrl bench` through the real command line: what it measures, recommends and refuses."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastrl.bench.checking import Checker
from fastrl.bench.estimates import Estimate, Estimator, passes_of
from fastrl.bench.floor import Floor, flops_of, products_of
from fastrl.bench.models import draw_blueprint, load_model
from fastrl.bench.recommend import recommend
from fastrl.bench.request import take_request
from fastrl.bench.rows import Row, table
from fastrl.bench.setup import set_up
from fastrl.bench.techniques import Technique, make_techniques
from fastrl.bench.updates import Updates
from fastrl.bench.workload import ragged_lengths
from fastrl.cli import main
from fastrl.config_io import load_config
from tests.helpers import TINY, tiny_policy, with_float64_norms

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
SMALL = ["--prompt-length", "24", "--completion-length", "16", "--num-generations", "4"]
NAMES = [
    "padded rows, stored logits", "fused head and loss", "packed rows", "shared prefix",
    "sparse heads", "with recomputation", "with chunked MLP", "with both",
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_policy().save(path)
    return path


@pytest.fixture(scope="module")
def measured(directory, tmp_path_factory):
    """One real run: its exit code, output, record and settings."""
    target = tmp_path_factory.mktemp("bench")
    words = ["bench", directory, *SMALL, "--seconds", "120", "--json", target / "x.json",
             "--toml", target / "x.toml"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "fastrl", *map(str, words)],
        capture_output=True, text=True, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((target / "x.json").read_text()), target / "x.toml"


def refused(capsys, *words):
    assert main(["bench", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastrl: ")
    assert error.count("\n") == 1
    return error


def make_updates(*words):
    request = take_request([str(word) for word in words])
    setup = set_up(request)
    policy = load_model(setup.request, setup.device)
    return setup, Updates(policy, setup.work, setup.layout, 1.0)


def test_every_technique_is_measured_and_equal(measured):
    output, record, _ = measured
    rows = record["techniques"]
    assert [row["technique"] for row in rows] == NAMES
    for row in rows:
        assert row["is_correct"] is True
        assert row["gradient_error"] < 1e-4
        assert row["loss_error"] < 1e-5
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        tokens = record["workload"]["num_completion_tokens"]
        assert row["tokens_per_second"] == pytest.approx(1000 * tokens / row["p50_ms"])
        assert row["percent_of_floor"] == pytest.approx(100 * record["floor_ms"] / row["p50_ms"])
        assert row["peak_bytes"] > 0
        assert row["technique"] in output
    assert rows[0]["gradient_error"] == 0.0
    assert record["environment"]["torch"] == torch.__version__
    assert record["environment"]["command"].startswith("fastrl bench ")


def test_the_recommended_settings_are_a_config(measured, directory):
    output, record, path = measured
    config = load_config(path)
    assert config.model.path == str(directory)
    assert config.rollout.num_generations == 4
    assert config.rollout.max_prompt_length == 24
    assert config.max_tokens_per_pass == record["workload"]["max_tokens_per_pass"]
    assert path.read_text() == record["recommended"]["toml"]
    assert path.read_text() in output
    settings = [reason.split(" = ")[0] for reason in record["recommended"]["reasons"]]
    assert "model.gradient_checkpointing" in settings
    assert "optim.optimizer" in settings


def test_a_run_accepts_the_recommended_settings(measured, tmp_path):
    _, _, path = measured
    words = ["train", path, "--task", "reasoning_gym:chain_sum", "--rewards", "task",
             "--max-steps", "1", "--prompts-per-step", "1", "--data.eval-size", "1",
             "--eval.num-samples", "1", "--reward-workers", "0", "--output-dir", tmp_path / "run",
             "--rollout.max-prompt-length", "100"]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_random_weights_of_a_config_alone(capsys, tmp_path):
    fields = {"model_type": "llama", "vocab_size": 97, **TINY}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    words = [path, *SMALL, "--prompts", "1", "--fixed-lengths", "--seconds", "18"]
    assert main(["bench", *map(str, words)]) == 0
    output = capsys.readouterr().out
    assert "4 completions each of 16 to 16, 64 in all" in output
    assert "model.path: not set" in output
    assert 'path = "' not in output


@pytest.mark.parametrize("method", ["grpo", "d3s", "rloo"])
def test_gradients_are_those_of_one_row_at_a_time(directory, method):
    """In float64 against plain transformers without padding, several passes and all modes."""
    setup, updates = make_updates(
        directory, *SMALL, "--method", method, "--max-tokens-per-pass", "100"
    )
    with_float64_norms(updates.policy.model.double())
    updates.layout = setup.layout._replace(dtype=torch.float64)
    assert any(len(passes) > 1 for passes in setup.passes.values())
    truth = one_row_at_a_time(updates)
    for technique in make_techniques(torch.device("cpu"), 16):
        updates.switch(technique)
        updates.release()
        updates.step(technique)()
        for name, parameter in updates.policy.model.named_parameters():
            torch.testing.assert_close(parameter.grad, truth[name], rtol=1e-5, atol=1e-8)


def one_row_at_a_time(updates):
    """Gradients of minus the sum of weight * advantage * logp, on-policy."""
    work, model = updates.work, updates.policy.model
    for b, completion in enumerate(work.rollouts.completion_ids):
        prompt = work.rollouts.prompts.token_ids[b // work.rollouts.num_generations]
        row = torch.cat([prompt, completion])
        logps = model(input_ids=row[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logps = logps.gather(1, completion[:, None])[:, 0]
        (-(work.weights[b] * work.advantages[b] * logps).sum()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    updates.release()
    return found


def test_sparse_heads_have_the_rows_with_a_gradient(directory):
    setup, _ = make_updates(directory, *SMALL, "--zero-spread", "0.5")
    dense, sparse = (
        passes_of(setup.work, setup.layout, Technique("x", drops_tokens=drops))
        for drops in (False, True)
    )
    lengths = setup.work.rollouts.lengths
    assert sum(x.num_trained for x in dense) == int(lengths.sum())
    assert sum(x.num_trained for x in sparse) == int(lengths[8:].sum())
    assert sum(x.num_tokens for x in dense) == 4 * 24 + int(lengths.sum()) - 16
    assert sum(x.num_tokens for x in sparse) == 2 * 24 + int(lengths[8:].sum()) - 8


def test_token_selection_of_a_method_drops_rows(directory):
    setup, _ = make_updates(directory, *SMALL, "--method", "d3s")
    kept = sum(int((row != 0).sum()) for row in setup.work.weights)
    sparse = passes_of(setup.work, setup.layout, Technique("x"))
    assert sum(x.num_trained for x in sparse) == kept
    assert 0 < kept < setup.work.num_tokens


def test_a_wrong_gradient_gets_no_ratio(directory):
    setup, updates = make_updates(directory, *SMALL)
    checker = Checker(updates)
    assert checker.check(setup.rows[0].technique).is_correct
    weights = updates.work.weights
    updates.work = updates.work._replace(weights=tuple(1.5 * row for row in weights))
    found = checker.check(setup.rows[4].technique)
    assert not found.is_correct
    assert found.gradient_error == pytest.approx(0.5, rel=1e-3)
    for row, is_correct in zip(setup.rows[3:5], (True, False), strict=True):
        row.p20_ms = row.p50_ms = row.p80_ms = row.tokens_per_second = 1.0
        row.is_correct, row.loss_error, row.gradient_error = is_correct, 0.0, 0.0
    assert table(setup.rows[3:5])[1][2:4] == ("incorrect", "incorrect")


def test_the_floor_multiplies_what_it_counts(directory):
    setup, _ = make_updates(directory, *SMALL)
    passes = setup.passes["+ sparse heads"]
    products = products_of(setup.blueprint, passes)
    D, I, V = 32, 48, setup.blueprint.vocab_size  # noqa: E741
    a_layer = D * 32 + 2 * D * 16 + 32 * D + 3 * D * I
    tokens, rows = (sum(getattr(x, name) for x in passes) for name in ("num_tokens", "num_trained"))
    assert flops_of(setup.blueprint, passes) == 6 * (2 * a_layer * tokens + V * D * rows)
    floor = Floor(products, device=torch.device("cpu"), dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        floor()
    assert counter.get_total_flops() == flops_of(setup.blueprint, passes)


def test_estimates_grow_as_what_autograd_keeps(directory):
    setup, updates = make_updates(directory, *SMALL)
    assert setup.blueprint.weight_bytes == 4 * sum(
        p.numel() for p in updates.policy.model.parameters()
    )
    found = {row.technique.name.strip(" +"): row.estimate for row in setup.rows}
    assert found["with recomputation"].activations < found["sparse heads"].activations
    assert found["shared prefix"].activations < found["packed rows"].activations
    estimator = Estimator(setup.blueprint, setup.work, setup.layout, bf16=False)
    technique = setup.rows[0].technique
    estimator.estimate(technique)
    counted = 16 * sum(estimator.known.values())
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = updates._padded(range(16))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        updates.policy.body(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
    weights = {p.untyped_storage().data_ptr() for p in updates.policy.model.parameters()}
    real = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in weights)
    assert counted == pytest.approx(real, rel=0.05)


def test_what_does_not_fit_is_left_out_with_its_number(capsys, directory, monkeypatch, tmp_path):
    setup, _ = make_updates(directory, *SMALL)
    sizes = {row.technique.name.strip(" +"): row.estimate.total for row in setup.rows}
    largest = max(sizes, key=sizes.__getitem__)
    limit = sizes[largest] - 1
    monkeypatch.setattr("fastrl.bench.setup.available_bytes", lambda device: limit)
    path = tmp_path / "x.json"
    words = ["bench", str(directory), *SMALL, "--seconds", "18", "--json", str(path)]
    assert main(words) == 0
    assert "left out: needs" in capsys.readouterr().out
    rows = json.loads(path.read_text())["techniques"]
    left_out = [row["technique"] for row in rows if row["p50_ms"] is None]
    assert left_out == [largest]
    monkeypatch.setattr("fastrl.bench.setup.available_bytes", lambda device: 1000)
    assert "the model does not fit: needs" in refused(capsys, directory, *SMALL)


def test_the_memory_limit_decides(directory):
    request = take_request([str(directory), *SMALL, "--memory-limit", "1"])
    blueprint = draw_blueprint(request)
    estimate = Estimate(0, 0, 0, 0)
    fast, lean = Technique("+ sparse heads"), Technique("lean", recomputes=True)
    weights = blueprint.num_trained * 16

    def picked(limit):
        rows = [
            Row(technique, estimate, is_correct=True, p50_ms=ms, peak_bytes=peak)
            for technique, ms, peak in ((lean, 13.0, 2_000), (fast, 10.0, 50_000))
        ]
        asked = dataclasses.replace(request, memory_limit=limit)
        found = recommend(asked, blueprint, rows, 4096)
        return found.fits, found.toml

    assert "gradient_checkpointing = false" in picked(weights + 50_000)[1]
    fits, toml = picked(weights + 49_999)
    assert fits
    assert "gradient_checkpointing = true" in toml
    assert 'precision = "float32"' in toml
    fits, toml = picked(weights + 1_999)
    assert fits
    assert 'precision = "split"' in toml
    fits, toml = picked(1_000)
    assert not fits
    assert 'precision = "stochastic"' in toml


@pytest.mark.parametrize(("count", "longest"), [(64, 128), (7, 63), (1, 5), (3, 1)])
def test_lengths_have_the_mean_and_the_limit(count, longest):
    lengths = ragged_lengths(count, longest, torch.Generator().manual_seed(3)).double()
    assert float(lengths.max()) <= longest
    assert float(lengths.min()) >= 1
    assert float(lengths.mean()) == pytest.approx(max(longest / 2, 1), abs=1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no model directory and no config at nowhere"),
        (["MODEL", "--num-generations", "0"], "num_generations must be at least 1"),
        (["MODEL", "--prompts", "0"], "prompts_per_step must be at least 1"),
        (["MODEL", "--prompt-length", "100", "--completion-length", "29"], "128 positions"),
        (["MODEL", "--max-tokens-per-pass", "20"], "raise --max-tokens-per-pass"),
        (["MODEL", "--seconds", "soon"], "--seconds must be a number"),
        (["MODEL", "--zero-spread", "2"], "at most 1"),
        (["MODEL", "--device", "tpu"], "model.device must be"),
        (["MODEL", "--json", "/nowhere/x.json"], "existing directory"),
        (["MODEL", "--typo", "1"], "unexpected argument '--typo'"),
        ([], "give a model directory or a config"),
    ],
)
def test_one_line_for_every_mistake(capsys, directory, words, message):
    small = [word for word in SMALL if words[1:] and word not in words]
    given = [str(directory) if word == "MODEL" else word for word in words]
    flags = dict(zip(SMALL[::2], SMALL[1::2], strict=True)) if small else {}
    rest = [w for key, value in flags.items() if key not in given for w in (key, value)]
    assert message in refused(capsys, *given, *rest)


@pytest.mark.parametrize("lines", ["lora = {r = 4}", 'precision = "split"', "mlp_chunk_size = 9"])
def test_what_a_config_says_of_the_model_is_measured(directory, tmp_path, lines):
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\npath = "{directory}"\n{lines}\n')
    setup, updates = make_updates(path, *SMALL, "--prompts", "2")
    trained = [p for p in updates.policy.model.parameters() if p.requires_grad]
    assert setup.blueprint.num_trained == sum(p.numel() for p in trained)
    assert setup.blueprint.num_parameters == updates.policy.num_parameters
    assert setup.blueprint.gradient_bytes == sum(p.nbytes for p in trained)
    checker = Checker(updates)
    assert all(checker.check(row.technique).is_correct for row in setup.rows)
    if "chunk" in lines:
        assert setup.rows[-1].technique.mlp_chunk_size == 9


def test_models_that_route_tokens(tmp_path):
    path = tmp_path / "config.json"
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    fields = {"model_type": "qwen3_moe", "vocab_size": 97, **TINY, **experts}
    path.write_text(json.dumps(fields))
    setup, updates = make_updates(path, *SMALL)
    assert setup.blueprint.has_experts
    assert len(setup.rows) == 6
    assert len(setup.remarks) == 2  # MLPs that cannot be cut
    checker = Checker(updates)
    assert all(checker.check(row.technique).is_correct for row in setup.rows)


def test_a_run_config_with_its_own_sizes(capsys, directory, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        f'method = "bnpo"\nmax_tokens_per_pass = 77\n[model]\npath = "{directory}"\n'
        "[rollout]\nnum_generations = 3\nmax_prompt_length = 20\nmax_completion_length = 10\n"
    )
    setup = set_up(take_request([str(path)]))
    assert setup.layout.max_tokens_per_pass == 77
    assert setup.work.method == "bnpo"
    assert setup.work.rollouts.num_generations == 3
    assert len(setup.work.rollouts.prompts.token_ids[0]) == 20
    path.write_text(path.read_text().replace('"bnpo"', '"bnpoo"'))
    assert "did you mean 'bnpo'" in refused(capsys, path)
