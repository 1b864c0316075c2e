"""Engines that are not ours, as clients of the store: one package each, imported by that engine alone."""
