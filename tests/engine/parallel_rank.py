"""One rank of the tests of Memory Parallel; run by torchrun or with its environment set by hand.

The leader prints one line of JSON: what it saw. `python parallel_rank.py SCENARIO MODEL`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msa_memory.engine.config import MSAConfig
from msa_memory.engine.context import Feed, advance
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.interleave import InterleaveOptions
from msa_memory.engine.parallel import Cluster, ParallelMemory, Shard, ShardedBank, join
from msa_memory.engine.sampling import SamplingOptions
from msa_memory.engine.states import PassageStates
from msa_memory.errors import EngineError, RankLostError

TEXTS = {
    number: f"{name} the {trade} lives in {town} and owns {count} {thing}. " * (1 + number % 3)
    for number, (name, trade, town, count, thing) in enumerate(
        zip(
            ["Ada", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jo", "Kim"],
            [
                "baker",
                "smith",
                "pilot",
                "nurse",
                "tailor",
                "diver",
                "actor",
                "judge",
                "cook",
                "clerk",
                "poet",
            ],
            ["Oslo", "Rome", "Lima", "Cairo", "Delhi", "Perth", "Quito", "Tunis", "Bern", "Riga", "Kiev"],
            ["two", "nine", "ten", "six", "four", "one", "five", "eight", "three", "seven", "twelve"],
            ["cats", "boats", "bells", "lamps", "goats", "kites", "drums", "clocks", "hats", "pans", "pens"],
            strict=True,
        )
    )
}
QUESTIONS = ["Where does Cleo the pilot live?", "Who owns nine boats?", "How many goats are there?"]
TIMEOUT_S = 400.0
COUNT = 6000
SHORT = SamplingOptions(max_new_tokens=6)


def look(memory: Any, **options: Any) -> list[Any]:
    """What every question finds, chooses and is answered."""
    seen = []
    for question in QUESTIONS:
        routing = memory.route(question, **options)
        order = np.argsort(routing.numbers)
        read = memory.query(question, k=2, options=SHORT, **options)
        seen.append(
            {
                "numbers": routing.numbers[order].tolist(),
                "scores": [[float(s) for s in row] for row in routing.scores[:, order]],
                "words": [float(w) for w in routing.words[order]],
                "chosen": {str(layer): list(chosen.numbers) for layer, chosen in routing.selections.items()},
                "read": [read.text, list(read.numbers)],
            }
        )
    return seen


def story(memory: Any, engine: Engine, count: Any = lambda: 0) -> dict[str, Any]:
    """Adds, changes and forgets, with a look after each; ``count`` counts exchanges."""
    seen: dict[str, Any] = {}
    memory.add({number: TEXTS[number] for number in range(9)})
    seen["added"] = look(memory)
    before = memory.bank.view()
    memory.update(2, "Cleo the pilot moved to Havana. " * 2)
    memory.forget([1, 4])
    memory.add({9: TEXTS[9], 10: TEXTS[10]})
    seen["changed"] = look(memory)
    seen["filtered"] = look(memory, visible=[0, 2, 5, 9])
    seen["nothing"] = look(memory, visible=[])
    seen["snapshot"] = sorted(before.numbers[before.visible].tolist())
    seen["without"] = sorted(memory.bank.view().without([0, 9]).numbers.tolist())
    seen["held"] = list(memory.bank.numbers)

    # The question's own tokens attend to what they choose: one exchange a router layer.
    view, (ids, routes) = memory.bank.view(), engine.prompt.question(QUESTIONS[0])
    row, started = engine.start(view), count()
    seen["logits"] = advance(engine.decoder, [Feed(row, ids, routes)])[0].tolist()
    seen["exchanges"] = count() - started
    run = memory.interleave(QUESTIONS[0], InterleaveOptions(max_rounds=2, k=2)).run(SHORT)
    while True:
        try:
            next(run)
        except StopIteration as stop:
            seen["rounds"] = [list(numbers) for numbers in stop.value.rounds]
            seen["answer"] = stop.value.generation.text
            return seen


def tell(cluster: Cluster, engine: Engine) -> dict[str, Any]:
    memory = ParallelMemory(cluster, engine)
    return story(memory, engine, lambda: cluster.exchanges)


def fail(cluster: Cluster, engine: Engine) -> dict[str, Any]:
    """A rank that cannot do its part says so, nothing changes, and all go on."""
    memory = ParallelMemory(cluster, engine)
    memory.add({0: TEXTS[0], 1: TEXTS[1]})
    seen: dict[str, Any] = {}
    try:
        memory.add({2: TEXTS[2], 3: ""})
    except EngineError as error:
        seen["error"] = str(error)
    memory.forget([0])
    seen["held"] = list(memory.bank.numbers)
    seen["found"] = memory.route(QUESTIONS[1]).numbers.tolist()
    return seen


def lose(cluster: Cluster, engine: Engine) -> dict[str, Any]:
    """The leader outlives a rank; how it learns of it is the test's business."""
    memory = ParallelMemory(cluster, engine)
    memory.add(TEXTS)
    memory.query(QUESTIONS[0], options=SHORT)
    print(json.dumps({"ready": cluster.size}), flush=True)
    sys.stdin.readline()
    seen, started = [], time.perf_counter()
    for _ in range(2):
        try:
            memory.query(QUESTIONS[0], options=SHORT)
        except RankLostError as error:
            seen.append(str(error))
    return {"errors": seen, "seconds": time.perf_counter() - started}


