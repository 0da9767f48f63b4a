"""Checks and estimates made before any process starts.

``validation`` applies every rule that needs settings only. ``preflight`` checks files, devices and accounts.
``memory`` estimates processes, memory and sizes.
"""
