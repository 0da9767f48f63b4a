"""Checkpoints to resume from, and exports that vLLM serves.

- ``dist``: save and load; ``pieces`` and ``optimizer_state``: the tensors of a checkpoint
- ``folders``: directories of checkpoints
- ``hf_export``: Hugging Face checkpoints of policy and draft
- ``bundle``: export of a checkpoint; ``serving``: the command that serves it
"""
