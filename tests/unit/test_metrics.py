"""Metrics of a run: values from sums and counts, files that survive a resume, offline wandb, and the console."""

from __future__ import annotations

import io
import json
import os
import pty
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import metric_keys
import numpy as np
import pytest
from rich.console import Console

from skyrl_spec.errors import ConfigError
from skyrl_spec.metrics import names
from skyrl_spec.metrics.console import ConsoleWriter, header_line, step_line
from skyrl_spec.metrics.dashboards import TensorBoardWriter, WandbWriter
from skyrl_spec.metrics.headline import headline
from skyrl_spec.metrics.lengths import length_metrics
from skyrl_spec.metrics.values import merge, values
from skyrl_spec.metrics.writers import JsonlWriter, SamplesWriter, SummaryWriter, pick_samples, read_jsonl
from skyrl_spec.types import DraftedResponse, Generation, LengthLog, Metric, Prompt, Rollout, Versions

STEP_VALUES: dict[str, float] = {
    names.AVG_RAW_REWARD: 0.5125,
    names.acceptance_length("train"): 2.414,
    names.acceptance_rate("train"): 0.47,
    names.PREDICTED_ACCEPTANCE_LENGTH: 2.38,
    names.THROUGHPUT: 3141.5,
    names.STEP_TIME: 7.04,
    **{names.timing(phase): 1.26 for phase in names.PHASES},
}


def test_means_are_of_sums_not_of_means() -> None:
    one, other = {"a": Metric(6.0, 2.0), "b": Metric(1.0, 1.0)}, {"a": Metric(0.0, 4.0)}
    assert values(merge(one, other)) == {"a": 1.0, "b": 1.0}
    assert (one["a"].total, one["a"].count) == (6.0, 2.0)
    assert np.isnan(values({"none": Metric()})["none"])


def test_keys_that_apply() -> None:
    draft = metric_keys.step_keys(
        num_trained_positions=2, num_speculative_tokens=2, n_samples_per_prompt=8, use_kl_loss=True
    )
    plain = metric_keys.step_keys(
        num_trained_positions=0, num_speculative_tokens=0, n_samples_per_prompt=8, use_kl_loss=False
    )
    assert len(set(draft)) == len(draft)
    assert set(draft) - set(plain) == {
        "policy/kl",
        *(
            f"draft/{n}"
            for n in ("loss", "grad_norm", "lr", "skipped_updates", "top1_agreement", "predicted_acceptance_length")
        ),
        "vllm/train/draft_acceptance_rate",
        "vllm/train/draft_mean_acceptance_length",
        "vllm/train/draft_num_draft_tokens",
        "vllm/train/draft_num_accepted_tokens",
        "vllm/train/draft_acceptance_rate_pos_1",
        "vllm/train/draft_acceptance_rate_pos_2",
        "draft/predicted_minus_measured_acceptance_length",
        "draft/predicted_acceptance_rate_pos_1",
        "draft/predicted_acceptance_rate_pos_2",
        "draft/top1_agreement_pos_1",
        "draft/top1_agreement_pos_2",
        "draft/predicted_drafts",
        "draft_training/trained",
        "draft_training/published",
        "draft_training/acceptance_length_candidate",
        "draft_training/acceptance_length_frozen",
        "timing/draft_train",
        "sync/draft_version",
    }
    assert set(plain) < set(draft)
    assert {"trainer/step", "reward/avg_pass_at_8", "timing/generate", "sync/bytes"} < set(plain)
    assert metric_keys.eval_keys(0) == ["eval/all/avg_score"]
    assert "vllm/eval/draft_acceptance_rate_pos_2" in metric_keys.eval_keys(2)


def test_metrics_file_is_there_after_each_step(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonlWriter(path)
    step_values: dict[str, Any] = {"a": np.float32(0.5), "b": float("nan"), "c": float("inf"), "d": 3}
    writer.write(1, step_values)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"a": 0.5, "b": None, "c": None, "d": 3, "trainer/step": 1}
    ]
    assert type(read_jsonl(path)[0]["d"]) is int
    writer.close()


