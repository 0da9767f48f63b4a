"""``names`` has the keys and ``reference`` what they mean; ``values`` turns sums and counts into values; ``writers``
and ``dashboards`` keep them in files, wandb and TensorBoard; ``headline`` picks what matters most; ``console`` shows
it.
"""
