"""The retrieval server of examples/search_r1, asked by skyrl-gym's search environment as it is."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from skyrl_spec.data.dataset import read_rows
from skyrl_spec.envs.episodes import Turn, check_environments
from skyrl_spec.envs.grader import Grader
from skyrl_spec.settings.schema import EnvironmentConfig
from skyrl_spec.types import Prompt

EXAMPLE = Path(__file__).parents[2] / "examples" / "search_r1"
PASSAGES = [
    "Dune\nDune is a novel by Frank Herbert of 1965.",
    "Solaris\nSolaris is a novel by Stanislaw Lem of 1961.",
    "Zork\nA computer game of underground caves.",
]


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("search")
    rows = [{"id": number, "contents": text} for number, text in enumerate(PASSAGES)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = run(EXAMPLE / "corpus.py", "build", folder / "corpus.jsonl", folder / "index")
    assert built.stdout == f"{folder}/index: 3 passages\n", built.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, EXAMPLE / "server.py", folder / "index", "--port", str(port)])
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        assert server.poll() is None
        assert time.monotonic() < deadline
        try:
            assert requests.get(f"{address}/health", timeout=5).json() == {"passages": 3}
            break
        except requests.ConnectionError:
            time.sleep(0.2)
    yield f"{address}/retrieve"
    server.kill()
    server.wait()


def environment(url: str, timeout_s: float = 60.0) -> EnvironmentConfig:
    settings = {"search_url": url, "topk": 2, "timeout": 5, "log_requests": False}
    return EnvironmentConfig(skyrl_gym={"search": settings}, timeout_s=timeout_s, max_failed_share=1.0)


def prompt(tmp_path: Path, answer: str) -> Prompt:
    """A row as questions.py writes it."""
    source, out = tmp_path / "questions.jsonl", tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"question": "Who wrote Solaris?", "golden_answers": [answer]}) + "\n")
    made = run(EXAMPLE / "questions.py", source, "--out", out)
    assert made.returncode == 0, made.stderr
    (row,) = read_rows(str(out))
    return Prompt("0", [1], row["prompt"], row["env_class"], {k: v for k, v in row.items() if k != "prompt"})


def test_an_episode_searches_and_answers(url: str, tmp_path: Path) -> None:
    row = prompt(tmp_path, "Stanislaw Lem")
    check_environments([row], environment(url), max_turns=3)
    grader = Grader(environment(url))
    texts = ("<think>I do not know.</think> <search>who wrote Solaris</search>",)
    (found,) = grader.play_all([Turn(1, row, texts, 3)])
    assert (found.error, found.is_done, found.reward) == (None, False, 0.0)
    (message,) = found.observations
    assert message["role"] == "user"
    assert "<information>" in message["content"]
    assert "Doc 1: Solaris" in message["content"]
    assert "Herbert" not in message["content"], "passages that share no word with the query"
    right, wrong = ((*texts, f"<answer>{answer}</answer>") for answer in ("stanislaw lem", "Frank Herbert"))
    assert [r.reward for r in grader.play_all([Turn(1, row, right, 3)])] == [1.0]
    assert [r.reward for r in grader.play_all([Turn(2, row, wrong, 3)])] == [0.0]
    grader.close()


def test_several_queries_at_once_as_search_r1_asks(url: str) -> None:
    answer = requests.post(url, json={"queries": ["Dune", "caves"], "topk": 1, "return_scores": True}, timeout=10)
    assert [[hit["document"]["id"] for hit in hits] for hits in answer.json()["result"]] == [["0"], ["2"]]
    assert requests.post(url, json={"query": "Dune", "topk": 0}, timeout=10).status_code == 422


def test_a_server_that_is_down_costs_the_responses_that_ask_it(tmp_path: Path) -> None:
    """The environment tries again for 45 seconds, longer than it may take here."""
    row = prompt(tmp_path, "Stanislaw Lem")
    grader = Grader(environment("http://127.0.0.1:9/retrieve", timeout_s=3))
    asks, answers = ("<search>who wrote Solaris</search>",), ("<answer>Stanislaw Lem</answer>",)
    down, fine = grader.play_all([Turn(1, row, asks, 3), Turn(2, row, answers, 3)])
    assert down.error == "row 0, env_class search, turn 1: took longer than environment.timeout_s=3"
    assert (fine.error, fine.reward) == (None, 1.0)
    grader.close()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"contents": "no id"}\n')
    for words, line in (
        (("corpus.py", "build", tmp_path / "rows.jsonl", tmp_path / "index"), "rows.jsonl:1: must be "),
        (("server.py", tmp_path / "nowhere"), "nowhere: no such folder; build it with corpus.py build"),
        (("questions.py", tmp_path / "rows.jsonl", "--out", tmp_path / "out"), "needs a question and golden_answers"),
    ):
        failed = run(EXAMPLE / words[0], *words[1:])
        assert failed.returncode == 2
        assert line in failed.stderr
        assert "Traceback" not in failed.stderr
