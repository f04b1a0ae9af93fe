"""Stores to test and documents for them; a passage's states follow from its number."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from msa_memory.persistence import NewDocument, NewPassage, Store
from msa_memory.types import TensorBytes

POSTGRES_URL = os.environ.get("MSA_TEST_POSTGRES_URL")
MODEL = {"model": "tiny", "fingerprint": "f" * 64, "info": {"layers": 2}}


def make_states(number: int) -> dict[str, TensorBytes]:
    noise = hashlib.sha512(str(number).encode()).digest()
    return {
        "keys": TensorBytes("F32", (2, 3), noise[:24]),
        "values": TensorBytes("BF16", (5,), noise[24:34]),
        "flags": TensorBytes("U8", (3,), b"abc"),
    }


def make_document(store: Store, id: str, text: str = "", *, parts: int = 1, **fields: object) -> NewDocument:
    """A document cut into ``parts`` passages of about the same length."""
    text = text or f"This is what {id} says."
    edges = [len(text) * part // parts for part in range(parts + 1)]
    passages = [
        NewPassage(start=start, end=end, tokens=end - start, number=number, states=make_states(number))
        for number, start, end in zip(store.reserve_numbers(parts), edges, edges[1:], strict=False)
    ]
    return NewDocument(**{"id": id, "namespace": "default", "text": text, "passages": passages, **fields})


@pytest.fixture
def new() -> Callable[..., NewDocument]:
    return make_document


@pytest.fixture
def states_of() -> Callable[[int], dict[str, TensorBytes]]:
    return make_states


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "bank"


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    with Store.open(folder) as store:
        store.bind_model(**MODEL)
        yield store


@pytest.fixture
def again(folder: Path) -> Iterator[Callable[..., Store]]:
    """Opens the same folder once more, as another process would."""
    opened: list[Store] = []

    def open_again(**options: object) -> Store:
        opened.append(Store.open(folder, **options))
        return opened[-1]

    yield open_again
    for store in opened:
        store.close()


@pytest.fixture
def postgres_url(new_schema: Callable[[str], str]) -> str:
    """A catalog URL with a schema of its own. CI has a server, so there its absence is a failure."""
    if not POSTGRES_URL:
        missing = "no PostgreSQL: set MSA_TEST_POSTGRES_URL, or run with .ci/with-postgres COMMAND"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    return new_schema(POSTGRES_URL)


@pytest.fixture(params=["memory", "folder", pytest.param("postgres", marks=pytest.mark.postgres)])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """The same bank in memory, on SQLite and on PostgreSQL."""
    url = request.getfixturevalue("postgres_url") if request.param == "postgres" else None
    path = None if request.param == "memory" else tmp_path / "any-bank"
    with Store.open(path, catalog_url=url) as store:
        store.bind_model(**MODEL)
        yield store
