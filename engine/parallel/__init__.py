"""One model over several processes, each with a range of its heads."""
