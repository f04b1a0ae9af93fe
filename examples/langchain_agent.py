"""A LangChain agent on a local model that remembers across restarts.

    pip install 'msa-memory[agents]'
    python examples/langchain_agent.py [FOLDER]

It talks once, ends, and talks again as a new process that has nothing but the folder.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from langchain.agents import create_agent
from langchain_core.tools import tool

from msa_memory.integrations.langchain import ChatMSA


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return f"It is sunny in {city}, 21 degrees."


def talk(folder: Path, session: str, *texts: str) -> None:
    """Say some things to an agent and print what it answers."""
    model = ChatMSA(memory=folder, session_id=session, max_tokens=48)
    agent = create_agent(model, tools=[get_weather])
    for text in texts:
        messages = agent.invoke({"messages": [("user", text)]})["messages"]
        print(f"\nuser: {text}")
        for message in messages[1:]:
            for call in getattr(message, "tool_calls", ()):
                print(f"calls {call['name']}({call['args']})")
            if message.text:
                print(f"{message.type}: {message.text}")
        recalled = [m.response_metadata.get("memory_citations", []) for m in messages]
        print(f"   recalled: {[source['text'] for sources in recalled for source in sources]}")
    model.close()


def main() -> None:
    """Two conversations with the same memory, a process apart."""
    with tempfile.TemporaryDirectory(prefix="msa-memory-") as scratch:
        folder = sys.argv[1] if len(sys.argv) > 1 else str(Path(scratch) / "agent-memory")
        print("== Monday", flush=True)
        talk(
            Path(folder),
            "monday",
            "What is the weather in Oslo?",
            "I adopted a grey cat. Her name is Minerva.",
        )
        print("\n== Tuesday, a new process", flush=True)
        subprocess.run([sys.executable, __file__, "--tuesday", folder], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--tuesday"]:
        talk(Path(sys.argv[2]), "tuesday", "What is the name of my cat?")
    else:
        main()
