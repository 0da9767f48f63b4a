"""The driver. ``task`` reads what a run trains, ``output`` writes its results, ``run`` sets a run up and takes it down.
``placement`` starts Ray and the actors, ``actors`` calls them as groups, ``loop`` is the training step, ``rollouts``
samples and scores, ``checkpoints`` saves and resumes, ``fidelity`` and ``lossless`` check rollouts, ``signals`` and
``processes`` handle signals and the end of processes, ``warmup`` trains a draft alone."""
