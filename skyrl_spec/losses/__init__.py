"""Losses, from hidden states and a vocab-sharded output weight.

- ``logprobs``: log-probs of given tokens, entropy and argmax
- ``soft_ce``: the draft's loss
- ``vocab_parallel``: chunked, vocab-parallel softmax, used by both
- ``reduce``: token weights that carry the global denominator of a loss
"""
