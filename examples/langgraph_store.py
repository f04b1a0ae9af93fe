"""A LangGraph graph whose store is a memory: found by meaning, kept in a folder.

pip install 'msa-memory[langgraph]' langgraph
python examples/langgraph_store.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime

from msa_memory.integrations.langgraph import MSAStore


@dataclass
class User:
    """Who is talking."""

    name: str


class State(TypedDict, total=False):
    """What goes through the graph."""

    text: str
    recalled: list[str]


def recall(state: State, runtime: Runtime[User]) -> State:
    """Look for what this user said before about the same matter."""
    assert runtime.store is not None
    found = runtime.store.search(("notes", runtime.context.name), query=state["text"], limit=2)
    return {"recalled": [item.value["text"] for item in found]}


def remember(state: State, runtime: Runtime[User]) -> State:
    """Keep what was said; the same sentence is one note."""
    assert runtime.store is not None
    runtime.store.put(("notes", runtime.context.name), state["text"], {"text": state["text"]}, ttl=None)
    return {}


def main() -> None:
    """Two users say things, then ask."""
    with tempfile.TemporaryDirectory(prefix="msa-memory-") as scratch:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch) / "store"
        graph = StateGraph(State, context_schema=User)
        graph.add_node(recall)
        graph.add_node(remember)
        graph.add_edge(START, "recall")
        graph.add_edge("recall", "remember")
        graph.add_edge("remember", END)
        with MSAStore(folder) as store:
            app = graph.compile(store=store)
            for user, text in (
                ("ann", "I paint lighthouses in Bergen."),
                ("ann", "My cat Minerva is allergic to chicken."),
                ("ben", "My cat eats everything."),
                ("ann", "What may my cat not eat?"),
            ):
                state = app.invoke({"text": text}, context=User(user))
                print(f"{user}: {text}\n   recalled: {state['recalled']}")
            print(f"namespaces: {store.list_namespaces()}")


if __name__ == "__main__":
    main()
