"""One call of ``ChatMSA``: messages and options on the way in, the memory's answer on the way out.

Knows what to ask, what of it a session has not stored yet, and how an answer looks in LangChain.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import ToolCall, ToolCallChunk, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from msa_memory.engine.json_grammar import GrammarConstraint
from msa_memory.integrations.forms import Form, answer_form, read_tool_choice
from msa_memory.integrations.langchain.forms import Reading, read_answer
from msa_memory.integrations.langchain.messages import said
from msa_memory.integrations.langchain.sessions import Keyed, unstored, where_beside
from msa_memory.integrations.langchain.tool_choice import choose_tool, with_results_to_read
from msa_memory.memory import MemoryModel
from msa_memory.session import Session
from msa_memory.types import Answer, ChatMessage, Message, Source

__all__ = ["Call", "PROVIDER"]

FORM_TOKENS = 256
"""How long a tool call or JSON may become when nothing else is said."""
PROVIDER = "msa_memory"


@dataclass
class Call:
    """What is asked of the memory, and how its answer becomes LangChain's."""

    memory: MemoryModel
    messages: Sequence[BaseMessage]
    options: Mapping[str, Any]
    """Those of ``MemoryModel.chat``."""
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: Any = None
    response_format: Any = None
    routers_choose: bool = True
    """The routers, not the model, decide between a tool and text where ``tool_choice`` leaves it open."""
    session: Session | None = None
    include_citations: bool = False
    form: Form | None = None
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex}")
    _reads_turns: bool = True
    _stored: Sequence[Message] = ()
    _results: Sequence[BaseMessage] | None = None
    """The messages with tools' results as evidence, where the answer is to be read from these."""
    _read: str = ""
    _shown: str = ""

    # before and after the answer

    def begin(self) -> None:
        """Look up what the session holds and settle the form of the answer."""
        if self.session is not None:
            self._stored = self.session.messages()
            self.memory._run(self._looking())
        if self._is_open():
            self.memory._run(self._choosing())
        self.form = answer_form(self.tools, self.tool_choice, self.response_format)

    async def abegin(self) -> None:
        """Async twin of ``begin``."""
        if self.session is not None:
            self._stored = await self.session.amessages()
            await self.memory._arun(self._looking())
        if self._is_open():
            await self.memory._arun(self._choosing())
        self.form = answer_form(self.tools, self.tool_choice, self.response_format)

    def finish(self, answer: Answer) -> None:
        """Store in the session what it does not hold yet."""
        if self.session is not None:
            for item in self._unstored(answer):
                item.append_to(self.session)

    async def afinish(self, answer: Answer) -> None:
        """Async twin of ``finish``."""
        if self.session is not None:
            for item in self._unstored(answer):
                await item.aappend_to(self.session)

    def _is_open(self) -> bool:
        names = [tool["function"]["name"] for tool in self.tools]
        return bool(names) and self.routers_choose and read_tool_choice(self.tool_choice, names) is None

    def _looking(self) -> Generator[None, None, None]:
        """See whether the model finds answers in the conversation itself."""
        yield
        self._reads_turns = self.memory._engine().reads_turns

    def _choosing(self) -> Generator[None, None, None]:
        """Choose a tool, or else read what tools said."""
        yield
        engine = self.memory._engine()
        self.tool_choice = choose_tool(engine, self.messages, self.tools) or "none"
        if self.tool_choice == "none":
            self._results = with_results_to_read(engine, self.messages)

    # on the way in

    def conversation(self) -> list[ChatMessage]:
        """The messages, behind the form's instructions."""
        told = [ChatMessage(role="system", content=self.form.instructions)] if self.form else []
        return [*told, *map(said, self._results or self.messages)]

    def chat_options(self) -> dict[str, Any]:
        """Options of ``MemoryModel.chat``; what the model finds in the conversation is not recalled."""
        options = dict(self.options)
        if self._reads_turns:
            options["where"] = where_beside(options.get("where"), self.messages, self._stored)
        options["recall"] = options.get("recall", True) and self._results is None
        if self.form is not None:
            options["max_new_tokens"] = options.get("max_new_tokens") or FORM_TOKENS
            options["constraint"] = GrammarConstraint(
                lambda: self.memory._engine().tokenizer, self.form.grammar, options["max_new_tokens"]
            )
        return options

    # on the way out

    def _unstored(self, answer: Answer) -> list[Keyed]:
        """New messages, then the answer's text."""
        return unstored([*self.messages, AIMessage(content=self._reading(answer).text)], self._stored)

    def result(self, answer: Answer) -> ChatResult:
        """A whole answer."""
        reading = self._reading(answer)
        message = AIMessage(
            content=self._content(reading.text, answer.sources, index=None),
            tool_calls=list(reading.tool_calls),
            invalid_tool_calls=list(reading.invalid_tool_calls),
            usage_metadata=_usage(answer),
            response_metadata=self._metadata(answer, reading),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def chunk(self, text: str) -> ChatGenerationChunk | None:
        """More text of a streamed answer; None where nothing of it can be shown yet."""
        self._read += text
        shown = self._read if self.form is None else self.form.shown(self._read)
        fresh, self._shown = shown[len(self._shown) :], shown
        if not fresh:
            return None
        content = self._content(fresh, (), index=0)
        return ChatGenerationChunk(message=AIMessageChunk(content=content))

    def last_chunk(self, answer: Answer) -> ChatGenerationChunk:
        """The end of a streamed answer: its calls, usage and metadata, and text that had to wait."""
        reading = self._reading(answer)
        message = AIMessageChunk(
            content=self._content(reading.text[len(self._shown) :], answer.sources, index=0),
            tool_call_chunks=[_call_chunk(call) for call in reading.tool_calls],
            invalid_tool_calls=list(reading.invalid_tool_calls),
            usage_metadata=_usage(answer),
            response_metadata=self._metadata(answer, reading),
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message)

    def _reading(self, answer: Answer) -> Reading:
        return read_answer(self.form, answer.text, self.id)

    def _content(
        self, text: str, sources: Sequence[Source], *, index: int | None
    ) -> str | list[str | dict[Any, Any]]:
        if not self.include_citations:
            return text
        block: dict[Any, Any] = {"type": "text", "text": text}
        if index is not None:
            block["index"] = index
        whole = len(self._shown) + len(text) if index is not None else len(text)
        if cited := [_annotation(source, whole) for source in sources if source.cited]:
            block["annotations"] = cited
        return [block]

    def _metadata(self, answer: Answer, reading: Reading) -> dict[str, Any]:
        return {
            "model_name": self.memory._shared.runtime.key.name,
            "model_provider": PROVIDER,
            "finish_reason": "tool_calls" if reading.tool_calls else answer.finish_reason,
            "memory_citations": [source.model_dump(mode="json") for source in answer.sources],
        }


def _call_chunk(call: ToolCall) -> ToolCallChunk:
    args = json.dumps(call["args"], ensure_ascii=False)
    return tool_call_chunk(name=call["name"], args=args, id=call["id"], index=0)


def _usage(answer: Answer) -> UsageMetadata:
    usage = answer.usage
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
    )


def _annotation(source: Source, length: int) -> dict[str, Any]:
    """LangChain's standard citation of one source by a whole answer of ``length`` characters."""
    title = source.metadata.get("title")
    return {
        "type": "citation",
        "title": title if isinstance(title, str) else source.id,
        "cited_text": source.text,
        "start_index": 0,
        "end_index": length,
        "extras": {"memory_id": source.id, "passage": source.passage, "score": source.score},
    }
