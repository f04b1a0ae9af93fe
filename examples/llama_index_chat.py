"""A chat that outgrows its window: LlamaIndex keeps the newest turns, the memory recalls the rest.

Run it with `python examples/llama_index_chat.py`. Needs `pip install 'msa-memory[llama-index]'` and no key.
The words of the conversation are given; only the last question is put to the model.
"""

from __future__ import annotations

import asyncio

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.memory import Memory

from msa_memory import MemoryModel
from msa_memory.integrations.llama_index import MSALLM, MSAMemoryBlock

SAID = [
    ("I adopted a grey cat today. Her name is Minerva.", "What a fine name! I hope she likes her new home."),
    ("My sister Ingrid is getting married in Bergen on the 14th of June.", "Congratulations to Ingrid!"),
    ("I started to learn the cello with a teacher called Mr. Okafor.", "The cello has a lovely, warm sound."),
    ("My flight to the wedding leaves at 07:40 from gate 22.", "That is early. Set two alarms."),
    ("The bakery on the corner has the best cardamom buns.", "Fresh buns make a good morning."),
    ("I am painting the kitchen yellow this weekend.", "Yellow will make the room bright."),
    ("The old laptop finally broke, so I ordered a new one.", "I hope that your files are safe."),
    ("It has rained for a week and the cellar is wet.", "A pump could help, and open windows."),
]
QUESTION = "What is the name of my cat?"


async def main() -> None:
    """Talk for a while, then ask about the beginning."""
    with MemoryModel.open() as memory:
        llm = MSALLM(memory, max_tokens=24)  # recalls for itself too; another LLM would read the block alone
        chat = Memory.from_defaults(
            session_id="ada",
            token_limit=600,
            chat_history_token_ratio=0.1,  # keep about 60 tokens of conversation
            token_flush_size=20,
            tokenizer_fn=llm.tokenize,
            memory_blocks=[MSAMemoryBlock(memory, max_tokens=200, tokenizer_fn=llm.tokenize)],
        )
        for told, reply in SAID:
            await chat.aput(ChatMessage(role=MessageRole.USER, content=told))
            await chat.aput(ChatMessage(role=MessageRole.ASSISTANT, content=reply))
        stored = memory.session("ada").messages()
        print(f"{len(stored)} of {2 * len(SAID)} messages have left the chat for the memory")
        recalled = (await chat.aget(input=QUESTION))[0]
        print(recalled.content)
        engine = SimpleChatEngine.from_defaults(llm=llm, memory=chat)
        print(f"Q: {QUESTION}\nA: {await engine.achat(QUESTION)}")


if __name__ == "__main__":
    asyncio.run(main())
