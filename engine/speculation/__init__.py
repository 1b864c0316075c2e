"""Guesses of the next tokens, verified in one step."""
