"""Commands other than ``train`` on the results of a whole run, and a comparison of whole runs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, SKYRL_SPEC, SMALL, STOP_TIMEOUT_S, finish, launch, records_of

from skyrl_spec.metrics import names
from skyrl_spec.metrics.reference import description

Whole = tuple[Path, str, list[dict[str, Any]]]


def tool(*words: str, timeout_s: float = 420) -> str:
    """Output of the command, which must hold nothing of Megatron, vLLM or Ray."""
    run = launch(Path(), [*SKYRL_SPEC, *words])
    output = run.output(timeout_s)
    assert run.process.returncode == 0, output
    assert run.processes() == []
    assert "Warning" not in output
    return output


def test_eval_draft_of_a_run(whole: Whole, tmp_path: Path) -> None:
    """Evaluates the newest checkpoint with its training's sampling settings, on questions with a category."""
    out, questions = tmp_path / "out.json", tmp_path / "question.jsonl"
    rows_of = {"short": ["7-2=", "1+1=", "3+5="], "long": ["7-2+9=", "3+8-4+6="]}
    lines = [json.dumps({"category": name, "turns": [sum_]}) for name, sums in rows_of.items() for sum_ in sums]
    questions.write_text("\n".join(lines))
    small = [
        "num_speculative_tokens=[1,3]",
        "batch_sizes=[2,8]",
        "rounds=2",
        "max_generate_length=40",
        "min_rollouts=8",
    ]
    lines = tool("eval-draft", f"target={whole[0]}", f"out={out}", f"prompts=[{questions}]", *small).splitlines()
    assert lines[0].split() == ["target", str(whole[0] / "checkpoints" / "step_5")]
    rows = [line.split() for line in lines if line.split()[:2] in (["1", "8"], ["3", "8"])]
    assert len(rows) == 2
    found = json.loads(out.read_text())
    assert found["method"] == "mtp"
    assert found["sampling"]["temperature"] == 1.0
    by_count = {item["num_speculative_tokens"]: item for item in found["measurements"] if item["batch_size"] == 8}
    # The head is trained: most first tokens are accepted, and further ones besides.
    assert 1.5 < by_count[1]["mean_acceptance_length"] <= 2
    assert by_count[1]["mean_acceptance_length"] < by_count[3]["mean_acceptance_length"] <= 4
    assert len(by_count[3]["acceptance_rate_by_position"]) == 3
    assert all(len(item["plain_tok_s"]) == len(item["drafted_tok_s"]) == 2 for item in by_count.values())
    assert set(found["recommended_num_speculative_tokens"]) == {"2", "8"}
    assert f"  for every batch    {json.dumps(found['recommended_schedule'], separators=(',', ':'))}" in "\n".join(
        line.replace("generator.speculation.schedule=", "") for line in lines
    )
    assert all(item["by_category"].keys() == rows_of.keys() for item in by_count.values())
    assert all(counts["num_drafts"] > 0 for item in by_count.values() for counts in item["by_category"].values())
    assert [line.split()[:2] for line in lines if line.split()[1:2] in (["short"], ["long"])] == [
        [count, name] for count in ("1", "3") for name in ("long", "short")
    ]


