"""``skyrl-spec report``: charts of runs on one HTML page.

``command`` runs the steps. ``read`` reads the directories of runs, ``charts`` draws the charts, and ``page`` writes the
page.
"""
