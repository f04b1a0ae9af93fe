"""The engine: a loaded memory model that encodes texts, routes questions and generates answers.

Knows tokens, states and scores. It does not know documents, namespaces or SQL: it is given passage
numbers and a way to fetch their states.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from collections.abc import Sequence as Turns
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from msa_memory.engine import kernels, ops
from msa_memory.engine.adapter import Adapter, load_adapter, merge
from msa_memory.engine.answerability import HEAD_FILE, AnswerabilityHead, load_head, told_signals
from msa_memory.engine.bank import MemoryBank
from msa_memory.engine.bank_view import SETTLED, BankView, Selection
from msa_memory.engine.checkpoint import Checkpoint, open_checkpoint
from msa_memory.engine.config import MSAConfig, read_backbone, read_msa
from msa_memory.engine.context import Feed
from msa_memory.engine.context import Sequence as Row
from msa_memory.engine.decoder import Decoder
from msa_memory.engine.device_bank import DeviceBank
from msa_memory.engine.encoding import (
    encode_head,
    encode_passage,
    encode_passages,
    rows_apart,
    token_batches,
)
from msa_memory.engine.fingerprint import fingerprint_files
from msa_memory.engine.generation import Generation
from msa_memory.engine.id_grammar import RetrievalTokens
from msa_memory.engine.interleave import Interleave, InterleaveOptions, Texts
from msa_memory.engine.layout import Layout, PromptLayout, read_layout
from msa_memory.engine.lexical import passage_terms, question_terms
from msa_memory.engine.passages import Span, split_passages
from msa_memory.engine.sampling import Constraint, SamplingOptions, decided, without_doubtful
from msa_memory.engine.serving import Batch, at_once
from msa_memory.engine.states import HeadStates, PassageStates
from msa_memory.engine.stepper import Stepper, packed_stepper, plain_stepper
from msa_memory.engine.tokenizer import Tokenizer
from msa_memory.errors import ConfigError, ModelNotFoundError

__all__ = ["DecodeWeights", "Engine", "Routing", "load_engine"]

DecodeWeights = Literal["auto", "exact", "packed"]
READ_WORDS, LATER_WORDS = 2.0, 3.0
"""In a later round: what the words of question and evidence count beside the question's own, and how many
times its usual weight the lexical score has. Chosen on two-hop questions whose passages the routers know."""
ENCODED_TOKENS = 32_768
"""Of the passages that a GPU reads in one pass."""
CPU_ENCODED_TOKENS = 512
"""The same of a CPU, whose questions wait for a pass."""
DEVICE_PROMPT_TOKENS = 8192
"""Of all prompts together in one pass on a GPU, which reads as many while a decoding row hardly waits."""


@dataclass(frozen=True, slots=True)
class Routing:
    """What the routers think of every visible passage for one question.

    ``scores`` ``[L, P]`` per router layer, masked passages -inf; ``numbers`` ``[P]`` passage numbers;
    ``selections`` the top-k of each router layer.
    """

    numbers: NDArray[np.int64]
    scores: NDArray[np.float32]
    selections: dict[int, Selection]
    queries: dict[int, Tensor]
    view: BankView
    tokens: int
    words: NDArray[np.float32]
    """The lexical scores ``[P]``, 0..1."""
    lexical_weight: float
    exact: int = field(default_factory=lambda: SETTLED)
    """So many of the most relevant passages have exact scores on every layer, if not all."""

    def settled(self, count: int) -> Routing:
        """The same with at least so many exact scores."""
        bonus = self.lexical_weight * self.words
        scores = self.view.settle(self.scores, list(self.queries.values()), bonus, count)
        return replace(self, scores=scores, exact=max(count, self.exact))

    def mean(self) -> NDArray[np.float32]:
        """Mean score over the router layers ``[P]``, as the model weighs them."""
        return self.view.msa.mean_of_layers(self.scores)

    def relevance(self) -> NDArray[np.float32]:
        """Weighted mean of the routers' mean and the lexical score ``[P]``, -1..1; masked ones -inf."""
        weight = np.float32(self.lexical_weight)
        joined: NDArray[np.float32] = ((self.mean() + weight * self.words) / (1 + weight)).astype(np.float32)
        return joined


