"""registry.py knows the environments by name (skyrl-gym's and the user's own), rewards.py plays episodes in them."""
