"""The reinforcement-learning algorithm, one file per part.

``filters`` chooses the groups to train on (DAPO's dynamic sampling). ``advantages`` turns rewards into advantages
(GRPO, the overlong penalty). ``clipped_surrogate`` is the policy objective and ``kl`` its penalty, token by token.
"""
