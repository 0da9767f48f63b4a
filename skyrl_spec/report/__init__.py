"""``skyrl-spec report``: ``read`` takes runs' folders, ``charts`` draws what they have, ``page`` is what is written."""
