"""Tokens in; states, scores and tokens out. Knows no SQL."""
