"""Blocks folded into one another (LaCo): a baseline to compare removal with."""
