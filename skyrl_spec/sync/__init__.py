"""Weights on their way to the engines.

``weights``: order and versions of a sync. ``payload``: weights as numpy arrays, for CPU engines. ``canary``: check that
trainer and engines compute the same.
"""