def test_metrics_file_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in range(5):
        writer.write(step, {"run": 1})
    writer.close()
    with path.open("a") as file:
        file.write('{"trainer/step": 5, "ru')
    assert len(read_jsonl(path)) == 5
    writer = JsonlWriter(path, resume_step=2)
    writer.write(3, {"run": 2})
    writer.close()
    found = [(record["trainer/step"], record["run"]) for record in read_jsonl(path)]
    assert found == [(0, 1), (1, 1), (2, 1), (3, 2)]
    JsonlWriter(path).close()
    assert read_jsonl(path) == []
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def rollout(index: int, text: str) -> Rollout:
    prompt = Prompt(str(index), [1], [{"role": "user", "content": f"{index}+1="}], "gsm8k", {})
    return Rollout(prompt, Generation([2], [-1.0], "stop", Versions(4, 3)), text, 1.0, [1])


def test_samples_are_a_few_of_each_step(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    writer = SamplesWriter(path)
    # Neither a line separator nor half of a surrogate pair may break the lines of the file.
    texts = ["a\u2028b", "\ud800", *map(str, range(2, 11))]
    plain = rollout(9, "ab")
    drafted = DraftedResponse(plain.prompt, plain.generation, [("a", False), ("b", True)])
    writer.write_samples(1, pick_samples(1, [rollout(index, text) for index, text in enumerate(texts)], num=3))
    writer.write_samples(2, pick_samples(2, [*map(rollout, (0, 1), texts)], [drafted], num=3))
    writer.close()
    SamplesWriter(path, resume_step=2).close()
    with path.open(newline="\n") as file:
        samples = [json.loads(line) for line in file]
    found = [(sample["step"], sample["uid"]) for sample in samples]
    assert found == [(1, "0"), (1, "3"), (1, "6"), (2, "0"), (2, "1"), (2, "9")]
    assert samples[-2]["response"] == "\ud800"
    assert (samples[-1]["response"], samples[-1]["pieces"]) == ("ab", [["a", False], ["b", True]])
    assert "reward" not in samples[-1]
    assert samples[0] == {
        "step": 1,
        "uid": "0",
        "prompt": "0+1=",
        "response": "a\u2028b",
        "reward": 1.0,
        "finish_reason": "stop",
        "policy_version": 4,
        "draft_version": 3,
    }


WANDB_SCRIPT = """
import sys
from pathlib import Path
from skyrl_spec.errors import ConfigError
from skyrl_spec.metrics.dashboards import WandbWriter
try:
    writer = WandbWriter(Path(sys.argv[1]), "project", "name", {"a": 1}, tags=["x"], resumes="resumes" in sys.argv)
except ConfigError as error:
    sys.exit(f"config error: {error}")
writer.write(1, {"reward/a": 0.5})
sample = {"step": 1, "prompt": "p", "response": "r", "reward": 1.0, "policy_version": 0, "draft_version": 0}
writer.write_samples(1, [sample | {"prompt": "told"}])
writer.write_samples(2, [sample])
writer.summarize({"headline/steps": 2})
writer.close()
print("written")
"""


def wandb_environment(home: Path, **extra: str) -> dict[str, str]:
    """An environment without a wandb account, neither in variables nor in HOME."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    return {**kept, "HOME": str(home), "WANDB_CONFIG_DIR": str(home), **extra}


def test_wandb_offline_needs_no_account(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", WANDB_SCRIPT, str(run_dir)],
        env=wandb_environment(tmp_path, WANDB_MODE="offline"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "written\n"
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    summary, tables = {}, []
    for record in wandb_records(file):
        summary |= {
            item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update
        }
    for path in run_dir.glob("wandb/offline-run-*/files/media/table/**/*.json"):
        tables.append(json.loads(path.read_text()))
    assert summary["headline/steps"] == 2
    assert [row[1] for table in tables for row in table["data"]].count("told") >= 1
    assert {table["columns"][2] for table in tables} == {"response"}


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path: Path) -> None:
    """The third run begins anew in the same folder."""
    ids, tags = [], []
    for number, words in enumerate(([], ["resumes"], [])):
        command = [sys.executable, "-c", WANDB_SCRIPT, str(tmp_path / "run"), *words]
        environment = wandb_environment(tmp_path, WANDB_MODE="offline")
        subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=120, check=True)
        files = sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
        assert len(files) == number + 1
        (run,) = (record.run for record in wandb_records(files[-1]) if record.HasField("run"))
        ids.append(run.run_id)
        tags.append(list(run.tags))
    assert ids[0] == ids[1] != ids[2]
    assert (tmp_path / "run" / "wandb_id").read_text() == f"{ids[2]}\n"
    assert tags == [["x"]] * 3


def wandb_records(file: Path) -> Iterator[Any]:
    """Records that an offline run keeps for ``wandb sync``: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, payload = file.read_bytes(), 7, b""
    while position < len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", data, position)
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        # A whole record, or the last part of one.
        if kind in (1, 4):
            yield Record.FromString(payload)
            payload = b""


def tensorboard_values(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars by tag, read from the records of the files (length, checksum, event, checksum)."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_has_the_same_keys(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    writer.write(1, {names.AVG_RAW_REWARD: 0.5, "draft/loss": float("nan")})
    writer.write_samples(1, pick_samples(1, [rollout(0, "a\nb")]))
    writer.write(2, {names.AVG_RAW_REWARD: 0.75})
    writer.summarize({"headline/steps": 2})
    writer.close()
    found = tensorboard_values(tmp_path)
    assert found[names.AVG_RAW_REWARD] == [(1, 0.5), (2, 0.75)]
    assert found["headline/steps"] == [(0, 2)]
    assert [tag for tag in found if tag.startswith("samples/0")] != []
    assert "draft/loss" not in found


def test_headline_numbers(tmp_path: Path) -> None:
    records = [
        {names.STEP: 1, names.AVG_RAW_REWARD: 0.25, names.STEP_TIME: 2.0},
        {names.STEP: 2, names.AVG_RAW_REWARD: 0.5, names.STEP_TIME: 4.0},
    ]
    found = headline(records, 1.5)
    assert found == {
        "headline/steps": 2,
        "headline/train_reward_first": 0.25,
        "headline/train_reward_last": 0.5,
        "headline/mean_step_s": 3.0,
        "headline/rollout_speedup": 1.5,
    }
    path = tmp_path / "summary.json"
    SummaryWriter(path).summarize(found)
    assert json.loads(path.read_text()) == found
    # The next run in the folder removes it.
    SummaryWriter(path)
    assert not path.exists()


@pytest.mark.parametrize("on_terminal", [False, True])
def test_wandb_without_a_key_is_an_error_and_no_question(tmp_path: Path, on_terminal: bool) -> None:
    """wandb by itself would ask on a terminal, and wait."""
    controller, terminal = pty.openpty()
    streams: dict[str, Any] = {"stdin": terminal, "stdout": terminal} if on_terminal else {"stdin": subprocess.DEVNULL}
    done = subprocess.run(
        [sys.executable, "-c", WANDB_SCRIPT, str(tmp_path)],
        env=wandb_environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        **streams,
    )
    os.close(terminal)
    os.close(controller)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("config error: trainer.logger=[wandb]: wandb has no key; set WANDB_API_KEY or")


def test_wandb_key_of_the_wrong_form_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(ConfigError, match=r"^trainer\.logger=\[wandb\]: .*WANDB_API_KEY invalid"):
        WandbWriter(tmp_path, "project", "name", {})


def console_writer(*, terminal: bool, num_steps: int = 60) -> tuple[ConsoleWriter, io.StringIO]:
    out = io.StringIO()
    return ConsoleWriter(num_steps, Console(file=out, force_terminal=terminal, width=100, _environ={})), out


def test_step_lines_fit_100_columns_under_their_heading() -> None:
    line = step_line(12, 60, STEP_VALUES, 320.4)
    expected = ["12/60", "0.512", "2.41", "2.38", "3", "-", "3142", "1.3", "1.3", "1.3", "1.3", "7.0", "5:20"]
    assert line.split() == expected
    large = dict.fromkeys(STEP_VALUES, 123456.7)
    for text in (header_line(), line, step_line(10_000, 10_000, large, 360_000), step_line(1, 2, {}, 0)):
        assert len(text) == len(header_line()) <= 100
    # Each number ends in the column where its title ends.
    assert line.index("0.512") + len("0.512") == header_line().index("reward") + len("reward")
    assert step_line(1, 2, {names.AVG_RAW_REWARD: float("nan")}, 0).split()[1] == "-"


def test_the_line_shows_lengths_from_the_largest_batch_to_the_smallest() -> None:
    def shown(lengths: dict[int, float]) -> str:
        values = {names.length_at_batch(size): length for size, length in lengths.items()}
        line = step_line(1, 2, {names.ESTIMATED_SPEEDUP: 1.94} | values, 0)
        assert line.split()[5] == "1.9"
        return line.split()[4]

    assert shown({1: 6.9, 2: 6.0, 64: 2.2, 128: 1.4}) == "1→7"
    assert shown({8: 3.1, 16: 2.9}) == "3"
    assert shown({8: 0.0}) == "0"


def test_length_metrics_are_sums_over_engines() -> None:
    nan = float("nan")
    # Bins 1, and 2 to 3. Columns: off, 0, 1, 2.
    first = LengthLog([[0, 0, 0, 4], [1, 0, 3, 0]], [1.0, 1.0], [12.0, 14.0], [10.0, 16.0], [4.0, 9.0])
    second = LengthLog([[0, 0, 0, 0], [0, 4, 0, 0]], [0.0, 2.0], [0.0, 10.0], [0.0, 10.0], [0.0, 11.0])
    assert length_metrics([first, second]) == pytest.approx(
        {
            "speculation/drafted_at_batch_1": 2.0,
            "speculation/drafted_at_batch_2": 3 / 8,
            "speculation/drafter_off_share": 1 / 12,
            "speculation/decode_tok_s": 36 / 4,
            "speculation/expected_tok_s": 36 / 4,
            "speculation/estimated_speedup": 36 / 24,
        }
    )
    table = LengthLog([[0, 0, 0, 4]], [1.0], [12.0], [nan], [nan])
    assert sorted(length_metrics([table])) == [
        "speculation/decode_tok_s",
        "speculation/drafted_at_batch_1",
        "speculation/drafter_off_share",
    ]
    assert length_metrics([]) == length_metrics([LengthLog([[0, 0]], [0.0], [0.0], [0.0], [0.0])]) == {}


def test_plain_output_without_a_terminal() -> None:
    writer, out = console_writer(terminal=False)
    writer.start({"model": "examples/[x]/model", "run": "runs/a"})
    for step in range(1, 23):
        writer.write(step, STEP_VALUES)
    writer.write(22, {names.EVAL_SCORE: 0.75, names.acceptance_length("eval"): 3.125})
    writer.close()
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["model  examples/[x]/model", "run    runs/a"]
    assert lines.count(header_line()) == 2
    assert lines[-1].split() == ["eval", "0.750", "3.12", "on", "held-out", "prompts,", "after", "step", "22"]
    assert "\x1b" not in out.getvalue()
    assert max(map(len, lines)) <= 100


def test_progress_bar_on_a_terminal_is_taken_away() -> None:
    writer, out = console_writer(terminal=True)
    writer.start({"model": "tiny"})
    writer.write(1, STEP_VALUES)
    writer.close()
    writer.close()
    assert "1/60" in out.getvalue()
    # The cursor, which the bar hides, is shown again.
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l") >= 0


def test_summary_compares_first_and_last() -> None:
    accept = names.acceptance_length("train")
    records: list[dict[str, Any]] = [
        {names.STEP: 0, names.EVAL_SCORE: 0.40},
        {names.STEP: 1, names.AVG_RAW_REWARD: 0.45, accept: None},
        {names.STEP: 2, names.AVG_RAW_REWARD: 0.50, accept: 2.0},
        {names.STEP: 3, names.AVG_RAW_REWARD: 0.70, accept: 3.1, names.EVAL_SCORE: 0.65},
    ]
    writer, out = console_writer(terminal=False)
    writer.close_with(records, Path("runs/a"), speedup=1.625, next_commands=["skyrl-spec report runs/a", "two"])
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert rows == [
        [],
        ["3", "steps", "first", "last", "change"],
        ["reward", "on", "held-out", "prompts", "0.400", "0.650", "+0.250"],
        ["reward", "in", "training", "0.450", "0.700", "+0.250"],
        ["acceptance", "length", "in", "training", "2.00", "3.10", "+1.10"],
        ["rollout", "speed-up", "by", "the", "draft", "1.62x"],
        ["run", "runs/a"],
        ["next", "skyrl-spec", "report", "runs/a"],
        ["two"],
    ]
    writer, out = console_writer(terminal=False)
    writer.close_with([], Path("runs/a"))
    assert "speed-up" not in out.getvalue()
