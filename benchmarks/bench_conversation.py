"""A conversation over a memory: turns read as if for the first time against turns that grow.

The same scripted conversation (both sides fixed) is asked turn by turn of two memories that differ in
``MemoryConfig.context`` alone. What counts is the time from the question to where the answer begins, beyond
routing, summed over the turns after the first.
"""

from __future__ import annotations

from itertools import count

from common import arguments, compare, report, texts

from msa_memory import MemoryConfig, MemoryModel

NOTES = 4
NUMBER = count(1)
"""Every conversation is another one, else its prompts would be there from the last time."""


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--turns", type=int, default=8)
    options = parser.parse_args()
    notes = texts(NOTES, 120)
    asked = [
        f"What does it say about {' '.join(notes[turn % NOTES].split()[3:9])}?"
        for turn in range(options.turns)
    ]
    memories = {
        way: MemoryModel.open(
            None, device=options.device, config=MemoryConfig(context=way, k=1, max_new_tokens=1)
        )
        for way in ("grow", "exact")
    }
    for memory in memories.values():
        memory.add_many(list(notes))
    result = compare(
        lambda: 1 / prefill_s(memories["grow"], asked),
        lambda: 1 / prefill_s(memories["exact"], asked),
        options.runs,
    )
    report(
        "conversation", options, {"turns": options.turns, "opponent": "context='exact'", "prefill": result}
    )


def prefill_s(memory: MemoryModel, asked: list[str]) -> float:
    """Seconds of prefill over all turns but the first, which both ways read whole."""
    turns: list[dict[str, str]] = [{"role": "system", "content": f"This is conversation {next(NUMBER)}."}]
    seconds = []
    for question in asked:
        turns.append({"role": "user", "content": question})
        seconds.append(memory.chat(turns).timings.prefill_s)
        turns.append({"role": "assistant", "content": "It is described in the notes above."})
    return sum(seconds[1:])


if __name__ == "__main__":
    main()
