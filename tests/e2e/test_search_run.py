"""The search example: a whole run with its server, and what its demonstrations say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from runs import ROOT, SMALL, finish

from skyrl_spec.metrics import names

TINY = ROOT / "examples" / "search_r1" / "tiny"
SEARCH = ["experiment=cpu_search_grpo", *SMALL, "trainer.eval_before_train=false"]


def test_a_run_asks_its_own_server(tmp_path: Path) -> None:
    output, records = finish(tmp_path / "run", *SEARCH, "trainer.canary.interval=1")
    assert "warning" not in output, output
    sys.path.append(str(TINY))
    from facts import observation

    passages = {json.loads(line)["contents"] for line in (TINY / "corpus.jsonl").read_text().splitlines()}
    said = {observation(passage) for passage in passages}
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    answers = [turns[1] for sample in samples if len(turns := sample.get("turns", [])) > 1]
    # The server's own words, in the form that the warm start has seen.
    assert answers
    assert set(answers) <= said
    for record in records:
        assert record[names.NUM_FAILED] == 0
        assert record[names.NUM_TURNS] > 1
        assert record["policy/rollout_train_logprobs_abs_diff_mean"] < 1e-4
        assert record[names.CANARY_POLICY] < 1e-4
    assert (tmp_path / "run" / "servers" / "search.log").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_policy_learns_to_search(tmp_path: Path) -> None:
    _, records = finish(tmp_path / "run", "experiment=cpu_search_grpo", timeout_s=720)
    scores = [record[names.EVAL_SCORE] for record in records if names.EVAL_SCORE in record]
    assert scores[0] < 0.2
    assert scores[-1] > 0.8
    assert records[-1][names.NUM_TURNS] > 1.5
    assert records[-1][names.acceptance_length("train")] >= 2.5
