"""Speculative decoding: a shortened model drafts what the intact one then accepts or corrects."""
