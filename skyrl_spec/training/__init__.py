"""Training of policy and draft on Megatron-core.

- ``trainer``: policy, draft and reference of one rank
- ``step``: forward pass and loss of a micro-batch
- ``optimizer``: gradient buffer, optimizer and schedule of one module
- ``proposals``: an engine's drafted tokens as rows, for the sync canary
- ``worker``: the Ray actor
"""
