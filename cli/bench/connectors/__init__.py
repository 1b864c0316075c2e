"""`kvstrata bench vllm`: vLLM alone, with our connector, and with another one, the same prompts for all."""
