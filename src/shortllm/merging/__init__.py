"""Blocks folded into one another (LaCo)."""