@dataclass(eq=False)
class Engine:
    """A memory model ready to run. Not thread-safe: one worker thread owns it."""

    name: str
    decoder: Decoder
    msa: MSAConfig
    tokenizer: Tokenizer
    prompt: PromptLayout
    fingerprint: str
    calibration: dict[str, float] = field(default_factory=dict)
    prepare_stepper: Callable[[], Stepper] | None = None
    """How to prepare the weights for decoding, at the first answer; None decodes with the decoder itself."""
    answerability: AnswerabilityHead | None = None
    """Tells whether what was read answers the question; calibrated by ``refusal_odds``."""

    @cached_property
    def stepper(self) -> Stepper | None:
        """The weights as decoding reads them."""
        return self.prepare_stepper() if self.prepare_stepper is not None else None

    @cached_property
    def batch(self) -> Batch:
        """The questions that are read and answered together; on a GPU in its slots of running answers."""
        if not self.uses_kernels:
            return Batch(self.decoder, prepare=lambda: self.stepper, shares_prompts=False)
        from msa_memory.engine.device_stepper import device_stepper

        return Batch(self.decoder, None, DEVICE_PROMPT_TOKENS, prepare=partial(device_stepper, self.decoder))

    @cached_property
    def head(self) -> HeadStates:
        """Keys and values of the template head, computed once."""
        return encode_head(self.decoder, self.prompt.head)

    @cached_property
    def retrieval_tokens(self) -> RetrievalTokens:
        """The tokens that may occur while the model names passages."""
        return RetrievalTokens(self.tokenizer, self.prompt.layout.delimiter)

    @cached_property
    def uses_kernels(self) -> bool:
        """Whether banks, encoding and decoding go the device's way: on CUDA, with heads the kernels take."""
        like = torch.empty(0, dtype=self.decoder.dtype, device=self.decoder.device)
        return like.is_cuda and kernels.usable(like, self.decoder.config.head_dim)

    @property
    def max_positions(self) -> int:
        return self.decoder.config.max_positions

    @property
    def skim_layers(self) -> tuple[int, ...]:
        """The router layers that a skim of a large memory scores; empty where the model names none."""
        named: Any = self.calibration.get("skim_layers") or ()
        return tuple(map(int, named))

    @property
    def reads_turns(self) -> bool:
        """Whether the model finds answers in earlier turns; else they are recalled as evidence as well."""
        return bool(self.calibration.get("reads_turns", 1.0))

    def split(self, text: str, max_tokens: int) -> list[Span]:
        """Cut a document into passages of at most ``max_tokens`` tokens."""
        return split_passages(text, self.tokenizer.encode_with_offsets, max_tokens)

    def encode(self, number: int, header: str, text: str) -> PassageStates:
        """States of one passage under its number."""
        states = encode_passage(self.decoder, self.prompt.document(number, header, text))
        return replace(states, terms=passage_terms(header + text))

    def encode_many(self, passages: Iterable[tuple[int, str, str]]) -> Iterator[PassageStates]:
        """States of passages given as (number, header, text), in their order.

        A GPU reads many in one pass, and their states arrive in host memory. A CPU reads short ones together
        where no bit of a passage depends on what stands beside it, and else each alone, when its turn comes.
        """
        if not self.uses_kernels and not rows_apart(self.decoder):
            yield from (self.encode(*passage) for passage in passages)
            return
        most = ENCODED_TOKENS if self.uses_kernels else CPU_ENCODED_TOKENS
        asked = ((self.prompt.document(*passage), passage) for passage in passages)
        for batch in token_batches(asked, most):
            states = self._encode_together([ids for ids, _ in batch])
            for (_, (_, header, text)), one in zip(batch, states, strict=True):
                yield replace(one, terms=passage_terms(header + text))

    def _encode_together(self, passages: list[list[int]]) -> list[PassageStates]:
        if not self.uses_kernels:
            return encode_passages(self.decoder, passages)
        from msa_memory.engine.packed_encoding import encode_packed

        return encode_packed(self.decoder, passages).apart()

    def new_bank(self, fetch: Callable[[int], PassageStates]) -> MemoryBank:
        """An empty bank of this model's states; a GPU's kernels choose from theirs (``device_bank``)."""
        if self.uses_kernels and self.msa.head_reduce == "mean":
            return DeviceBank(self.msa, fetch, device=self.decoder.device)
        return MemoryBank(self.msa, fetch, device=self.decoder.device)

    def start(self, view: BankView | None, *, top_k: int | None = None, capacity: int = 256) -> Row:
        """A new sequence behind the template head, at the question's first position."""
        return Row.start(
            self.decoder,
            self.head,
            position=self.prompt.question_position,
            view=view,
            top_k=top_k or self.msa.top_k,
            capacity=capacity,
        )

    def route_steps(
        self,
        question: str,
        view: BankView,
        *,
        top_k: int | None = None,
        evidence: str = "",
        turns_before: str = "",
        lexical_weight: float | None = None,
    ) -> Generator[None, None, Routing]:
        """Score all visible passages for a question (router evidence, pass 1: no memory attention).

        Questions that run in turn share a pass; so do those of ``read_steps`` and ``chat_steps``.

        With ``evidence`` the newest evidence routes along with the question, as in a later round, and its
        words count too: what it names is what the next passage is about. ``turns_before`` is read before the
        question and does not route. ``lexical_weight`` None is the model's own.
        """
        weight = self.calibration.get("lexical_weight", 0.0) if lexical_weight is None else lexical_weight
        words = (
            view.score_words(question_terms(question)) if weight else np.zeros(len(view.numbers), np.float32)
        )
        if evidence and weight:
            read = view.score_words(question_terms(f"{question} {evidence}"))
            words = ((words + READ_WORDS * read) / (1 + READ_WORDS)).astype(np.float32)
            weight *= LATER_WORDS
        prompt = self.prompt
        ids, routes = (
            prompt.follow_up(evidence, question) if evidence else prompt.question(question, turns_before)
        )
        row = self.start(view, top_k=top_k, capacity=len(ids))
        row.bonus = weight * words
        yield from self.batch.route(Feed(row, ids, routes))
        scores = np.stack([row.scores[layer] for layer in self.msa.router_layers])
        return Routing(
            view.numbers,
            view.settle(scores, [row.queries[layer] for layer in self.msa.router_layers], row.bonus),
            dict(row.selections),
            dict(row.queries),
            view,
            len(ids),
            words,
            weight,
        )

    route = at_once(route_steps)

    def best_chunk(self, routing: Routing, number: int, header: str, text: str) -> tuple[int, int]:
        """Characters of ``text`` that the routers score highest within one passage, one router chunk long."""
        states = routing.view.fetch(number)
        scores = [
            ops.score_chunks(
                routing.queries[layer].float(),
                states.router_keys[slot].float().to(self.decoder.device),
                head_reduce=self.msa.head_reduce,
                query_reduce=self.msa.query_reduce,
                scale=1.0,
            )
            for slot, layer in enumerate(self.msa.router_layers)
        ]
        best = int(self.msa.mean_of_layers(torch.stack(scores).cpu().numpy()).argmax())
        return self._characters(best, number, header, text)

    def _characters(self, chunk: int, number: int, header: str, text: str) -> tuple[int, int]:
        """Where a router chunk of an encoded passage lies in its text."""
        before = header if self.prompt.layout.documents == "bare" else f"[{number}]. {header}"
        _, offsets = self.tokenizer.encode_with_offsets(before + text)
        skipped = len(self.prompt.document_start)
        first = max(0, chunk * self.msa.router_chunk - skipped)
        last = min(len(offsets) - 1, first + self.msa.router_chunk - 1)
        first = min(first, last)
        return max(0, offsets[first][0] - len(before)), max(0, min(len(text), offsets[last][1] - len(before)))

    def read_steps(
        self,
        view: BankView,
        selections: dict[int, Selection],
        ids: list[int],
        options: SamplingOptions,
        constraint: Constraint | None = None,
        known: Row | None = None,
        judged: Routing | None = None,
    ) -> Generator[None, None, Generation]:
        """Prefill a prompt with evidence over the chosen passages' states (pass 2); decode is next.

        ``ids`` come from ``prompt.reading`` or ``prompt.conversation``; ``known`` has read the first of them
        over the same passages (``KeptContexts``). An answer of free form does not begin as a refusal does
        where that is less likely than the calibrated ``refusal_logprob``. Where the model has a calibrated
        ``answerability`` head, and the question's routing is given to be ``judged``, that decides alone.
        """
        row = known
        if row is None:
            row = self.start(view, capacity=len(ids) + options.max_new_tokens)
            row.attend_to(selections, {layer: slot for slot, layer in enumerate(self.msa.router_layers)})
        if "refusal_odds" not in self.calibration or self.answerability is None:
            judged = None
        noted = self.judging_layers if judged else ()
        logits = yield from self.batch.feed(Feed(row, ids[row.fed_tokens :], noted=noted))
        if constraint is None and self.prompt.refusal:
            logits = self._settle_refusal(row, logits, judged)
        return Generation(self.tokenizer, options, row, logits, constraint, ids)

    read = at_once(read_steps)

    @property
    def judging_layers(self) -> tuple[int, ...]:
        """Layers to note in a prompt's last feed for ``doubt``."""
        return self.answerability.layers if self.answerability else ()

    def doubt(self, row: Row, logits: Tensor, routing: Routing) -> float:
        """How sure it is that what a sequence has read holds no answer, high where it does not.

        Log-odds by the ``answerability`` head, whose layers were noted; else the log-probability, by the
        logits ``[V]``, that the answer begins as a refusal. ``routing`` is the question's.
        """
        refusal = self.prompt.refusal[0]
        if self.answerability is None:
            return float(logits.float().log_softmax(-1)[refusal])
        told = told_signals(routing.relevance(), routing.mean(), routing.words, logits, refusal)
        return self.answerability.log_odds(row.noted, told)

    def _settle_refusal(self, row: Row, logits: Tensor, judged: Routing | None) -> Tensor:
        """Logits ``[V]`` of a first token, in which a refusal is certain, impossible or as it was."""
        token = self.prompt.refusal[0]
        if judged is not None:
            return decided(logits, token, self.doubt(row, logits, judged) >= self.calibration["refusal_odds"])
        least = self.calibration.get("refusal_logprob")
        return logits if least is None else without_doubtful(logits, token, least)

    def chat_steps(
        self,
        ids: list[int],
        options: SamplingOptions,
        constraint: Constraint | None = None,
        known: Row | None = None,
    ) -> Generator[None, None, Generation]:
        """Prefill a plain conversation, without any memory; decode is next. ``known`` as in ``read``."""
        row = known or Row.start(
            self.decoder,
            self.head.first(0),
            position=0,
            view=None,
            top_k=0,
            capacity=len(ids) + options.max_new_tokens,
        )
        logits = yield from self.batch.feed(Feed(row, ids[row.fed_tokens :]))
        return Generation(self.tokenizer, options, row, logits, constraint, ids)

    chat = at_once(chat_steps)

    def chat_ids(self, turns: Turns[tuple[str, str]]) -> list[int]:
        """Ids of (role, content) turns in the checkpoint's own chat template.

        Raises:
            ConfigError: the checkpoint has no chat template, or it refuses these turns.
        """
        return self.tokenizer.encode_chat([{"role": role, "content": content} for role, content in turns])

    def interleave(
        self,
        view: BankView,
        question: str,
        texts: Texts,
        options: InterleaveOptions,
        *,
        top_k: int | None = None,
    ) -> Interleave:
        """A question to be answered by generating passage numbers, reading their texts, and so on."""
        return Interleave(
            self.decoder,
            self.prompt,
            self.retrieval_tokens,
            start=lambda: self.start(view, top_k=top_k),
            view=view,
            texts=texts,
            question=question,
            options=options,
        )

    def decode(self, generation: Generation) -> Iterator[str]:
        """Run a generation to its end, one token per step; those that run in turn share their passes."""
        return self.batch.decode(generation)

    def count_tokens(self, text: str) -> int:
        """Tokens of user text."""
        return len(self.tokenizer.encode(text))


