"""``skyrl-spec doctor``: does this pair of model and draft work here, in every part that a run uses?

- ``finding``: what a check saw, and the table of all
- ``files``: checks of settings, model, draft, tokenizer and machine, before any process starts
- ``live``: checks with real engines and workers, the functions that a run's canaries use
- ``reference``: the policy's log-probs in plain transformers
- ``command``: the command, and the configuration that it checks
"""
