"""How the next token is chosen from logits."""