def load_engine(
    path: Path,
    *,
    name: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    router_normalize: bool | None = None,
    adapter: Path | bool = True,
    decode_weights: DecodeWeights = "auto",
) -> Engine:
    """Load a checkpoint with its routers; ``name`` selects the routers this package ships for a backbone.

    An ``adapter.safetensors`` beside the routers or in the checkpoint's folder is merged into the weights;
    ``adapter`` False leaves it out, a path names another one; the head that tells whether there is an answer
    goes with the model's own.

    Args:
        decode_weights: what answers are decoded with on a CPU: ``exact``, the weights everything else is
            computed with; ``packed``, the same in 4 bits per weight where the checkpoint stores 4 and in 8
            elsewhere, about three times as fast and equal but for rounding; ``auto``, packed where bfloat16
            is the dtype and the shapes allow it. Documents and questions are always read with the former.

    Raises:
        CheckpointError: the files are damaged, incomplete or of an unsupported kind.
        ModelNotFoundError: the checkpoint has no routers.
        ConfigError: ``device``, ``dtype`` or ``decode_weights`` is not usable here.
    """
    if decode_weights not in get_args(DecodeWeights):
        raise ConfigError(f"decode_weights is {decode_weights!r}; expected one of {get_args(DecodeWeights)}")
    checkpoint = open_checkpoint(path)
    routers = _shipped_routers(name)
    config = {**checkpoint.config, **({"msa_config": routers.msa_config} if routers else {})}
    msa = read_msa(config, router_normalize=router_normalize)
    if msa is None:
        raise ModelNotFoundError(
            f"the checkpoint {path} has no memory routers (no msa_config); train some with "
            "`msa-memory train router` or open a model that has them"
        )
    decoder = _load_decoder(checkpoint, config, msa, routers, device, dtype)
    adapted = _adapter_file(path, routers, adapter)
    change = load_adapter(adapted) if adapted is not None else None
    if change is not None:
        merge(decoder, change)
    tokenizer, layout = checkpoint.tokenizer(), read_layout(config)
    return Engine(
        name or path.name,
        decoder,
        msa,
        tokenizer,
        PromptLayout(layout, tokenizer, msa),
        _fingerprint(checkpoint, routers, adapted, msa, layout, tokenizer),
        dict(config["msa_config"].get("calibration") or {}),
        None
        if decoder.device.type != "cpu"
        else partial(_stepper, decoder, checkpoint, change, decode_weights),
        _head_beside(path, routers, decoder) if adapter is True else None,
    )


