"""The driver. ``task`` is what is trained and ``output`` what is written; ``run`` sets a run up and takes it down,
``compare`` does so three times; ``placement`` starts the actors, ``actors`` calls them as groups, ``loop`` is the
training step, ``rollouts`` samples and scores, ``advantages`` and ``filters`` are GRPO and DAPO."""
