"""docs/results.md is what the committed results say, and goals and pictures are as current."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import pictures
import report_heads
import report_results
import report_rows
from committed import CPU, RESULTS, ROOT, find
from goal_table import counts, is_met, line_of, measured, table
from goals import GOALS
from quantities import GPU, QUANTITIES
from stamps import digest, drawn_from
from suite_cases import gpu_cases

WHERE = {
    "device": "NVIDIA X", "num_threads": "2", "torch": "2.13.0", "commit": "abc1234",
    "command": "python benchmarks/gpu_suite.py",
}  # fmt: skip


def row(case, implementation, milliseconds=1.0, **more):
    values = {"p20_ms": milliseconds, "p50_ms": milliseconds, "p80_ms": milliseconds}
    known = {"correct": True, "peak_bytes": None, "note": "", "environment": WHERE}
    return {"case": case, "implementation": implementation, **values, **known, **more}


def results_with(tmp_path, folder, name, rows):
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results, dirs_exist_ok=True)
    (results / folder).mkdir(exist_ok=True)
    (results / folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return results


def test_the_page_is_made_from_the_committed_results():
    page = report_results.page()
    assert page == report_results.page()
    text = report_results.PAGE.read_text(encoding="utf-8")
    assert text == page, "run python benchmarks/report_results.py"


def test_every_file_of_results_has_its_section_with_its_command():
    text = report_results.page()
    for path in RESULTS.glob("*/*.json"):
        after = text.split(f"[{path.name}](../benchmarks/results/{path.parent.name}/{path.name})")
        assert len(after) == 2, path
        assert re.search(r"`[^`]*(python|fastrl) [^`]+`", after[1].split("\n### ")[0]), path


def test_links_of_the_page_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", report_results.page()):
        target, _, anchor = link.partition("#")
        path = ROOT / "docs" / target
        assert path.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", x).lower().replace(" ", "-") for x in headings]
            assert anchor in slugs, link


@pytest.mark.parametrize("picture", pictures.pictures(), ids=lambda picture: picture.name)
def test_pictures_are_drawn_from_what_is_committed(picture, tmp_path):
    data = picture.data(RESULTS)
    path = pictures.FOLDER / f"{picture.name}.png"
    if data is None:
        assert not path.exists(), f"{path.name} shows what is no longer committed"
        return
    stale = f"{path.name} is stale: run python benchmarks/report_results.py"
    assert drawn_from(path) == digest(data), stale
    pictures.draw(picture, data, tmp_path)
    assert drawn_from(tmp_path / path.name) == digest(data)


@pytest.mark.parametrize(
    ("picture", "file"), [("demo_curve.png", "demo.json"), ("d3s_study.png", "d3s_study.json")]
)
def test_pictures_of_runs_stand_beside_their_results(picture, file):
    results = json.loads((RESULTS / CPU / file).read_text(encoding="utf-8"))
    assert drawn_from(pictures.FOLDER / picture) == digest(results)


def test_curves_of_methods_are_means_over_seeds(tmp_path):
    def run(learner, seed, values):
        points = [{"samples": 512 * i, "pass_at_1": value} for i, value in enumerate(values)]
        return {"learner": learner, "seed": seed, "points": points}

    runs = [run("GRPO", 0, [0.2, 0.4]), run("GRPO", 1, [0.4, 0.8]), run("PPO", 0, [0.1, 0.2])]
    results = tmp_path / "results"
    (results / CPU).mkdir(parents=True)
    (results / CPU / "headlines.json").write_text(json.dumps({"learning": runs}), encoding="utf-8")
    found = {picture.name: picture for picture in pictures.pictures(results)}["headlines"]
    first, second = found.data(results)
    assert first["name"] == "GRPO"
    assert [x for x, _ in first["points"]] == [0, 512]
    assert [y for _, y in first["points"]] == pytest.approx([0.3, 0.6])
    assert second["points"] == [[0, 0.1], [512, 0.2]]
    assert "headlines" in pictures.refresh(tmp_path, results)


def test_scaling_is_relative_to_the_smallest_size(tmp_path):
    rows = [
        row(f"scaling {axis}={size}", "fastrl update", float(size * factor), peak_bytes=size)
        for axis, factor in (("P", 2), ("V", 3)) for size in (10, 20, 40)
    ]  # fmt: skip
    results = results_with(tmp_path, CPU, "scaling", rows)
    found = {picture.name: picture for picture in pictures.pictures(results)}["scaling"]
    lines = found.data(results)
    assert [line["name"] for line in lines] == ["P", "V"]
    assert all(line["time"] == line["memory"] == line["sizes"] == [1, 2, 4] for line in lines)
    assert "scaling" in pictures.refresh(tmp_path, results)
    assert "| 20 (20 to 20) |  |" in report_results.page(results)  # alone, so without a ratio


def test_the_frontier_is_told_by_budget(tmp_path):
    rows = [
        row("frontier 256 MiB, G=2", "fastrl", 900.0, note="context 1024 tokens", peak_bytes=2**28),
        row("frontier 256 MiB, G=2", "TRL GRPOTrainer", None, note="no context fits: 512 take 300"),
        row("frontier 512 MiB, G=2", "fastrl", 1900.0, note="context at least 4096 tokens"),
        row("frontier 512 MiB, G=2", "TRL GRPOTrainer", 1900.0, note="context 640 tokens"),
    ]
    results = results_with(tmp_path, CPU, "frontier", rows)
    found = {picture.name: picture for picture in pictures.pictures(results)}["frontier"]
    assert found.data(results) == [
        {"name": "TRL GRPOTrainer", "points": [(640, 512)]},
        {"name": "fastrl", "points": [(1024, 256), (4096, 512)]},
    ]
    assert "frontier" in pictures.refresh(tmp_path, results)
    page = report_results.page(results)
    assert "| 256 | fastrl | 1024 tokens | 256 | 0.9 |" in page
    assert "| 256 | TRL GRPOTrainer | no context fits: 512 take 300 |  |  |" in page


def test_a_picture_of_other_numbers_is_stale(tmp_path):
    results = results_with(tmp_path, "x", "none", [])
    picture = next(x for x in pictures.pictures(results) if x.name == "memory_by_context")
    pictures.draw(picture, picture.data(results), tmp_path)
    path = results / CPU / "trainer.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows[0]["peak_bytes"] *= 2
    path.write_text(json.dumps(rows), encoding="utf-8")
    changed = digest(picture.data(results))
    assert drawn_from(tmp_path / "memory_by_context.png") != changed
    assert "memory_by_context" in pictures.refresh(tmp_path, results)
    assert drawn_from(tmp_path / "memory_by_context.png") == changed
    assert pictures.refresh(tmp_path, results) == []


def test_a_roofline_appears_with_its_numbers(tmp_path):
    sizes = {"flops": 4e12, "num_bytes": 1e10, "copy_gigabytes_per_second": 4000.0}
    rows = [
        row("policy_loss S=1", "bare matrix products", tflops=700.0, **sizes),
        row("policy_loss S=1", "fastrl policy_loss", tflops=500.0, **sizes),
        row("policy_loss S=1", "naive", tflops=100.0, **sizes),
    ]
    results = results_with(tmp_path, "nvidia-x", GPU, rows)
    found = {picture.name: picture for picture in pictures.pictures(results)}
    data = found["roofline_nvidia-x"].data(results)
    assert (data["tflops"], data["copy"]) == (700.0, 4000.0)
    assert [(p["intensity"], p["tflops"]) for p in data["points"]] == [(400, 500), (400, 100)]
    assert "roofline_nvidia-x" in pictures.refresh(tmp_path, results)
    assert "roofline_nvidia-x.png" in report_results.page(results)


def test_goals_name_quantities_and_tests_that_exist():
    for goal in GOALS:
        assert (goal.most is None) != (goal.least is None), goal
        assert not goal.quantity or goal.quantity in QUANTITIES, goal
        if goal.held_by:
            path, name = goal.held_by.split("::")
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), goal


def test_goals_of_the_cpu_are_measured_where_their_file_is_committed():
    for goal in GOALS:
        if goal.quantity and not goal.on_gpu:
            file = QUANTITIES[goal.quantity].file
            is_there = any(RESULTS.glob(f"*/{file}.json"))
            assert (measured(goal.quantity, CPU) is not None) == is_there, goal


def test_the_trainer_goal_is_the_quotient_of_two_committed_rows():
    rows = json.loads((RESULTS / CPU / "trainer.json").read_text(encoding="utf-8"))
    case = "update prompts=1 P=512 R=128 G=8 float32"
    ours = find(rows, case, "fastrl")["p50_ms"]
    theirs = [
        row["p50_ms"] for row in rows if row["case"] == case and "TRL" in row["implementation"]
    ]
    assert measured("update_time", CPU).value == ours / min(theirs)


def test_a_missed_goal_is_called_missed():
    goal = next(goal for goal in GOALS if goal.quantity == "update_time")
    assert line_of(goal, CPU).endswith("| yes |")
    assert line_of(goal._replace(most=1e-6), CPU).endswith("| **no** |")
    assert not is_met(goal, goal.most * 1.001)
    assert is_met(goal, goal.most)
    met, missed, unknown = counts()
    assert met + missed + unknown >= len(GOALS)
    assert unknown >= sum(not goal.quantity and not goal.held_by for goal in GOALS)


def test_goals_of_a_gpu_are_told_once_it_was_measured(tmp_path):
    assert all(line_of(goal, None).endswith("| unknown |") for goal in GOALS if goal.on_gpu)
    case = "select_tokens ratio=0.2 B=1 C=1048576 float32"
    rows = [row(case, "fastrl select_tokens", 0.15), row(case, "torch", 0.6)]
    results = results_with(tmp_path, "nvidia-x", GPU, rows)
    shown = table(results)
    assert "(nvidia-x) | at most 0.2 ms | 0.15 ms | torch, 0.6 ms | yes |" in shown
    assert "no correct row of a case 'policy_loss" in shown  # it was stopped before that


def test_goals_of_a_gpu_find_their_cases_in_the_suite(tmp_path):
    """Were a case named otherwise, its goal would stay "not measured" for ever."""
    implementations = (
        "fastrl policy_loss", "fastrl linear_logps", "fastrl segment_attention", "fastrl, all",
        "trl", "liger chunked grpo", "flex", "varlen flash, repeated rows",
    )  # fmt: skip
    more = {"floor_ms": 1.0, "peak_bytes": 2**20, "beyond_gradients_bytes": 2**20}
    rows = [
        row(case.name, implementation, **more)
        for case in gpu_cases(tiny=False) for implementation in implementations
    ]  # fmt: skip
    results = results_with(tmp_path, "nvidia-x", GPU, rows)
    for goal in GOALS:
        if goal.on_gpu and goal.quantity:
            assert measured(goal.quantity, "nvidia-x", results) is not None, goal


def test_what_is_not_correct_gets_no_ratio():
    rows = [row("a", "fastrl x", 2.0), row("a", "peer", 1.0, correct=False)]
    assert report_rows.table(rows).splitlines()[-1] == "|  | peer | incorrect |  |  |  |"
    rows = [row("a", "fastrl x", 2.0, correct=False), row("a", "peer", 1.0)]
    assert "x |" not in report_rows.table(rows).splitlines()[-1]


def test_bytes_of_the_optimizer_come_from_its_notes(tmp_path):
    name, note = "adamw_8bit, split, in_backward two_phase", "a parameter: held 6.03, peak 6.59"
    rows = [row("bytes of a step", name, None, note=note, peak_bytes=2**27)]
    results = results_with(tmp_path, CPU, "optimizer", rows)
    goal = next(goal for goal in GOALS if goal.quantity == "bytes_a_parameter")
    assert "| at most 8 | 6.59 |  | yes |" in line_of(goal, CPU, results)
    assert f"| {name} |  |  | 128 |  | {note} |" in report_results.page(results)


def test_a_number_in_a_document_is_written_from_the_results():
    text = "takes <!-- measured:update_time -->9.99x of the time"
    value = measured("update_time", CPU).value
    assert (
        report_rows.filled(text) == f"takes <!-- measured:update_time -->{value:.2f}x of the time"
    )
    mark, value = "a plan takes <!-- measured:plans -->", measured("plans", CPU).value
    assert report_rows.filled(f"{mark}1.23 ms at most") == f"{mark}{value:.3g} ms at most"
    with pytest.raises(ValueError, match="no quantity 'nonsense'"):
        report_rows.filled("<!-- measured:nonsense -->1x")


def test_the_table_of_the_kernels_is_made_from_its_rows():
    rows = json.loads((RESULTS / CPU / "policy_loss.json").read_text(encoding="utf-8"))
    shown = report_heads.render(rows)
    assert shown in (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    between = f"<!-- heads:begin -->\n{shown}<!-- heads:end -->"
    assert report_rows.filled("<!-- heads:begin -->\nold\n<!-- heads:end -->") == between


def test_a_result_without_rows_or_renderer_is_refused(tmp_path):
    path = tmp_path / "novelty.json"
    path.write_text('{"numbers": [1]}', encoding="utf-8")
    with pytest.raises(ValueError, match="RENDERERS"):
        report_results.section(path)
