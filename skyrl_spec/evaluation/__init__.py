"""The commands ``eval-draft`` and ``compare``.

``command`` runs ``eval-draft``: ``target`` finds model and draft, ``prompts`` reads the prompts, ``measure`` runs
engines with and without the draft, and ``result`` makes the table. ``compare`` trains three times: with the draft
trained, frozen and absent.
"""
