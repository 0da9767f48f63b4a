"""Reinforcement learning of language models with a co-trained speculative-decoding draft.

``cli`` and ``config`` are what a user meets first and import neither torch nor vllm, megatron or ray;
``trainer`` orders the step, ``megatron`` and ``drafts`` train, ``rollout`` generates, ``sync`` carries weights.
"""

__version__ = "0.1.0"
