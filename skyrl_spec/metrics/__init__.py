"""Metrics of a run: their keys, values, files and display.

``names`` has the keys and ``reference`` their meaning. ``values`` turns sums and counts into values, ``acceptance``
turns vLLM's counters into metrics. ``writers`` and ``dashboards`` write files, wandb and TensorBoard. ``headline``
selects the most important values, and ``console`` prints them.
"""
