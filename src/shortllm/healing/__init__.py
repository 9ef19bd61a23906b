"""Healing without training: new values for weights of the blocks next to what was removed."""
