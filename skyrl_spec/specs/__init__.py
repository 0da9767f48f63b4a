"""Shapes of models and drafts, read from Hugging Face files without torch.

``files`` reads directories, hub names and tensor headers. ``model``, ``mtp`` and ``dflash`` turn a ``config.json``
into the shapes of a policy, of its MTP head and of a DFlash draft. ``dtypes`` has the number types.
"""
