"""How good a memory is, measured: needles, questions, chains of two, conversations, each beside baselines.

One evaluation per module, each a function that asks, keeps every single result in a ``Journal`` and returns
its figures; ``reporting`` writes them with the command and the machine, ``plots`` draws them.
"""

__all__: list[str] = []
