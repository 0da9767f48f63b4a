"""Weights on their way to the engines.

``weights``: the order of a sync, and versions. ``payload``: weights as numpy arrays, for CPU engines. ``canary``:
checks that trainer and engines compute the same.
"""
