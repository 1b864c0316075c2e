"""`kvstrata bench engine`: our engine beside transformers and vLLM, the same model on the same machine."""
