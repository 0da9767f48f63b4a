"""Speculative-decoding drafts that are trained with the policy.

``base`` the interface the worker knows · ``align`` which positions are drafted and supervised · ``mtp`` the model's own
MTP head · ``chain_attention`` how its depths attend · ``dflash`` a block-diffusion draft · ``blocks`` what it learns
from · ``block_attention`` how its slots attend · ``build`` which one a configuration asks for.
"""
