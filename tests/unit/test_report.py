"""Page and charts of a report, made from files of runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import metric_keys
import pytest

from skyrl_spec.cli import main
from skyrl_spec.metrics import names
from skyrl_spec.report.charts import draw
from skyrl_spec.report.command import write_report
from skyrl_spec.report.read import read_runs

STEPS = 4


def step_values(step: int, k: int) -> dict[str, Any]:
    keys = metric_keys.step_keys(
        num_trained_positions=k, num_speculative_tokens=k, n_samples_per_prompt=4, use_kl_loss=False
    )
    values: dict[str, Any] = dict.fromkeys(keys, 0.25 * step) | {names.STEP: step}
    if step == 1:
        values |= dict.fromkeys(metric_keys.canary_keys(has_draft=k > 0), 1e-7)
    if step % 2 == 0:
        values |= dict.fromkeys(metric_keys.eval_keys(k), 0.5 + 0.1 * step)
    return values


def write_run(directory: Path, *, k: int = 3, settings: str = "trainer: {seed: 1}", **changed: Any) -> Path:
    directory.mkdir(parents=True)
    records = [dict.fromkeys(metric_keys.eval_keys(k), 0.5) | {names.STEP: 0}]
    records += [step_values(step, k) | changed for step in range(1, STEPS + 1)]
    samples: list[Mapping[str, Any]] = [
        {"step": 1, "uid": "1", "prompt": "1<2?", "response": "<script>alert(1)</script>", "reward": 1.0,
         "finish_reason": "stop", "policy_version": 0, "draft_version": 0}
    ]  # fmt: skip
    told = {name: value for name, value in samples[0].items() if name != "reward"}
    told |= {"step": 2, "response": "ab & c", "pieces": [["a", False], ["b & ", True], ["c", False]]}
    for name, lines in (("metrics", records), ("samples", [*samples, told])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "config.yaml").write_text(settings)
    return directory


class Page(HTMLParser):
    """Tags with their attributes, and shaded texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.accepted: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = ("class", "accepted") in attrs

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.accepted.append(data)
            self._inside = False


def test_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = write_report([run])
    assert page == run / "report" / "index.html"
    text = page.read_text()
    found = Page(text)
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(images) == len(list(page.parent.glob("*.png"))) == len(draw(read_runs([run])))
    assert all(str(image["src"]).startswith("data:image/svg+xml;base64,") for image in images)
    # The text for screen readers.
    assert any("from 0.25 (step 1) to 1 (4)" in str(image["alt"]) for image in images)
    assert not [tag for tag, _ in found.tags if tag in ("script", "link", "iframe")]
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert found.accepted[-1] == "b & "
    assert "2 of 3" not in text
    assert "1 of 3 tokens were drafted" in text
    assert "0.500 → 0.900" in text


def test_runs_are_laid_over_one_another(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a" / "run", settings="trainer: {seed: 1, mtp: {enabled: true}}"),
        write_run(tmp_path / "b" / "run", settings="trainer: {seed: 2, mtp: {enabled: true}}"),
        write_run(tmp_path / "none", k=0, settings="trainer: {seed: 1, mtp: {enabled: false}}"),
    ]
    read = read_runs(runs)
    assert [run.label for run in read] == ["a/run", "b/run", f"{tmp_path.name}/none"]
    charts = {chart.name: chart for chart in draw(read)}
    reward = charts["reward"].figure.axes[0]
    assert len({line.get_color() for line in reward.lines}) == 3
    assert len({str(line.get_linestyle()) for line in reward.lines}) == 3
    # The run without a draft is not in the charts of drafts.
    assert "none" not in charts["acceptance_length"].text
    assert "acceptance_by_position_a_run" in charts
    text = write_report(runs, tmp_path / "out").read_text()
    assert "Settings that differ between the runs" in text
    rows = re.findall(r"<tr><td>(trainer\.[a-z.]+)</td>", text)
    assert rows == ["trainer.seed", "trainer.mtp.enabled"]


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", **{names.DRAFT_LOSS: None})
    assert "draft_loss" not in {chart.name for chart in draw(read_runs([run]))}
    assert write_report([run]).is_file()


def test_names_are_no_markup(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, **dict.fromkeys(metric_keys.canary_keys(has_draft=True), 0.0))
        for name in ("a$^$b", "_c")
    ]
    charts = {chart.name: chart for chart in draw(read_runs(runs))}
    legend = charts["reward"].figure.axes[0].get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 4
    # Zeros need a linear axis.
    assert charts["canary"].figure.axes[0].get_yscale() == "linear"
    assert write_report(runs).is_file()


def test_a_sweeps_name_is_no_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(write_run(tmp_path / "lr=1e-3"))]) == 0


def test_a_report_replaces_a_former_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "report").mkdir()
    (run / "report" / "gone.png").touch()
    assert not (write_report([run]).parent / "gone.png").exists()


def test_a_run_at_its_first_step(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "metrics.jsonl").write_text(json.dumps({names.STEP: 0, names.EVAL_SCORE: 0.5}) + '\n{"trainer/st')
    assert "The run has written no samples yet" in write_report([directory]).read_text()


def test_mistakes_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    broken = write_run(tmp_path / "broken")
    (broken / "metrics.jsonl").write_text("{not json}\n")
    empty = write_run(tmp_path / "empty")
    (empty / "metrics.jsonl").write_text("")
    of_another_program = write_run(tmp_path / "program")
    (of_another_program / "metrics.jsonl").write_text('{"step": 1}\n[2]\n')
    for words, expected in (
        ([], "at least one run is needed"),
        ([str(tmp_path / "nowhere")], "has no metrics.jsonl; give the directory of a run"),
        ([str(run), str(run)], "is named twice"),
        ([str(broken)], "cannot be read"),
        ([str(empty)], "has no step yet"),
        ([str(run), "out=/dev/null/x"], "out=/dev/null/x: cannot be written to (Not a directory)"),
        ([str(run), "too=x"], "report: unknown option 'too=x'"),
        ([str(run), "out="], "out='': must name a directory"),
        ([str(write_run(tmp_path / "other", settings="[1]"))], "must hold a mapping"),
        ([str(of_another_program)], "metrics.jsonl has lines without trainer/step"),
    ):
        assert main(["report", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("skyrl-spec: error: ")
        assert expected in line
