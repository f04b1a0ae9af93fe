"""Tokens in; states, scores and tokens out. Knows no SQL."""

__all__: list[str] = []