def test_a_report_of_a_run(whole: Whole, tmp_path: Path) -> None:
    output = tool("report", str(whole[0]), f"out={tmp_path / 'report'}")
    assert output == f"wrote {tmp_path / 'report' / 'index.html'}, with its charts as PNG files beside it\n"
    page = (tmp_path / "report" / "index.html").read_text()
    assert 'class="accepted"' in page
    samples = [json.loads(line) for line in (whole[0] / "samples.jsonl").read_text().splitlines()]
    told = [sample for sample in samples if "pieces" in sample]
    assert {sample["step"] for sample in told} == {0, 5}
    for sample in told:
        assert "".join(text for text, _ in sample["pieces"]) == sample["response"]
        drafted = [accepted for _, accepted in sample["pieces"]]
        assert not drafted[0], "nothing was drafted before the first token"
        assert sum(drafted) / len(drafted) > 0.4
    for name in ("reward", "acceptance_length", "acceptance_by_position", "phases", "canary", "sync_bytes"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((whole[0] / "summary.json").read_text())
    assert summary["headline/steps"] == 5
    assert summary["headline/rollout_speedup"] > 0


def test_a_run_writes_no_metric_that_is_not_described(whole: Whole) -> None:
    assert {key for record in whole[2] for key in record if description(key) is None} == set()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_comparison_of_a_trained_a_frozen_and_no_draft(tmp_path: Path) -> None:
    root = tmp_path / "compare"
    overrides = ["experiment=cpu_dflash_grpo", *SMALL, "trainer.eval_before_train=false"]
    overrides += ["trainer.save_final_model=false", "trainer.ckpt_interval=0"]
    output, _ = finish(root, *overrides, "trainer.eval_interval=0", command="compare")
    records = {name: records_of(root / name) for name in ("trained", "frozen", "none")}
    assert all([record[names.STEP] for record in own] == [1, 2] for own in records.values())
    acceptance = names.acceptance_length("train")
    # The first step's rollouts have the same weights and the same seed.
    assert records["trained"][0][acceptance] == records["frozen"][0][acceptance] > 2
    assert names.DRAFT_LOSS in records["trained"][0]
    assert names.DRAFT_LOSS not in records["frozen"][0]
    assert acceptance not in records["none"][0]
    # Isolation: training of the draft does not change the policy.
    assert records["trained"][0]["policy/grad_norm"] == records["frozen"][0]["policy/grad_norm"]
    found = json.loads((root / "compare.json").read_text())
    assert found["trained"]["headline/train_acceptance_length_first"] == records["trained"][0][acceptance]
    assert "headline/train_acceptance_length_first" not in found["none"]
    assert "== 3 of 3: draft none ==" in output
    table = next(line for line in output.splitlines() if line.startswith("acceptance length, training"))
    assert table.split()[-3:] == ["-", "-", "-"]
    page = (root / "report" / "index.html").read_text()
    assert "trainer.dflash.enabled" in page


def browser() -> str | None:
    return next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)


PROBE = """<!doctype html><iframe id=f src="{page}" width="{width}" height="900"></iframe><pre id=out></pre><script>
document.getElementById("f").onload = event => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const images = [...page.images];
  document.getElementById("out").textContent = JSON.stringify({{
    width: root.scrollWidth, images: images.length, drawn: images.filter(i => i.naturalWidth > 100).length,
    widest: Math.max(...images.map(i => i.getBoundingClientRect().width)),
    columns: new Set(images.map(i => i.getBoundingClientRect().left)).size,
  }});
}};</script>"""


@pytest.mark.skipif(browser() is None, reason="no Chromium; Debian's package chromium has one")
@pytest.mark.parametrize(("width", "columns"), [(375, 1), (1200, 3)], ids=["phone", "desk"])
def test_the_report_in_a_browser(whole: Whole, tmp_path: Path, width: int, columns: int) -> None:
    tool("report", str(whole[0]), f"out={tmp_path}")
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(page="index.html", width=width))
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000"]
    command += ["--virtual-time-budget=5000", "--dump-dom", probe.as_uri()]
    words = [str(word) for word in command]
    dom = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(dom.split('<pre id="out">')[1].split("</pre>")[0])
    assert found["images"] == found["drawn"] >= 10
    # Nothing is wider than the screen (the table scrolls); charts are side by side if there is room.
    assert found["width"] <= width
    assert found["columns"] == columns


def test_an_evaluation_that_is_stopped_leaves_nothing_behind(tmp_path: Path) -> None:
    """SIGTERM, for which Ray installs its own handler."""
    example = ROOT / "examples" / "arithmetic_mtp"
    words = ["eval-draft", f"target={example / 'model'}", f"prompts={example / 'data' / 'validation.jsonl'}"]
    run = launch(tmp_path, [*SKYRL_SPEC, *words, f"out={tmp_path / 'out.json'}"])
    run.actor("EngineActor", timeout_s=120)
    run.process.send_signal(signal.SIGTERM)
    output = run.output(STOP_TIMEOUT_S)
    assert run.process.returncode == 128 + signal.SIGTERM, output
    assert "skyrl-spec: SIGTERM: stopped" in output
    assert "Traceback" not in output, output
    assert run.processes() == []
    assert not (tmp_path / "out.json").exists()
