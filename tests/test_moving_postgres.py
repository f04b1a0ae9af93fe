"""Every move on a PostgreSQL catalog: out of one, into one, inside one."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from msa_memory import MemoryModel
from msa_memory.testing import open_memory, tiny_model

pytestmark = pytest.mark.postgres


@pytest.fixture
def memories(tmp_path: Path, new_schema: Callable[[str], str]) -> Iterator[list[MemoryModel]]:
    """Two memories with catalogs of their own."""
    url = os.environ.get("MSA_TEST_POSTGRES_URL")
    if not url:
        pytest.skip("no PostgreSQL: set MSA_TEST_POSTGRES_URL to a database the tests may create schemas in")
    opened = [open_memory(tmp_path / f"m{place}", catalog_url=new_schema(url)) for place in range(2)]
    yield opened
    for memory in opened:
        memory.close()


def contents(memory: MemoryModel) -> dict[str, Any]:
    assert memory.verify() == ()
    documents = {doc.id: (doc, memory.history(doc.id)) for doc in memory.list(limit=100)}
    return {"documents": documents, "messages": memory.session("talk").messages()}


def test_every_move(memories: list[MemoryModel], tmp_path: Path) -> None:
    memory, target = memories
    memory.add_many([{"id": f"d{i}", "content": f"Person {i} lives in house {i}."} for i in range(6)])
    memory.update("d1", "Person 1 lives on a boat.", metadata={"a": {"b": 1}})
    memory.session("talk").append("user", "Where is the boat?", key="k1")
    memory.export(tmp_path / "out.msa")
    assert target.import_bundle(tmp_path / "out.msa").encoded == 0
    assert target.import_bundle(tmp_path / "out.msa").unchanged == 7
    assert contents(target) == contents(memory)
    with target.fork(tmp_path / "copy") as copy:
        assert contents(copy) == contents(memory)
        copy.add("Only in the copy.")
        assert copy.verify() == ()
    model = tiny_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 2
    save_file(weights, model / "model.safetensors")
    assert target.reencode(model).encoded == 7
    assert contents(target) == contents(memory)
    assert "d1" in {hit.id for hit in target.search("boat", k=2)}
