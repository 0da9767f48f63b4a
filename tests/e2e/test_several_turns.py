"""A whole run whose responses have several turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from counting_environment import ANSWER
from runs import ROOT, SMALL, records_of, start

from skyrl_spec.cli import main
from skyrl_spec.metrics import names
from skyrl_spec.settings.compose import load_config


@pytest.mark.parametrize("experiment", ["cpu_mtp_grpo", pytest.param("cpu_dflash_grpo", marks=pytest.mark.slow)])
def test_a_run_with_two_turns(experiment: str, tmp_path: Path) -> None:
    (path,) = load_config([f"experiment={experiment}"]).data.train_data
    rows = [json.loads(row) for row in (ROOT / path).read_text().splitlines()[:16]]
    rows = [row | {"env_class": "twice", "extra_info": {"index": index}} for index, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir = tmp_path / "run"
    run = start(
        run_dir, f"experiment={experiment}", *SMALL, f"data.train_data=[{tmp_path / 'rows.jsonl'}]",
        "environment.custom.twice=counting_environment:TwiceEnv", "generator.max_turns=3",
        "generator.max_input_length=280", "trainer.eval_interval=0", "trainer.eval_before_train=false",
        "trainer.canary.interval=1",
    )  # fmt: skip
    output = run.output(timeout_s=300)
    assert run.process.returncode == 0, output
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    for record in records_of(run_dir):
        assert 1 < record[names.NUM_TURNS] <= 2
        assert record[names.NUM_FAILED] == 0
        # Engines sampled the second turn behind exactly the tokens that the trainer sees, in both turns.
        assert record["policy/rollout_train_logprobs_abs_diff_mean"] < 1e-4
        assert record[names.CANARY_POLICY] < 1e-4
        assert record["draft/loss"] > 0
    several = [sample for sample in samples if "turns" in sample]
    assert several
    for sample in several:
        first, answer, second = sample["turns"]
        assert answer == ANSWER.format(len(first))
        # Special tokens and spaces do not show in the text of the whole.
        assert sample["response"] == f"{first}{answer}{second}"
    assert main(["report", str(run_dir)]) == 0
    page = (run_dir / "report" / "index.html").read_text()
    assert f'<pre class="answer">{several[-1]["turns"][1]}</pre>' in page
