"""dataset.py reads rows and tokenizes them, prompts.py orders them, packing.py lays rollouts out for the workers."""
