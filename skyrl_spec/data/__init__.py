"""Data that training reads, and batches for the workers.

``dataset`` reads rows and turns them into prompts, ``tokenizer`` loads and checks the tokenizer, ``prompts`` fixes the
order of prompts, and ``packing`` turns rollouts into batches.
"""
