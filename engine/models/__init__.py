"""Model families: what their config says, and their forward pass. One family, one file."""
