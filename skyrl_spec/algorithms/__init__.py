"""The reinforcement-learning algorithm, one file per part.

``filters`` chooses the groups to train on (DAPO's dynamic sampling). ``advantages`` turns rewards into advantages
(GRPO, RLOO, REINFORCE++, the overlong penalty). ``policy_loss`` names the policy objectives, one in each of
``clipped_surrogate``, ``gspo`` and ``cispo``. ``kl`` is the penalty. All are computed token by token.
"""