def _stepper(
    decoder: Decoder, checkpoint: Checkpoint, adapter: Adapter | None, weights: DecodeWeights
) -> Stepper:
    """The decoder prepared for decoding; reads what the adapter changed from the checkpoint once more."""
    if weights != "exact":
        changes, base = {}, {}
        if adapter is not None and decoder.dtype == torch.bfloat16:
            changes = {
                module: (a.to(decoder.dtype), (b.float() * adapter.scale).to(decoder.dtype))
                for module, (a, b) in adapter.pairs.items()
            }
            stored = ((name.removesuffix(".weight"), tensor) for name, tensor in checkpoint.tensors())
            base = {module: tensor.to(decoder.dtype) for module, tensor in stored if module in changes}
        packed = packed_stepper(decoder, base, changes)
        if packed is not None:
            return packed
        if weights == "packed":
            raise ConfigError(
                "decode_weights='packed' needs bfloat16 weights whose sizes are multiples of 32; the model "
                f"has {decoder.dtype} and a hidden size of {decoder.config.hidden_size}; use 'auto' instead"
            )
    return plain_stepper(decoder)


@dataclass(frozen=True, slots=True)
class _Routers:
    weights: Path
    msa_config: dict[str, Any]


def _shipped_routers(name: str | None) -> _Routers | None:
    if name is None:
        return None
    folder = Path(str(files("msa_memory.engine"))) / "weights" / name
    if not (folder / "router.json").is_file():
        return None
    msa_config = json.loads((folder / "router.json").read_text(encoding="utf-8"))
    return _Routers(folder / "router.safetensors", msa_config)


