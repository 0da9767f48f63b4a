"""Losses: ``policy`` (clipped surrogate, KL), ``logprobs`` and ``soft_ce`` (vocab-parallel, in chunks), ``reduce`` (the
one denominator), ``vocab_parallel`` (what the two chunked ones share).
"""
