from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from skyrl_spec.drafts.kinds.served import build_speculative_config
from skyrl_spec.drafts.speculation import require_exact_rejection, require_exact_sampling
from skyrl_spec.errors import ConfigError
from skyrl_spec.rollout.engine import RolloutEngine
from skyrl_spec.rollout.engine_settings import EngineSettings, engine_args
from skyrl_spec.settings.draft import MtpConfig
from skyrl_spec.settings.schema import Config, SamplingConfig, TrainerConfig

LOSSY = {
    "rejection_sample_method": "synthetic",
    "synthetic_acceptance_rates": [0.9, 0.8, 0.7],
    "synthetic_acceptance_length": 3.0,
    "enable_adaptive_verification": True,
}


def config_of(mtp: MtpConfig | None = None, user: dict[str, Any] | None = None) -> Config:
    config = Config(trainer=TrainerConfig(mtp=mtp or MtpConfig()))
    config.generator.inference_engine.speculative_config = user
    return config


@pytest.mark.parametrize("key", LOSSY)
def test_lossy_acceptance_is_refused(key: str) -> None:
    lossy = {"method": "mtp", "num_speculative_tokens": 3, key: LOSSY[key]}
    with pytest.raises(ConfigError, match=rf"generator\.inference_engine\.speculative_config\.{key}=.*remove the key"):
        build_speculative_config(config_of(user=lossy))
    with pytest.raises(ConfigError, match=key):
        engine_args(EngineSettings("model", speculative_config=lossy))


def test_block_verification_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rejection_sample_method='block'"):
        require_exact_rejection({"method": "mtp", "rejection_sample_method": "block"})


def test_exact_values_are_accepted() -> None:
    require_exact_rejection(None)
    require_exact_rejection({"method": "mtp", "draft_sample_method": "probabilistic"})
    require_exact_rejection({"rejection_sample_method": "standard", "synthetic_acceptance_length": None})


def test_speculative_config_of_the_user_is_left_alone() -> None:
    user = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}
    assert build_speculative_config(config_of(MtpConfig(enabled=True), user)) == user
    assert user == {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}


def test_speculative_config_follows_the_mtp_head() -> None:
    config = config_of(MtpConfig(enabled=True, num_speculative_tokens=2))
    assert build_speculative_config(config) == {"method": "mtp", "num_speculative_tokens": 2}
    config.generator.speculation.draft_sample_method = "probabilistic"
    assert build_speculative_config(config) == {
        "method": "mtp",
        "num_speculative_tokens": 2,
        "draft_sample_method": "probabilistic",
    }
    assert build_speculative_config(config_of()) is None


def test_min_p_is_refused_with_a_draft_alone() -> None:
    require_exact_sampling(SamplingConfig(min_p=0.1), None)
    require_exact_sampling(SamplingConfig(), {"method": "mtp"})
    with pytest.raises(ConfigError, match=r"generator\.eval_sampling_params\.min_p=0\.1"):
        require_exact_sampling(SamplingConfig(min_p=0.1), {"method": "mtp"}, "generator.eval_sampling_params")


def test_engine_arguments_of_ours_cannot_be_passed_through() -> None:
    assert engine_args(EngineSettings("model", engine_init_kwargs={"block_size": 32}))["block_size"] == 32
    with pytest.raises(ConfigError, match=r"engine_init_kwargs\.logprobs_mode='raw_logprobs'"):
        engine_args(EngineSettings("model", engine_init_kwargs={"logprobs_mode": "raw_logprobs"}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pipeline_parallel_size", 2),
        ("data_parallel_size", 2),
        ("prefill_context_parallel_size", 2),
        ("nnodes", 2),
        ("data_parallel_rank", 0),
        ("watermark_config", {"algorithm": "synthid"}),
        ("kv_transfer_config", {"kv_role": "kv_both"}),
        ("spec_model", "draft"),
    ],
)
def test_engine_arguments_that_break_sync_or_exactness_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"engine_init_kwargs\.{key}="):
        engine_args(EngineSettings("model", engine_init_kwargs={key: value}))


def test_engine_arguments_at_their_defaults_are_accepted() -> None:
    defaults = {"pipeline_parallel_size": 1, "logits_processors": [], "data_parallel_external_lb": False}
    assert engine_args(EngineSettings("model", engine_init_kwargs=defaults)).items() >= defaults.items()


HIDING = {
    "use_local_argmax_reduction": True,
    "use_heterogeneous_vocab": True,
}


@pytest.mark.parametrize("key", HIDING)
def test_an_engine_with_a_hidden_draft_generates_but_is_not_recorded(key: str, tmp_path: Path) -> None:
    """The option is exact: an evaluation may have it. ``propose`` is asked by the sync canary."""
    hidden = {"method": "mtp", "num_speculative_tokens": 3, key: HIDING[key]}
    (tmp_path / "config.json").write_text("{}")
    settings = EngineSettings(str(tmp_path), speculative_config=hidden)
    assert engine_args(settings)["speculative_config"] == hidden
    # No engine is built: the refusal comes before vLLM is asked.
    engine = RolloutEngine.__new__(RolloutEngine)
    engine._settings = settings
    with pytest.raises(ConfigError, match=f"{key}=.*the sync canary must see what the engines draft"):
        engine.propose([[1]], SamplingConfig(), seed=0)


def test_the_check_imports_no_engine() -> None:
    code = "import sys, skyrl_spec.drafts.speculation; print(sorted({'vllm', 'torch', 'ray'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"
