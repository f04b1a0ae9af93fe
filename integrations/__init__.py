"""Adapters to agent frameworks: each translates that framework's types and does nothing else.

One module per framework, imported by its own name, so that no framework is loaded unless asked for.
"""

__all__: list[str] = []
