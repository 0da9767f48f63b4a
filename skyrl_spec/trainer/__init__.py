"""The driver: ``run`` sets a run up and takes it down, ``placement`` starts the actors, ``actors`` calls them as
groups,
``loop`` is the training step, ``rollouts`` samples and scores, ``advantages`` and ``filters`` are GRPO and DAPO.
"""
