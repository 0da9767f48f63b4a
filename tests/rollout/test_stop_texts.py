"""Texts that end a response: where, with and without a draft, and with how many log-probs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_process import EngineProcess
from exact import generate
from transformers import AutoTokenizer

from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.types import Generation

MODEL = Path(__file__).resolve().parents[2] / "examples" / "arithmetic_mtp" / "model"
QUESTIONS = ["7-2+9=", "3+4+1=", "9-1-1+5=", "2+2+2="]
SAMPLINGS = {"greedy": SamplingConfig(temperature=0.0), "sampled": SamplingConfig(temperature=1.0)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module", params=["mtp", "no draft"])
def engine(request: pytest.FixtureRequest, start_engine: Callable[..., EngineProcess]) -> EngineProcess:
    speculative = {"method": "mtp", "num_speculative_tokens": 7} if request.param == "mtp" else None
    return start_engine(model_path=str(MODEL), speculative_config=speculative, max_model_len=128)


def answers(engine: EngineProcess, tokenizer: Any, sampling: SamplingConfig, stop: list[str]) -> list[Generation]:
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in QUESTIONS
    ]
    sampling = SamplingConfig(max_generate_length=60, temperature=sampling.temperature, stop=stop)
    return [group[0] for group in generate(engine, prompts, sampling, seed=5)]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
@pytest.mark.parametrize("stop", [["#"], ["####"], ["never", " "], ["#### 1", "####"]], ids=repr)
def test_a_response_ends_with_the_first_text_that_ends_it(
    engine: EngineProcess, tokenizer: Any, sampling: SamplingConfig, stop: list[str]
) -> None:
    whole = answers(engine, tokenizer, sampling, [])
    cut = answers(engine, tokenizer, sampling, stop)
    lengths = []
    for mine, theirs in zip(cut, whole, strict=True):
        texts = [tokenizer.decode(theirs.token_ids[:end]) for end in range(1, len(theirs.token_ids) + 1)]
        expected = next((end for end, text in enumerate(texts, start=1) if any(word in text for word in stop)), None)
        assert mine.token_ids == theirs.token_ids[:expected]
        assert mine.logprobs == pytest.approx(theirs.logprobs[:expected], abs=1e-4)
        assert mine.finish_reason == ("stop" if expected is not None else theirs.finish_reason)
        lengths.append(expected)
    assert any(length is not None for length in lengths), "no response has such a text"
