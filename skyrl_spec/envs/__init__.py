"""Environments and rewards.

``registry``: environments by name. ``rewards``: scores one response. ``grader``: scores many in a separate process.
"""
