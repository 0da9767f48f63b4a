"""The vLLM engines that sample rollouts.

``engine`` (one engine, in this process), ``actor`` (its Ray shell), ``speculative`` (which speculative decoding is
accepted; imports no vLLM), ``weight_engine`` (receives weights on CPU), ``spec_metrics`` (acceptance), ``compat``
(what vLLM needs to run right on CPU, and the plugin that tells vLLM of all this).
"""
