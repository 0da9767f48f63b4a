"""Speculative-decoding drafts that are trained with the policy.

- ``base``: interface of a draft in training
- ``kinds``: everything else about each kind of draft: settings, shapes, vLLM options, export
- ``align``: which drafted tokens are supervised, and how many an engine would accept
- ``mtp``: the model's own MTP head; ``chain_attention``: its attention over depths
- ``dflash``: a block-diffusion draft; ``blocks``: its training blocks; ``block_attention``: their attention
- ``fresh``: drafts from scratch
- ``speculation``: rules for the engines' speculative decoding
"""
