"""A memory for an agent on any other chat model: two lines, the middleware and its folder.

    pip install 'msa-memory[agents]' langchain-openai
    OPENAI_API_KEY=... python examples/langchain_middleware.py openai:gpt-5-mini agent-memory

The memory's own small model runs on this machine: it chooses what is recalled, and the other model answers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from langchain.agents import create_agent
from langchain.chat_models import init_chat_model
from langchain_core.language_models import BaseChatModel
from langgraph.checkpoint.memory import InMemorySaver

from msa_memory.integrations.langchain import MSAMemoryMiddleware

CONVERSATIONS = {
    "monday": ("I adopted a grey cat. Her name is Minerva.", "The vet says that she is allergic to chicken."),
    "tuesday": ("What may my cat not eat?",),
}


def talk(model: BaseChatModel, folder: Path) -> list[str]:
    """Hold each conversation in a thread of its own; what one of them said, the next one recalls."""
    memory = MSAMemoryMiddleware(folder)
    agent = create_agent(model, middleware=[memory], checkpointer=InMemorySaver())
    answers = []
    for thread, texts in CONVERSATIONS.items():
        for text in texts:
            config = {"configurable": {"thread_id": thread}}
            state = agent.invoke({"messages": [("user", text)]}, config)
            answers.append(state["messages"][-1].text)
            print(f"{thread}, user: {text}\n{thread}, agent: {answers[-1]}")
    memory.close()
    return answers


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    talk(init_chat_model(sys.argv[1]), Path(sys.argv[2]))
