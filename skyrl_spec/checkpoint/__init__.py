"""What a run leaves behind: ``hf_export`` writes policy and draft as a checkpoint that transformers and vLLM load."""
