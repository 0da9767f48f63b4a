"""``skyrl-spec eval-draft``: ``target`` finds out what is evaluated, ``prompts`` on what, ``measure`` runs engines by
turns, ``result`` says what came out."""
