"""What a run leaves behind and goes on from.

``dist`` saves and loads what the ranks train, ``folders`` orders the directories of these checkpoints; ``hf_export``
writes policy and draft as checkpoints that transformers and vLLM load, ``fresh`` drafts from scratch.
"""
