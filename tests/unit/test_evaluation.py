"""Targets, prompts and recommendations of ``eval-draft``. Tests with engines are in tests/e2e/test_tools.py."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from skyrl_spec.cli import main
from skyrl_spec.data.tokenizer import load_tokenizer
from skyrl_spec.errors import ConfigError
from skyrl_spec.evaluation import prompts
from skyrl_spec.evaluation.measure import Measurement
from skyrl_spec.evaluation.result import (
    as_json,
    category_lines,
    recommendation_lines,
    recommended,
    schedule,
    schedule_line,
    table_header,
    table_row,
)
from skyrl_spec.evaluation.target import Target, open_target
from skyrl_spec.settings.compose import load_config
from skyrl_spec.settings.options import EvalDraftOptions
from skyrl_spec.settings.schedule import check_schedule
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.types import SpecCounters

ROOT = Path(__file__).resolve().parents[2]
MIMO, QWEN3 = ROOT / "examples/arithmetic_mtp/model", ROOT / "examples/arithmetic_dflash/model"
DRAFT = ROOT / "examples/arithmetic_dflash/draft"


def measurement(num_tokens: int, batch_size: int, *ratios: float) -> Measurement:
    counters = SpecCounters(10, 10 * num_tokens, 15, (9, 6))
    return Measurement(num_tokens, batch_size, [100.0] * len(ratios), [100 * ratio for ratio in ratios], counters)


def test_the_fastest_in_the_median_is_recommended() -> None:
    results = [
        measurement(1, 1, 1.5, 1.4, 1.6),
        measurement(3, 1, 1.9, 1.1, 2.0),
        measurement(1, 64, 0.8, 0.9, 1.2),
        measurement(3, 64, 0.7, 0.7, 0.7),
    ]
    assert recommended(results) == {1: 3, 64: 0}
    assert recommendation_lines(results) == [
        "batch 1     k=3 (1.90x)",
        "batch 64    no draft: generating without a draft was fastest",
    ]
    results[0].drafted_tok_s[0] = 195.0
    assert recommendation_lines(results)[0] == "batch 1     k=3 (1.90x; k=1 is as fast within the range)"


def test_the_recommendation_is_a_schedule_to_paste() -> None:
    results = [measurement(5, 1, 2.0), measurement(3, 16, 1.5), measurement(3, 36, 1.4), measurement(3, 100, 0.9)]
    assert schedule(results) == [[1, 4, 5], [5, 60, 3], [61, 100, 0]]
    assert schedule_line(results) == "generator.speculation.schedule=[[1,4,5],[5,60,3],[61,100,0]]"
    check_schedule(schedule(results), 5)
    pasted = load_config(["experiment=cpu_mtp_grpo", schedule_line(results)])
    assert pasted.generator.speculation.schedule == schedule(results)
    assert schedule([measurement(3, 8, 1.5), measurement(3, 9, 1.5)]) == [[1, 9, 3]]
    assert as_json(opened(target=str(MIMO)), results, SamplingConfig(), {})["recommended_schedule"] == schedule(results)


def test_acceptance_by_category() -> None:
    first, second = measurement(3, 16, 1.5), measurement(1, 16, 1.5)
    assert category_lines([first]) == []
    for item in (first, second):
        item.by_category = {"math": SpecCounters(10, 30, 15, (9, 6)), "long story": SpecCounters(10, 30, 5, (5, 0))}
    assert category_lines([first, second]) == [
        "  k  category    accept  by position",
        "  3  math          2.50  .90 .60",
        "  3  long story    1.50  .50 .00",
        "  1  math          2.50  .90 .60",
        "  1  long story    1.50  .50 .00",
    ]
    found = as_json(opened(target=str(MIMO)), [first], SamplingConfig(), {})["measurements"][0]["by_category"]
    assert found["math"] == {"mean_acceptance_length": 2.5, "acceptance_rate_by_position": [0.9, 0.6], "num_drafts": 10}


def test_rows_of_benchmarks_are_read_as_they_are(tmp_path: Path) -> None:
    """MT-Bench's question.jsonl, and SPEED-Bench's parquet."""
    mt_bench = tmp_path / "question.jsonl"
    mt_bench.write_text(
        '{"question_id": 81, "category": "writing", "turns": ["7+2=", "Now in other words."]}\n'
        '{"question_id": 101, "category": "reasoning", "turns": ["3+4=", "5+6="], "reference": ["7", ""]}\n'
    )
    speed_bench = tmp_path / "test.parquet"
    rows = [{"question_id": "a", "category": "math", "sub_category": "sums", "turns": ["1+1="], "src_id": None}] * 2
    pq.write_table(pa.Table.from_pylist(rows), speed_bench)
    tokenizer = load_tokenizer(MIMO, "target")
    found = prompts.by_category(prompts.load([str(mt_bench), str(speed_bench)], tokenizer, 64))
    assert {name: [prompt.messages for prompt in group] for name, group in found.items()} == {
        "math": [[{"role": "user", "content": "1+1="}]] * 2,
        "reasoning": [[{"role": "user", "content": "3+4="}]],
        "writing": [[{"role": "user", "content": "7+2="}]],
    }
    for turns in ("[]", "[3]", '"7+2="'):
        mt_bench.write_text(f'{{"turns": {turns}}}\n')
        with pytest.raises(ConfigError, match=r"^prompts=.*question.jsonl: row 1.* prompt"):
            prompts.load([str(mt_bench)], tokenizer, 64)


def test_a_row_stands_under_its_header() -> None:
    row = table_row(measurement(3, 16, 1.5, 1.25, 2.0))
    assert row.split() == ["3", "16", "100", "150", "1.50x", "(1.25", "to", "2.00)", "2.50", ".90", ".60"]
    assert row.index("2.50") + 4 == table_header().index("accept") + len("accept")
    assert len(row) < 100


def opened(**options: object) -> Target:
    with open_target(EvalDraftOptions(**options)) as target:  # type: ignore[arg-type]
        return target


def test_targets_are_told_apart(tmp_path: Path) -> None:
    assert opened(target=str(MIMO)).speculative_config(3) == {"method": "mtp", "num_speculative_tokens": 3}
    dflash = opened(target=str(QWEN3), draft=str(DRAFT))
    assert dflash.speculative_config(5) == {"method": "dflash", "num_speculative_tokens": 5, "model": str(DRAFT)}
    assert dflash.token_counts(None) == [1, 2, 3, 5, 7]
    assert opened(target=str(QWEN3), method="ngram").speculative_config(2)["prompt_lookup_max"] == 4
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "model").symlink_to(QWEN3)
    (bundle / "draft").symlink_to(DRAFT)
    found = opened(target=str(bundle))
    assert (found.method, found.draft, found.home) == ("dflash", bundle / "draft", bundle)
    # Any draft that is not a DFlash draft is taken for an EAGLE-3 draft.
    eagle = tmp_path / "eagle"
    eagle.mkdir()
    (eagle / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLMEagle3"]}))
    assert opened(target=str(QWEN3), draft=str(eagle)).method == "eagle3"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "target='': must name a run, checkpoint, bundle or model"),
        ({"target": "no/such/place"}, "target=no/such/place: no such directory"),
        ({"target": str(ROOT)}, f"target={ROOT}: must be a run with a checkpoint, a checkpoint,"),
        ({"target": str(QWEN3)}, "has no draft; give draft=DIR, or method=ngram"),
        ({"target": str(QWEN3), "method": "mtp"}, "has no MTP head"),
        ({"target": str(MIMO), "method": "eagle3"}, "method=eagle3: needs a draft"),
    ],
)
def test_targets_that_cannot_be(options: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(**options)
    assert expected in str(caught.value)


def test_more_tokens_than_a_block_has() -> None:
    with pytest.raises(
        ConfigError, match=r"^num_speculative_tokens=9: must be at most 7, the tokens that .* drafts in a block"
    ):
        opened(target=str(QWEN3), draft=str(DRAFT)).token_counts([1, 9])


def test_prompts_are_rows_or_lines(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(MIMO, "target")
    rows = prompts.load([str(ROOT / "examples/arithmetic_mtp/data/validation.jsonl")], tokenizer, 64)
    text = tmp_path / "prompts.txt"
    text.write_text(f"{rows[0].messages[0]['content']}\n\n1+1=\n")
    lines = prompts.load([str(text)], tokenizer, 64)
    assert len(lines) == 2
    assert lines[0].token_ids == rows[0].token_ids
    tokenizer.chat_template = None
    assert prompts.load([str(text)], tokenizer, 64)[1].token_ids == tokenizer.encode("1+1=")
    for paths, expected in (
        ([], r"^prompts=\[\]: must name at least one"),
        (["nowhere.txt"], r"^prompts=nowhere.txt: cannot be read \(No such file"),
        (["nowhere.csv"], r"^prompts=nowhere.csv: must end in"),
    ):
        with pytest.raises(ConfigError, match=expected):
            prompts.load(paths, tokenizer, 64)
    with pytest.raises(ConfigError, match=r"^max_prompt_length=2: all 2 prompts"):
        prompts.load([str(text)], tokenizer, 2)
    text.write_text("\n")
    with pytest.raises(ConfigError, match="has no text"):
        prompts.load([str(text)], tokenizer, 64)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rounds=0"], "rounds=0: must be at least 1"),
        (["batch_sizes=[0]"], "batch_sizes=[0]: must be a list of numbers of at least 1"),
        (["temperature=-1"], "temperature=-1.0: must be at least 0"),
        (["temperature=inf"], "temperature=inf: must be finite and at least 0"),
        (["seed=-1"], "seed=-1: must be at least 0"),
        (["prompts={a:1}"], "prompts"),
        (["target='a b/c d'"], "target=a b/c d: "),
        (
            [f"target={QWEN3}", "method=ngram", f"draft={DRAFT}"],
            f"draft={DRAFT}: method=ngram takes no draft directory",
        ),
        ([f"target={MIMO}", "device=cuda"], "device=cuda: two engines of tensor_parallel_size=1 need 1 GPUs"),
        (
            [f"target={MIMO}", "max_prompt_length=500", "prompts=examples/arithmetic_mtp/data/validation.jsonl"],
            "max_generate_length=128: its sum with max_prompt_length=500 must be at most 512, the positions",
        ),
        (["device=tpu"], "device=tpu: must be cpu or cuda"),
        ([f"target={MIMO}"], "prompts=[]: must name at least one .parquet, .jsonl or .txt file"),
        ([f"target={MIMO}", "prompts=x.jsonl"], "prompts=x.jsonl: no such file"),
        (
            [f"target={MIMO}", "prompts=examples/arithmetic_mtp/data/validation.jsonl", "out=/no/such/x.json"],
            "out=/no/such/x.json: cannot be written",
        ),
    ],
)
def test_mistakes_get_one_line(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["eval-draft", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"skyrl-spec: error: {expected}")
