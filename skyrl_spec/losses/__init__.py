"""Losses, from hidden states and a vocab-sharded output weight.

- ``logprobs``: log-probs of given tokens, entropy and argmax
- ``soft_ce``: distances of drafted tokens' distributions from the policy's
- ``chains``: loss of whole chains, made of such distances
- ``draft_loss``: the draft's loss, one of these or a weighted sum
- ``truncation``: top-k and top-p of the rollouts
- ``vocab_parallel``: chunked, vocab-parallel softmax, used by both
- ``reduce``: token weights that carry the global denominator of a loss
"""
