"""The policy on Megatron-core.

- ``policy``: the trunk; ``attention``: its core attention
- ``conversion``: weights between Hugging Face and Megatron names and layouts
- ``capture``: forward hooks that hand trunk states to a draft
- ``parallel``: process groups
- ``megatron_patches``: fixes for faults of Megatron
- ``dtypes``: torch's dtypes by the names of the settings
"""
