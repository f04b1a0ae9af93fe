"""``MSALLM``: a memory's own model as a LlamaIndex language model, with or without what it remembers.

Knows LlamaIndex's messages, responses and tools; ``MemoryModel.chat`` does the rest on its worker thread.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from llama_index.core.base.llms.generic_utils import (
    astream_chat_response_to_completion_response,
    chat_response_to_completion_response,
    stream_chat_response_to_completion_response,
)
from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.program.utils import get_program_for_llm

from msa_memory.engine.engine import Engine
from msa_memory.engine.json_grammar import GrammarConstraint
from msa_memory.errors import ConfigError, InvalidDocumentError
from msa_memory.integrations.forms import BrokenCall, Form, answer_form
from msa_memory.memory import MemoryModel
from msa_memory.types import Answer, AnswerChunk
from msa_memory.types import ChatMessage as Said

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool

__all__ = ["MSALLM", "said"]

CALL_TOKENS = 256
"""How long an answer that may call a tool becomes when nothing else is said."""
_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}
_OWN = ("recall", "k", "top_k", "where", "max_tokens", "temperature", "stop")
_PER_CALL = (*_OWN, "tools", "tool_choice")


class MSALLM(FunctionCallingLLM):
    """A local model that answers from its memory.

    ``response.raw`` holds ``found``, ``finish_reason``, ``usage`` and ``citations``. Every option but
    ``memory`` may also be given to a single call.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    memory: MemoryModel = Field(exclude=True, repr=False)
    recall: bool = True
    """Answer with what the memory knows about the newest user message; False is plain chat."""
    k: int | None = None
    """Documents whose original text is read."""
    top_k: int | None = None
    where: dict[str, Any] | None = None
    """Only documents that match this filter are recalled."""
    max_tokens: int | None = None
    temperature: float = 0.0
    stop: list[str] | None = None

    _engine: Engine | None = PrivateAttr(default=None)

    def __init__(self, memory: MemoryModel, **options: Any) -> None:
        super().__init__(memory=memory, **options)

    @classmethod
    def class_name(cls) -> str:
        """The name LlamaIndex knows this model by."""
        return "MSALLM"

    @property
    def metadata(self) -> LLMMetadata:
        """The model's true window and name. The first look loads the model if nothing has yet."""
        config = self.memory._shared.config
        return LLMMetadata(
            context_window=self._loaded().max_positions,
            num_output=self.max_tokens or config.max_new_tokens,
            is_chat_model=True,
            is_function_calling_model=find_spec("llguidance") is not None,
            model_name=self._loaded().name,
        )

    def to_payload(self) -> dict[str, Any]:
        """What events say of this model. Unlike ``metadata`` it never loads it: async calls send events."""
        return {"class_name": self.class_name(), **self.model_dump(include=set(_OWN))}

    def tokenize(self, text: str) -> list[int]:
        """The model's own tokens; fits ``Settings.tokenizer`` and ``Memory``'s ``tokenizer_fn``."""
        return self._loaded().tokenizer.encode(text)

    # chat

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Continue a conversation."""
        return self._chat(messages, kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Async twin of ``chat``."""
        return await self._achat(messages, kwargs)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """``chat``, piece by piece; the last response is the whole one."""
        return self._stream_chat(messages, kwargs)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Async twin of ``stream_chat``."""
        return self._astream_chat(messages, kwargs)

    # completion

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt, as the one user message of a chat."""
        return chat_response_to_completion_response(self._chat(_prompted(prompt), kwargs))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Async twin of ``complete``."""
        return chat_response_to_completion_response(await self._achat(_prompted(prompt), kwargs))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """``complete``, piece by piece."""
        return stream_chat_response_to_completion_response(self._stream_chat(_prompted(prompt), kwargs))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """Async twin of ``stream_complete``."""
        return astream_chat_response_to_completion_response(self._astream_chat(_prompted(prompt), kwargs))

    # tools

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        asked = [user_msg] if isinstance(user_msg, ChatMessage) else _prompted(user_msg) if user_msg else []
        return {
            "messages": [*(chat_history or ()), *asked],
            "tools": [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools],
            "tool_choice": tool_choice or ("required" if tool_required else "auto"),
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls in a response, at most one. ValueError if there is none and there has to be."""
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if error_on_no_tool_call and not calls:
            raise ValueError(f"expected a tool call; the model answered {response.message.content!r:.80}")
        return [
            ToolSelection(
                tool_id=call.tool_call_id or "",
                tool_name=call.tool_name,
                tool_kwargs=cast(dict[str, Any], call.tool_kwargs),
            )
            for call in calls
        ]

    def _structured_stream_call(
        self, output_cls: type[Any], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Generator[Any, None, None]:
        """One object, once it is whole: half of its JSON would leave to chance what is in it."""
        program = get_program_for_llm(output_cls, prompt, self, self.pydantic_program_mode)
        yield program(llm_kwargs=llm_kwargs, **prompt_args)

    async def _structured_astream_call(
        self, output_cls: type[Any], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> AsyncGenerator[Any, None]:
        program = get_program_for_llm(output_cls, prompt, self, self.pydantic_program_mode)
        return _one(program.acall(llm_kwargs=llm_kwargs, **prompt_args))

    # inside

    def _chat(self, messages: Sequence[ChatMessage], options: Mapping[str, Any]) -> ChatResponse:
        asked, form, chosen = self._asked(messages, options)
        return _response(self.memory.chat(asked, **chosen), form)

    async def _achat(self, messages: Sequence[ChatMessage], options: Mapping[str, Any]) -> ChatResponse:
        asked, form, chosen = self._asked(messages, options)
        return _response(await self.memory.achat(asked, **chosen), form)

    def _stream_chat(self, messages: Sequence[ChatMessage], options: Mapping[str, Any]) -> ChatResponseGen:
        asked, form, chosen = self._asked(messages, options)
        return _responses(self.memory.stream_chat(asked, **chosen), form)

    def _astream_chat(
        self, messages: Sequence[ChatMessage], options: Mapping[str, Any]
    ) -> ChatResponseAsyncGen:
        asked, form, chosen = self._asked(messages, options)
        return _aresponses(self.memory.astream_chat(asked, **chosen), form)

    def _asked(
        self, messages: Sequence[ChatMessage], options: Mapping[str, Any]
    ) -> tuple[list[Said], Form | None, dict[str, Any]]:
        if unknown := sorted(options.keys() - set(_PER_CALL)):
            raise ConfigError(f"unknown options {unknown}; a call takes {', '.join(sorted(_PER_CALL))}")
        chosen = {name: options.get(name, getattr(self, name)) for name in _OWN}
        chosen["max_new_tokens"] = chosen.pop("max_tokens")
        form = answer_form(options.get("tools") or (), options.get("tool_choice"))
        asked = [said(message) for message in messages]
        if form is not None:
            asked.insert(0, Said(role="system", content=form.instructions))
            chosen["max_new_tokens"] = chosen["max_new_tokens"] or CALL_TOKENS
            chosen["constraint"] = GrammarConstraint(
                lambda: self._loaded().tokenizer, form.grammar, chosen["max_new_tokens"]
            )
        return asked, form, chosen

    def _loaded(self) -> Engine:
        if self._engine is None:
            self._engine = self.memory._run(_engine_of(self.memory))
        return self._engine


def said(message: ChatMessage) -> Said:
    """A LlamaIndex message as a memory's own; a tool call becomes the JSON it was.

    Raises:
        InvalidDocumentError: an image, sound, film or file in it.
    """
    parts = [part for part in map(_text, message.blocks) if part]
    role: Any = _ROLES[message.role]
    return Said(role=role, content="\n".join(parts), name=message.additional_kwargs.get("name"))


def _text(block: Any) -> str:
    match block:
        case TextBlock():
            return block.text
        case ToolCallBlock():
            call = {"name": block.tool_name, "arguments": block.tool_kwargs}
            return json.dumps(call, ensure_ascii=False)
        case ThinkingBlock() | CachePoint():
            return ""
    raise InvalidDocumentError(f"a message holds a {type(block).__name__}; this model reads text alone")


def _prompted(prompt: str) -> list[ChatMessage]:
    return [ChatMessage(role=MessageRole.USER, content=prompt)]


def _responses(chunks: Iterator[AnswerChunk], form: Form | None) -> ChatResponseGen:
    told = _Told(form)
    with closing(cast(Any, chunks)):
        for chunk in chunks:
            if (response := told.response(chunk)) is not None:
                yield response


async def _aresponses(chunks: AsyncIterator[AnswerChunk], form: Form | None) -> ChatResponseAsyncGen:
    told = _Told(form)
    async with aclosing(cast(Any, chunks)):
        async for chunk in chunks:
            if (response := told.response(chunk)) is not None:
                yield response


class _Told:
    """A streamed answer so far."""

    def __init__(self, form: Form | None) -> None:
        self._form, self._text, self._shown = form, "", ""

    def response(self, chunk: AnswerChunk) -> ChatResponse | None:
        """What a chunk adds; None while nothing of it can be shown."""
        self._text += chunk.text
        if chunk.answer is not None:
            whole = _response(chunk.answer, self._form)
            whole.delta = (whole.message.content or "").removeprefix(self._shown)
            return whole
        shown = self._text if self._form is None else self._form.shown(self._text)
        delta, self._shown = shown[len(self._shown) :], shown
        if not delta:
            return None
        return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=shown), delta=delta)


def _response(answer: Answer, form: Form | None) -> ChatResponse:
    usage = {**answer.usage.model_dump(), "total_tokens": answer.usage.total_tokens}
    read = answer.text if form is None else form.read(answer.text)
    if isinstance(read, BrokenCall):
        read = read.text
    if isinstance(read, str):
        message = ChatMessage(role=MessageRole.ASSISTANT, content=read)
    else:
        call = ToolCallBlock(
            tool_call_id=f"call_{uuid.uuid4().hex}", tool_name=read.name, tool_kwargs=read.arguments
        )
        message = ChatMessage(role=MessageRole.ASSISTANT, blocks=[call])
    raw = {
        "found": answer.found,
        "finish_reason": answer.finish_reason if isinstance(read, str) else "tool_calls",
        "usage": usage,
        "citations": [source.model_dump(mode="json") for source in answer.sources],
    }
    return ChatResponse(message=message, raw=raw, additional_kwargs=usage)


async def _one(coming: Awaitable[Any]) -> AsyncGenerator[Any, None]:
    yield await coming


def _engine_of(memory: MemoryModel) -> Generator[None, None, Engine]:
    yield
    return memory._engine()
