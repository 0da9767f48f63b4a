"""Environments and rewards.

``registry``: environments by name. ``episodes``: plays and scores a turn. ``grader``: does so for many in a separate
process.
"""