def keys_only(cluster: Cluster, engine: Engine) -> dict[str, Any]:
    """Routing keys on the ranks, K/V with the caller, as a memory with a store has it."""
    cluster.attach(Shard(cluster))
    states = {number: engine.encode(number, "", text) for number, text in TEXTS.items()}
    bank = ShardedBank(cluster, engine.msa, states.__getitem__)
    for number, one in states.items():
        bank.add(number, one.router_keys, one.terms)
    bank.remove([3])
    view = bank.view(np.array([number for number in TEXTS if number != 5]))
    routing = engine.route(QUESTIONS[0], view)
    keys, values = view.gather(0, [1, 2], torch.empty(0))
    return {
        "numbers": sorted(routing.numbers[view.visible].tolist()),
        "chosen": list(view.select(routing.relevance(), 3).numbers),
        "gathered": [float(keys.sum()), float(values.sum())],
        "bytes": bank.nbytes(),
    }


WIDE = MSAConfig(router_layers=(0, 1, 2, 3, 4, 5), top_k=16)


def wide_states(count: int) -> dict[int, PassageStates]:
    """Routing keys of many passages on six layers, more than a rank takes without its 8-bit copies.

    The layers agree more or less, as those of a model do, or a skim would see nothing.
    """
    keys = alike_on_layers(3 * count, 2, 32, seed=1)
    return {n: PassageStates(keys[:, :0], keys[:, :0], k) for n, k in enumerate(keys.split(3, 1))}


def wide_queries() -> list[torch.Tensor]:
    return list(alike_on_layers(4, 4, 32, seed=2))


def alike_on_layers(*shape: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=random) + 0.1 * torch.randn(6, *shape, generator=random)
    return torch.nn.functional.normalize(drawn, dim=-1)


def wide_bonus(count: int) -> np.ndarray[Any, Any]:
    """Words of every seventh passage."""
    return np.where(np.arange(count) % 7 == 0, 0.05, 0.0).astype(np.float32)


def wide(cluster: Cluster, engine: Engine) -> dict[str, Any]:
    """Banks whose ranks score on 8-bit keys, and skim: what the leader learns, and how much is sent."""
    cluster.attach(Shard(cluster))
    states = wide_states(COUNT)
    seen: dict[str, Any] = {}
    for name, skim_from in (("whole", None), ("skimmed", 3 * COUNT)):
        bank = ShardedBank(cluster, WIDE, states.__getitem__)
        bank.skim_from = skim_from
        for number in [*range(0, COUNT, 3), *range(COUNT - 1, 0, -1)]:  # in no order that anything counts on
            if number not in bank:
                bank.add(number, states[number].router_keys)
        view = bank.view(np.arange(1, COUNT))
        bonus = np.zeros(COUNT, dtype=np.float32)
        bonus[:] = wide_bonus(COUNT)[view.numbers]
        before = cluster.exchanges
        scores = view.skim(wide_queries(), bonus, best=16)
        exchanges = cluster.exchanges - before
        mean = WIDE.mean_of_layers(scores) + bonus
        more = WIDE.mean_of_layers(view.settle(scores, wide_queries(), bonus, 700)) + bonus
        one = view.score(2, wide_queries()[2], best=16)
        seen[name] = {
            "exchanges": exchanges,
            "layers": [chosen(view, layer, 16) for layer in scores],
            "relevant": chosen(view, mean, 128),
            "more": chosen(view, more, 700),
            "one": chosen(view, one, 16),
            "all": chosen(view, view.score(2, wide_queries()[2]), COUNT),
        }
    return seen


def chosen(view: Any, scores: Any, count: int) -> list[Any]:
    found = view.select(scores, count)
    return [list(found.numbers), list(found.scores)]


def everything(cluster: Cluster, engine: Engine) -> dict[str, Any]:
    return {scenario.__name__: scenario(cluster, engine) for scenario in (tell, fail, keys_only, wide)}


def leave(cluster: Cluster, engine: Engine) -> str:
    memory = ParallelMemory(cluster, engine)
    memory.add(TEXTS)
    return memory.query(QUESTIONS[0], k=2, options=SHORT).text


SCENARIOS = {"everything": everything, "tell": tell, "lose": lose, "leave": leave}


def main() -> None:
    scenario, model, *rest = sys.argv[1:]
    with join(timeout_s=float(rest[0]) if rest else TIMEOUT_S) as cluster:
        engine = load_engine(Path(model), device="cpu")
        if cluster.leads:
            print(json.dumps(SCENARIOS[scenario](cluster, engine)), flush=True)
        else:
            with pytest.raises(EngineError, match=f"rank {cluster.rank} does not lead"):
                ShardedBank(cluster, engine.msa)
            cluster.serve(Shard(cluster, engine))
    if scenario == "leave":  # a thread of a group that outlives it can abort the process at its end
        tasks = Path("/proc/self/task").glob("*/comm")
        assert not [name for name in (task.read_text() for task in tasks) if "gloo" in name]


if __name__ == "__main__":
    main()
