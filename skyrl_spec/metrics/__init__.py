"""names.py has the keys, values.py turns sums and counts into values, writers.py keeps them in files and wandb, and
console.py shows them."""