def _adapter_file(path: Path, routers: _Routers | None, wanted: Path | bool) -> Path | None:
    if isinstance(wanted, Path):
        return wanted
    found = _folder_of(path, routers) / "adapter.safetensors"
    return found if wanted and found.is_file() else None


def _folder_of(path: Path, routers: _Routers | None) -> Path:
    """Where a model's files lie that are no checkpoint's."""
    return routers.weights.parent if routers else path if path.is_dir() else path.parent


def _head_beside(path: Path, routers: _Routers | None, decoder: Decoder) -> AnswerabilityHead | None:
    found = _folder_of(path, routers) / HEAD_FILE
    if not found.is_file():
        return None
    return load_head(found, layers=decoder.config.num_layers, size=decoder.config.hidden_size)


def _load_decoder(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    msa: MSAConfig,
    routers: _Routers | None,
    device: str,
    dtype: str,
) -> Decoder:
    where, kind = _device(device), _dtype(dtype, config, device)
    with torch.device("meta"):
        decoder = Decoder(read_backbone(config), msa)
    decoder = decoder.to(kind).to_empty(device=where).requires_grad_(False).eval()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from checkpoint.tensors()
        if routers is not None:
            yield from load_file(routers.weights).items()

    decoder.load(tensors())
    return decoder


