"""``ChatMSA``: a chat model with a memory, as LangChain wants one.

Orders calls: what was stored, the answer, what is to be stored. ``call`` translates; the memory computes
everything on its one worker thread.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from operator import itemgetter
from typing import Any, Literal, TypeVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from msa_memory.config import default_model
from msa_memory.conversation import read_conversation
from msa_memory.engine.engine import Engine
from msa_memory.errors import ConfigError
from msa_memory.integrations.forms import answer_form
from msa_memory.integrations.langchain.call import PROVIDER, Call
from msa_memory.integrations.langchain.forms import tool_descriptions
from msa_memory.integrations.langchain.messages import said
from msa_memory.integrations.opening import MemoryHandle
from msa_memory.memory import MemoryModel

__all__ = ["ChatMSA"]

T = TypeVar("T")
_CHAT_OPTIONS = ("evidence", "k", "temperature", "top_k", "where")
_FORM_OPTIONS = ("response_format", "tool_choice", "tools")
_IGNORED = ("ls_structured_output_format", "parallel_tool_calls", "stream", "strict")
"""What other providers' users pass along and makes no difference here."""


class ChatMSA(BaseChatModel):
    """A local chat model that remembers.

    With ``memory`` every answer is written with what the memory recalls about the newest human message; with
    ``session_id`` the conversation itself is remembered too, each message once however often it is sent.
    Without ``memory`` it is plain chat. Nothing is loaded before the first call.

    ```python
    model = ChatMSA(memory="agent-memory", session_id="ann")
    print(model.invoke("What does Bob do for work?").content)
    ```
    """

    model_config = ConfigDict(populate_by_name=True)

    model_name: str | None = Field(default_factory=default_model, alias="model")
    """Registered name, local folder or hub id; the memory's own model or the default when None."""
    memory: Any = Field(default=None, exclude=True, repr=False)
    """A ``MemoryModel``, the folder of one, or None for plain chat."""
    namespace: str | None = None
    session_id: str | None = None
    """Remember the conversation under this name, in this namespace of the memory."""
    k: int | None = None
    """Documents whose original text is read for an answer."""
    temperature: float = 0.0
    max_tokens: int | None = None
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    where: dict[str, Any] | None = None
    """Only documents that match this filter are visible to the routers."""
    include_citations: bool = False
    """Answer with a text block that carries standard citation annotations instead of a plain string."""
    tools_chosen_by: Literal["routers", "model"] = "routers"
    """Who decides between a tool and text where nothing is forced, and in which form tools' results are read.

    ``routers`` is for small models: their routers choose the tool, each one once for a message, and they read
    the results as they read evidence, without recalling more. ``model`` leaves both to the model itself.
    """

    _handles: dict[str | None, MemoryHandle] = PrivateAttr(default_factory=dict)
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        if self.session_id is not None and self.memory is None:
            raise ConfigError("session_id is given, but no memory to keep the session in; give memory too")
        self._handle(None)  # an unusable memory is refused here, not at the first call

    def close(self) -> None:
        """Close what this model opened itself; the next call opens it again."""
        for handle in self._handles.values():
            handle.close()

    # answers

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._call(self._handle(kwargs.get("model")).get(), messages, stop, kwargs)
        call.begin()
        answer = call.memory.chat(call.conversation(), **call.chat_options())
        call.finish(answer)
        return call.result(answer)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        memory = await self._handle(kwargs.get("model")).aget()
        call = self._call(memory, messages, stop, kwargs)
        await call.abegin()
        answer = await call.memory.achat(call.conversation(), **call.chat_options())
        await call.afinish(answer)
        return call.result(answer)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._call(self._handle(kwargs.get("model")).get(), messages, stop, kwargs)
        call.begin()
        answers: Any = call.memory.stream_chat(call.conversation(), **call.chat_options())
        with closing(answers):  # a consumer who leaves stops the model
            for part in answers:
                if part.answer is not None:
                    call.finish(part.answer)
                    yield call.last_chunk(part.answer)
                elif (chunk := call.chunk(part.text)) is not None:
                    yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        memory = await self._handle(kwargs.get("model")).aget()
        call = self._call(memory, messages, stop, kwargs)
        await call.abegin()
        answers: Any = call.memory.astream_chat(call.conversation(), **call.chat_options())
        async with aclosing(answers):
            async for part in answers:
                if part.answer is not None:
                    await call.afinish(part.answer)
                    yield call.last_chunk(part.answer)
                elif (chunk := call.chunk(part.text)) is not None:
                    yield chunk

    def _call(
        self,
        memory: MemoryModel,
        messages: Sequence[BaseMessage],
        stop: list[str] | None,
        kwargs: dict[str, Any],
    ) -> Call:
        known = {*_CHAT_OPTIONS, *_FORM_OPTIONS, *_IGNORED, "max_tokens", "model", "session_id"}
        if unknown := sorted(kwargs.keys() - known):
            raise ConfigError(f"unknown options {unknown}; a call takes {', '.join(sorted(known))}")
        session = kwargs.get("session_id", self.session_id)
        asked = {name: kwargs[name] for name in _CHAT_OPTIONS if kwargs.get(name) is not None}
        options = {
            "recall": self.memory is not None,
            "k": self.k,
            "where": self.where,
            "temperature": self.temperature,
            "max_new_tokens": kwargs.get("max_tokens") or self.max_tokens,
            "stop": (self.stop if stop is None else stop) or None,
            **asked,
        }
        return Call(
            memory,
            messages,
            options,
            tools=tool_descriptions(kwargs.get("tools") or ()),
            tool_choice=kwargs.get("tool_choice"),
            response_format=kwargs.get("response_format"),
            routers_choose=self.tools_chosen_by == "routers",
            session=memory.session(session) if session is not None else None,
            include_citations=self.include_citations,
        )

    def _handle(self, model: str | None) -> MemoryHandle:
        """The memory; ``model`` names another model than this one's for a single call."""
        with self._lock:
            if model not in self._handles:
                own = self.model_name if "model_name" in self.model_fields_set else None
                self._handles[model] = MemoryHandle(
                    self.memory, namespace=self.namespace, model=own if model is None else model
                )
            return self._handles[model]

    # tools and structured output

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with tools to call; its calls always match their schemas.

        Args:
            tool_choice: ``"auto"`` or None leaves the choice between a call and text to ``tools_chosen_by``,
                ``"any"`` forces a call, a name forces that tool, ``"none"`` forbids calls.

        Raises:
            ConfigError: an unknown tool choice, or a schema that no grammar can express.
            MissingExtraError: llguidance is not installed.
        """
        described = tool_descriptions(tools)
        answer_form(described, tool_choice, kwargs.get("response_format"))
        return self.bind(tools=described, tool_choice=tool_choice, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: str = "function_calling",
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """This model with answers that match a schema, parsed.

        Args:
            method: ``function_calling`` or ``json_schema`` (the same here), or ``json_mode`` for a
                prompt that itself asks for JSON. The schema holds in each of them.
        """
        if method in ("function_calling", "json_schema"):
            return super().with_structured_output(schema, include_raw=include_raw, **kwargs)
        if method != "json_mode":
            raise ConfigError(
                f"method is {method!r}; expected 'function_calling', 'json_schema' or 'json_mode'"
            )
        traced = {"kwargs": {"method": method}, "schema": schema}
        model = self.bind(response_format=convert_to_json_schema(schema), ls_structured_output_format=traced)
        parser: Any = JsonOutputParser()
        if isinstance(schema, type) and is_basemodel_subclass(schema):
            parser = PydanticOutputParser(pydantic_object=schema)
        return _with_raw(model, parser) if include_raw else model | parser

    # what LangChain asks of a model beside answers

    @property
    def _llm_type(self) -> str:
        return PROVIDER

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = "model_name namespace session_id k temperature max_tokens stop where".split()
        return {name: getattr(self, name) for name in names}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = PROVIDER
        return params

    def _resolve_model_profile(self) -> ModelProfile | None:
        return ModelProfile(
            text_inputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            text_outputs=True,
            tool_calling=True,
            tool_choice=True,
            structured_output=True,
            temperature=True,
        )

    def get_token_ids(self, text: str) -> list[int]:
        """Ids of a text in the model's own tokenizer; loads the model if it is not loaded yet."""
        return self._ask_engine(lambda engine: engine.tokenizer.encode(text))

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Tokens of a conversation in the model's chat template, with what it is told about the tools."""
        form = answer_form(tool_descriptions(tools), None, None) if tools else None
        told = [{"role": "system", "content": form.instructions}] if form else []
        conversation = read_conversation([*told, *map(said, messages)])
        return self._ask_engine(lambda engine: len(engine.chat_ids(conversation.all_turns)))

    def _ask_engine(self, use: Callable[[Engine], T]) -> T:
        memory = self._handle(None).get()

        def steps() -> Generator[None, None, T]:
            yield
            return use(memory._engine())

        return memory._run(steps())


def _with_raw(model: Runnable[Any, Any], parser: Any) -> Runnable[Any, Any]:
    """The raw message, what it parses to, and the error if it does not."""
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | parsed.with_fallbacks([failed], exception_key="parsing_error")
