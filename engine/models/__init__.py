"""Model families: what their config says, and the forward pass they share."""
