"""Attention over the paged pool. One way to compute it, one file; `base.py` is the interface."""
