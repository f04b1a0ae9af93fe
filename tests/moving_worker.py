"""A process that forks one child per line on stdin; each moves a memory and kills itself with SIGKILL midway.

A line is JSON: ``[action, after, folder, other]``. The child dies right before its ``after``-th write, sync,
rename, link, removal or SQL commit; 0 lets it finish. The answer is a line with the child's wait status and
the number of such steps it took.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import Engine, event

from msa_memory.engine.engine import load_engine
from msa_memory.moving import exporting, reencode
from msa_memory.testing import open_memory, tiny_model

STEPS = ("fdatasync", "fsync", "ftruncate", "link", "pwrite", "rename", "replace", "unlink")
exporting.PART_DOCUMENTS = 3
reencode.BATCH_DOCUMENTS = 3


class Countdown:
    """Counts steps and kills this process before the one it was told."""

    def __init__(self, after: int) -> None:
        self.after, self.steps = after, 0

    def __call__(self, *_: object) -> None:
        self.steps += 1
        if self.steps == self.after:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self()
            return function(*arguments, **options)

        return counted


def act(action: str, folder: str, other: str, countdown: Countdown) -> None:
    with open_memory(folder) as memory:
        memory.count()
        for name in STEPS:
            setattr(os, name, countdown.before(getattr(os, name)))
        event.listen(Engine, "commit", countdown)
        if action == "export":
            memory.export(other)
        elif action == "import":
            memory.import_bundle(other)
        elif action == "fork":
            memory.fork(other).close()
        elif action == "reencode":
            memory.reencode(other)
        else:
            memory.compact()


def child(action: str, after: int, folder: str, other: str, answer: int) -> None:
    countdown = Countdown(after)
    act(action, folder, other, countdown)
    os.write(answer, str(countdown.steps).encode())


def main() -> None:
    torch.set_num_threads(1)
    load_engine(tiny_model())  # what the first load imports is then there in every child
    for line in sys.stdin:
        reading, writing = os.pipe()
        if not (process := os.fork()):
            try:
                child(*json.loads(line), writing)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        os.close(writing)
        _, status = os.waitpid(process, 0)
        steps = os.read(reading, 100).decode() or "0"
        os.close(reading)
        print(json.dumps([status, int(steps)]), flush=True)


if __name__ == "__main__":
    assert Path(__file__).exists()
    main()
