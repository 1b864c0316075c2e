"""`kvstrata demo`: the whole service on one machine, a scripted conversation, and the proof beside it."""
