"""Environments by name, and rewards of real skyrl-gym environments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from skyrl_spec.data.dataset import load_prompts
from skyrl_spec.envs.episodes import EnvResult, Episodes, Turn, check_environments
from skyrl_spec.envs.registry import check_env_class, register_custom
from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.schema import EnvironmentConfig
from skyrl_spec.types import Prompt

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic_mtp"
CUSTOM = {"test_env_length": f"{__name__}:LengthEnv", "test_env_rewriting": f"{__name__}:RewritingEnv"}


class LengthEnv(BaseTextEnv):
    """The reward is the length of the text times a factor from the configuration."""

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__()
        self.scale = env_config.get("scale", 1.0)

    def step(self, action: str) -> BaseTextEnvStepOutput:
        if action == "boom":
            raise KeyError("no grade")
        reward = float("nan") if action == "nan" else self.scale * len(action)
        return BaseTextEnvStepOutput(observations=[], reward=reward, done=True, metadata={})


class RewritingEnv(LengthEnv):
    """An environment that adds a system message to the prompt, as environments may in SkyRL."""

    def init(self, prompt: list[dict[str, str]]) -> tuple[list[dict[str, str]], dict[str, Any]]:
        return [{"role": "system", "content": "Be brief."}, *prompt], {}


@pytest.fixture(scope="module", autouse=True)
def _custom() -> None:
    register_custom(CUSTOM)


def score(prompt: Prompt, text: str, env_config: Any) -> EnvResult:
    """Result of a response of one turn."""
    return Episodes().play(Turn(0, prompt, (text,), max_turns=1), env_config)


def prompt(env_class: str, **extras: Any) -> Prompt:
    return Prompt("row-7", [1], [{"role": "user", "content": "1+1="}], env_class, extras)


def test_a_users_gsm8k_parquet_is_loaded_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from tokenizer import build_tokenizer

    questions = {"Tom has 40 apples and buys 2. How many?": "42", "How many legs have 300 dogs?": "1200"}
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": question}],
            "env_class": "gsm8k",
            "reward_spec": {"method": "rule", "ground_truth": answer},
            "extra_info": {"index": index, "split": "train", "question": question},
        }
        for index, (question, answer) in enumerate(questions.items())
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    prompts = load_prompts(
        [tmp_path / "train.parquet"],
        build_tokenizer(),
        max_prompt_length=64,
        default_env_class="aime",
        setting="data.train_data",
    ).prompts
    environment = EnvironmentConfig()
    check_environments(prompts, environment)
    right = [score(*pair, {}) for pair in zip(prompts, ["40+2=42\n#### 42", "300 times 4\n#### 1,200"], strict=True)]
    assert [result.reward for result in right] == [1.0, 1.0]
    wrong = [score(*pair, {}) for pair in zip(prompts, ["#### 41", "1200"], strict=True)]
    assert [result.reward for result in wrong] == [0.0, 0.0]


def test_custom_environments_get_their_configuration() -> None:
    results = [score(prompt("test_env_length"), text, {"scale": 0.5}) for text in ("abcd", "")]
    assert [result.reward for result in results] == [2.0, 0.0]
    # Registering it again is no error, and the name is now known.
    register_custom(CUSTOM)
    check_env_class("test_env_length", {})


def test_unknown_env_class_lists_those_known() -> None:
    with pytest.raises(ConfigError, match=r"^environment\.env_class=gsm9k: must be one of aime, gsm8k, .*my_env, "):
        check_env_class("gsm9k", {"my_env": "module:Class"})
    check_env_class("my_env", {"my_env": "module:Class"})
    with pytest.raises(ConfigError, match=r"^env_class of row row-7=gsm9k: must be one of"):
        check_environments([prompt("gsm9k")], EnvironmentConfig())


@pytest.mark.parametrize(
    ("entry_point", "expected"),
    [
        ("no_colon", "must be module:Class"),
        ("no_such_module_here:Env", "cannot be imported"),
        ("json:Nothing", "must name a subclass"),
        ("json:JSONDecoder", "must name a subclass"),
    ],
)
def test_bad_custom_entries_are_answered_by_one_line(entry_point: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"^environment\.custom\.bad={entry_point}: .*{expected}"):
        register_custom({"bad": entry_point})
    with pytest.raises(ConfigError, match=r"^environment\.custom\.gsm8k=.*the name is taken"):
        register_custom({"gsm8k": CUSTOM["test_env_length"]})


def test_rows_that_an_environment_cannot_use_are_found_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"^row row-7: environment gsm8k cannot be made .*reward_spec field is requ"):
        check_environments([prompt("gsm8k", data_source="x")], EnvironmentConfig())


def test_what_a_reward_function_raises_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"KeyError: 'no grade'") as caught:
        score(prompt("test_env_length"), "boom", {})
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(RuntimeError, match=r"reward is nan"):
        score(prompt("test_env_length"), "nan", {})


def test_what_a_single_turn_cannot_do_is_refused() -> None:
    multi_turn = prompt("gsm8k_multi_turn", reward_spec={"ground_truth": "2"}, extra_info={})
    with pytest.raises(ConfigError, match=r"^environment\.env_class=gsm8k_multi_turn: wants another turn"):
        score(multi_turn, "#### 3", {})
    with pytest.raises(ConfigError, match=r"^environment\.env_class=test_env_rewriting: rewrites the prompt"):
        score(prompt("test_env_rewriting"), "x", {})


def test_imports_stay_light() -> None:
    code = """
import sys
import skyrl_spec.data.dataset, skyrl_spec.data.packing, skyrl_spec.data.prompts, skyrl_spec.envs.episodes
import skyrl_spec.metrics.console, skyrl_spec.metrics.writers
import skyrl_spec.algorithms.advantages, skyrl_spec.algorithms.filters
early = {"pandas", "wandb", "skyrl_gym"} & set(sys.modules)
assert not early, early
import skyrl_gym
skyrl_gym.make("gsm8k", extras={"reward_spec": {"ground_truth": "1"}})
heavy = {"torch", "vllm", "megatron", "ray", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