def _device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        if found.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{found.type} devices are not supported")
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device {device!r} is not one torch knows; use 'auto', 'cpu' or 'cuda:0'"
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but torch sees no GPU here; use device='cpu'")
    return found


def _dtype(dtype: str, config: dict[str, Any], device: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto":
        if dtype not in known:
            raise ConfigError(f"dtype {dtype!r} is not supported; use 'auto' or one of {', '.join(known)}")
        return known[dtype]
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if stored not in ("bfloat16", "float16"):
        return torch.float32
    on_gpu = _device(device).type == "cuda"
    fast = on_gpu or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _fingerprint(
    checkpoint: Checkpoint,
    routers: _Routers | None,
    adapter: Path | None,
    msa: MSAConfig,
    layout: Layout,
    tokenizer: Tokenizer,
) -> str:
    """What decides the states: weights, routers, adapter, pooling, router layers, layout and tokenizer."""
    added = [routers.weights if routers else None, adapter]
    weights = [*checkpoint.weight_files, *(file for file in added if file is not None)]
    settings = {**asdict(msa), "layout": layout.as_dict(), "tokenizer": tokenizer.digest()}
    of_training = ("loss_weights", "aux_loss_method", "infonce_temperature")
    for unrelated in (*of_training, "evidence", "top_k", "layer_weights"):
        settings.pop(unrelated)
    for reading in ("evidence_before", "evidence_after", "refusal"):
        settings["layout"].pop(reading)
    parts = [fingerprint_files(weights), json.dumps(settings, sort_keys=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
