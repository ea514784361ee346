"""What the benchmarks of claims, of scaling and of the memory frontier make of their numbers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import headlines
from bench_frontier import MAX_CONTEXT, next_context
from bench_methods import read_case
from bench_scaling import AXES, BASE, fit, sizes_of
from bench_shared_prefix import Case
from headline_cases import CLAIMS, LEARNERS, config_of
from headline_prefix import Shape, gradient_errors, ways
from headline_report import came_out, cost_of, render, target_of, value_at
from headline_steps import STEPS
from rows import OURS

from fastrl.config_io import objective_of
from fastrl.methods.checks import check_generations
from fastrl.methods.resolve import resolve_method


def run(learner, seed, passes, seconds=10.0, samples=1000):
    points = [
        {"step": i, "seconds": i * seconds, "samples": i * samples,
         "trained_tokens": 3 * i * samples, "pass_at_1": value}
        for i, value in enumerate(passes)
    ]  # fmt: skip
    before = {"seconds": 0.0, "samples": 0}
    return {"learner": learner, "seed": seed, "said": learner, "before": before, "points": points}


def test_costs_are_read_off_the_curve_between_its_points():
    curve = run("GRPO", 0, [0.2, 0.1, 0.5, 0.6])
    assert target_of(curve) == pytest.approx(0.5)
    assert cost_of(curve, 0.3, "samples") == pytest.approx(1500)
    assert cost_of(curve, 0.2, "samples") == 0
    assert cost_of(curve, 0.7, "seconds") is None
    assert value_at(curve, "samples", 1500) == pytest.approx(0.3)
    assert value_at(curve, "trained_tokens", 9000) == pytest.approx(0.6)
    assert target_of(run("GRPO", 0, [0.4, 0.3])) == pytest.approx(0.4)


def test_a_method_in_half_the_time_has_half_the_seconds_in_its_table():
    runs = [run("GRPO", s, [0.2, 0.4, 0.6]) for s in (0, 1)]
    runs += [run("SFPO", s, [0.2, 0.4, 0.6], seconds=5.0) for s in (0, 1)]
    table = render({"learning": runs, "steps": [], "prefix": [], "environment": {}})
    assert [line.count("2 of 2") for line in table.splitlines() if line.startswith("| GRPO")] == [1]
    seconds = {line.split("|")[1].split(":")[0].strip(): line.split("|")[8].strip()
               for line in table.splitlines() if line.startswith(("| GRPO", "| SFPO"))}  # fmt: skip
    assert seconds == {"GRPO": "15 (15 to 15)", "SFPO": "8 (8 to 8)"}
    assert CLAIMS["sfpo"].title in table
    assert CLAIMS["rapid"].title not in table, "there is no run of RAPID"


def test_what_came_out_counts_what_was_sampled_before_and_runs_that_never_get_there():
    first, second, third, _ = CLAIMS["astar_po"].learners
    slow = [0.2, 0.4, 0.6, 0.8, 1.0]
    late = run(second, 0, slow, seconds=5.0)
    late["before"] = {"samples": 400, "seconds": 3.0}
    runs = [run(first, 0, slow), late, run(third, 0, [0.2, 0.2, 0.2, 0.2, 0.2])]
    told = came_out(CLAIMS["astar_po"]._replace(learners=(first, second, third)), runs)
    at = [cost_of(runs[0], target_of(runs[0]), key) for key in ("samples", "seconds")]
    assert f"{second} gets there in 1 of 1 runs" in told
    assert f"{(at[0] + 400) / at[0]:.2f}x of the samples" in told
    assert f"{(at[1] / 2 + 3) / at[1]:.2f}x of the seconds" in told
    assert f"{third} gets there in 0 of 1 runs of " in told


def test_a_run_is_done_once_and_again_where_its_settings_changed(tmp_path):
    first, *_ = headlines.jobs_of(["spo"], [0], quick=False)
    assert first.found(tmp_path) is None
    path = first.path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"settings": first.settings, "learner": first.name}))
    assert first.found(tmp_path)["learner"] == first.name
    changed = first._replace(settings={**first.settings, "optim.learning_rate": 1.0})
    assert changed.found(tmp_path) is None


def test_jobs_that_several_claims_need_are_done_once():
    jobs = headlines.jobs_of(list(CLAIMS), [0, 1], quick=True)
    assert len({job.path(Path()) for job in jobs}) == len(jobs)
    names = {job.name for job in jobs if job.kind == "learning"}
    assert names == set(LEARNERS)
    assert {job.name for job in jobs if job.kind == "steps"} <= set(STEPS)


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_every_learner_is_a_method_that_trains(name, tmp_path):
    config = config_of(name, 3, tmp_path)
    method = resolve_method(config.method, objective_of(config))
    check_generations(method, config.rollout.num_generations)
    assert config.seed == 3
    per_update = config.prompts_per_step * config.rollout.num_generations / config.num_mini_batches
    assert per_update == 1024
    assert config.max_steps % config.eval.eval_steps == 0


def test_gradients_of_a_shared_prompt_are_those_of_single_sequences():
    names = list(ways())
    errors = gradient_errors(Shape(17, 3, 5), 0, names)
    assert OURS in names[0]
    assert max(errors.values()) < 1e-13


def test_an_exponent_is_found_with_its_error():
    exact = fit([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)])
    assert exact.exponent == pytest.approx(1.5)
    assert exact.standard_error == pytest.approx(0, abs=1e-9)
    x, y = [1, 2, 4, 8], [1, 2.2, 3.6, 8.4]
    noisy = fit(x, y)
    slopes, covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    assert noisy.exponent == pytest.approx(slopes[0])
    assert noisy.standard_error == pytest.approx(covariance[0, 0] ** 0.5)


@pytest.mark.parametrize("axis", sorted(AXES))
def test_an_axis_changes_one_size_and_has_the_base_nowhere_or_once(axis):
    found = sizes_of(axis, quick=False)
    assert len(found) >= 4
    for _, sizes in found:
        assert sum(a != b for a, b in zip(sizes, BASE, strict=True)) <= 1
    assert [value for value, _ in found] == sorted({value for value, _ in found})


def test_the_frontier_is_found_where_memory_is_a_line_and_where_it_bends():
    for peak in (lambda c: 50 + 3 * c, lambda c: 10 + c + c * c / 5000):
        budget = peak(3000)
        tried = {512: peak(512), 1024: peak(1024)}
        for _ in range(6):
            wanted = next_context(tried, budget)
            if wanted is None:
                break
            tried[wanted] = peak(wanted)
        best = max(c for c in tried if tried[c] <= budget)
        assert 2850 <= best <= 3000
    assert next_context({512: 1.0, 1024: 2.0}, 1000) == MAX_CONTEXT
    assert next_context({512: 1000.0, 1024: 2000.0}, 10) == 64, "the shortest may fit"
    assert next_context({64: 900.0, 512: 1000.0, 1024: 2000.0}, 10) is None


def test_cases_of_ones_own():
    assert read_case("2,128,64,8") == Case(2, 128, 64, 8)
    for text in ("2,128,64", "a,b,c,d", "0,128,64,8", "1,128,64,1"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            read_case(text)
