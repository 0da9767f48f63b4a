"""The policy on Megatron-core.

``compat`` what Megatron needs on CPU · ``parallel`` process groups · ``model`` the trunk · ``attention`` its core
attention · ``conversion`` HF<->Megatron weights · ``capture`` forward hooks · ``optim`` DDP and optimizer ·
``step`` one optimizer step · ``worker`` the Ray actor.
"""
