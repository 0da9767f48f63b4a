"""Reinforcement learning of language models with a speculative-decoding draft that is trained in the same step.

``cli`` is the entry point. ``settings`` declares every option, ``planning`` checks a run before it starts, and
``controller`` drives it. ``training`` holds the policy workers (Megatron-core), ``rollout`` the engines (vLLM), and
``sync`` carries weights from workers to engines. ``docs/architecture.md`` describes all packages.
"""

__version__ = "0.1.0"
