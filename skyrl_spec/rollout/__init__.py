"""The vLLM engines that sample rollouts.

``engine``: one engine in this process. ``actor``: the same as a Ray actor. ``engine_args``: engine arguments that are
set or refused; imports no vLLM. ``draft_recorder``: records drafted tokens inside vLLM's worker. ``weight_engine``:
receives weights on CPU. ``sender``: sends them from GPU to GPU. ``vllm_patches``: fixes for faults of vLLM, and its
plugin that registers the weight engine.
"""
