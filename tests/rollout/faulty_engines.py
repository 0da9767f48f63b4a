"""Engines that do not sample from the policy's distribution, to show that tests notice."""

from __future__ import annotations

from skyrl_spec.rollout import vllm_patches
from skyrl_spec.rollout.engine import RolloutEngine
from skyrl_spec.rollout.engine_settings import EngineSettings


class UnpatchedEngine(RolloutEngine):
    """An engine on vLLM without our fixes."""

    def __init__(self, settings: EngineSettings):
        vllm_patches.register(fixes=(), cpu_fixes=())
        super().__init__(settings)


class LossyEngine(RolloutEngine):
    """An engine that accepts drafted tokens too often: with ``1 / leniency`` times the right probability."""

    def __init__(self, settings: EngineSettings, leniency: float):
        from vllm.v1.sample import rejection_sampler

        uniform = rejection_sampler.generate_uniform_probs
        rejection_sampler.generate_uniform_probs = lambda *args, **kwargs: leniency * uniform(*args, **kwargs)
        super().__init__(settings)
