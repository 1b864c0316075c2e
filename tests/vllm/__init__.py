"""The connector under real vLLM, in an environment of vLLM's own: `make test-vllm`."""
