"""Engines that do not sample from the policy's distribution, for tests that must tell."""

from __future__ import annotations

from dataclasses import replace

from skyrl_spec.rollout import compat, engine
from skyrl_spec.rollout.engine import EngineSettings, RolloutEngine


class UnmendedEngine(RolloutEngine):
    """An engine on vLLM as it comes."""

    def __init__(self, settings: EngineSettings):
        compat.register(mends=(), cpu_mends=())
        super().__init__(settings)


class LossyEngine(RolloutEngine):
    """An engine that accepts drafted tokens at a given rate, however likely the policy finds them."""

    def __init__(self, settings: EngineSettings, acceptance_rates: list[float]):
        lossy = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": acceptance_rates}
        assert settings.speculative_config is not None
        # What refuses it, in this process alone.
        engine.require_exact_rejection = lambda _: None
        super().__init__(replace(settings, speculative_config=settings.speculative_config | lossy))
