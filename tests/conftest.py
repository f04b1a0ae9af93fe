"""What every test shares: nothing on sys.path, no silent GPU skips, one Hypothesis profile.

Fakes and builders that tests share live in msa_memory.testing: importlib mode cannot import one test file
from another.
"""

import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
BARE_NAMES = ("engine", "integrations", "persistence")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else its threads deadlock in the tests that fork

hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every GPU test a reason to be skipped where there is no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(
            reason=f"no CUDA device: torch {torch.__version__}, CUDA {torch.version.cuda}"
        )
        for item in gpu_items:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_second_copy_of_the_package() -> Iterator[None]:
    """Fail when something imported `engine` from the repository root instead of `msa_memory.engine`."""
    yield
    for name in BARE_NAMES:
        origin = getattr(sys.modules.get(name), "__file__", None)
        if origin and Path(origin).parent == ROOT / name:
            pytest.fail(
                f"`{name}` was imported from {origin}; import msa_memory.{name}, or every class exists twice"
            )


@pytest.fixture
def new_schema() -> Iterator[Callable[[str], str]]:
    """Gives, for a PostgreSQL URL, one with a schema that nobody else writes to; dropped at the end."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.engine import make_url

    with contextlib.ExitStack() as ending:

        def create(server: str) -> str:
            url = make_url(server).set(drivername="postgresql+psycopg")
            schema = f"msa_{uuid.uuid4().hex[:12]}"
            engine = create_engine(url)

            def drop() -> None:
                with engine.begin() as connection:
                    connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
                engine.dispose()

            with engine.begin() as connection:
                connection.execute(text(f"CREATE SCHEMA {schema}"))
            ending.callback(drop)
            options = {"options": f"-csearch_path={schema}"}
            return url.update_query_dict(options).render_as_string(hide_password=False)

        yield create


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the engine encodes from here on."""
    from msa_memory.engine.engine import Engine

    texts: list[str] = []
    encode = Engine.encode

    def spy(engine: Engine, number: int, header: str, text: str) -> object:
        texts.append(header + text)
        return encode(engine, number, header, text)

    monkeypatch.setattr(Engine, "encode", spy)
    return texts


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For every token decoded from here on, the limit of its answer: a name for it."""
    from msa_memory.engine.engine import Engine

    steps: list[int] = []
    decode = Engine.decode

    def spy(engine: Engine, generation: Any) -> Iterator[str]:
        for text in decode(engine, generation):
            steps.append(generation.options.max_new_tokens)
            yield text

    monkeypatch.setattr(Engine, "decode", spy)
    return steps
