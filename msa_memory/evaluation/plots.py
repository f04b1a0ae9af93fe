"""Pictures of needle results: accuracy and latency against the size of the memory, one line per system.

Needs matplotlib (``pip install 'msa-memory[eval]'``). Draws what the result files say and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msa_memory.errors import ConfigError, MissingExtraError
from msa_memory.evaluation.needles import KINDS

__all__ = ["draw_needles", "read_results"]

Points = list[tuple[int, dict[str, Any]]]
COLOURS = {
    "memory": "#2a6fbb",
    "bm25": "#d1701f",
    "minilm": "#3f8f5b",
    "whole_context": "#7a5ea8",
}
MARKERS = {"memory": "o", "bm25": "s", "minilm": "^", "whole_context": "D"}
LABELS = {"memory": "msa-memory", "bm25": "BM25", "minilm": "MiniLM", "whole_context": "whole context"}


def read_results(paths: Sequence[Path]) -> dict[int, dict[str, Any]]:
    """Figures by tokens of memory, from files that ``eval needles`` wrote.

    Files about one size may hold different kinds of needles; of one kind the last file counts.

    Raises:
        ConfigError: a file is not such a result.
    """
    sizes: dict[int, dict[str, Any]] = {}
    for path in paths:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            for figures in found["sizes"].values():
                sizes.setdefault(figures["tokens"], {}).update(figures)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no result of `msa-memory eval needles`: {error!r}") from error
    return dict(sorted(sizes.items()))


def draw_needles(sizes: Mapping[int, Mapping[str, Any]], folder: Path, *, kind: str = "svg") -> list[Path]:
    """Write ``needles_accuracy`` and ``needles_latency``; the files written.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: there is nothing to draw.
    """
    if not sizes:
        raise ConfigError("the results hold no size of a memory; there is nothing to draw")
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _draw(sizes, folder / f"needles_accuracy.{kind}", "accuracy", "numbers found, share"),
        _draw(sizes, folder / f"needles_latency.{kind}", "seconds", "seconds per answer, median"),
    ]


def _draw(sizes: Mapping[int, Mapping[str, Any]], path: Path, measure: str, label: str) -> Path:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "drawing needs matplotlib; install it with pip install 'msa-memory[eval]'"
        ) from error
    matplotlib.rcParams["svg.hashsalt"] = "msa-memory"  # the same results give the same file
    kinds = [kind for kind in KINDS if any(kind in figures for figures in sizes.values())]
    figure = Figure(figsize=(3.2 * len(kinds) + 0.6, 3.4), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        for name, colour in COLOURS.items():
            _line(panel, name, colour, measure, [(n, one[kind]) for n, one in sizes.items() if kind in one])
        panel.set(title=kind.replace("_", " "), xscale="log", xlabel="tokens in memory")
        panel.set_xticks(list(sizes), [_short(size) for size in sizes])
        panel.minorticks_off()
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(label)
    panels[0].set_ylim(*((-0.03, 1.05) if measure == "accuracy" else (0, panels[0].get_ylim()[1])))
    fullest = max(panels, key=lambda panel: len(panel.get_legend_handles_labels()[1]))
    fullest.legend(frameon=False, fontsize="small")
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=120, metadata=metadata)
    return path


def _short(tokens: int) -> str:
    """16484 as 16K, 1049000 as 1M."""
    return f"{tokens / 2**20:.0f}M" if tokens >= 0.95 * 2**20 else f"{tokens / 2**10:.0f}K"


def _line(panel: Any, name: str, colour: str, measure: str, points: Points) -> None:
    """One system's line with its intervals; none where it was not asked."""
    known = [(size, systems[name][measure]) for size, systems in points if measure in systems.get(name, {})]
    if not known:
        return
    at = [size for size, _ in known]
    ours = name == "memory"  # wider and beneath, to be seen where lines coincide
    style = {
        "color": colour,
        "marker": MARKERS[name],
        "label": LABELS[name],
        "linewidth": 3.2 if ours else 1.4,
        "markersize": 8 if ours else 4.5,
        "linestyle": "-" if ours else "--",
        "zorder": 2 if ours else 3,
    }
    if measure == "seconds":
        panel.plot(at, [figure["p50"] for _, figure in known], **style)
        return
    means = [figure["mean"] for _, figure in known]
    low = [figure["mean"] - figure["low"] for _, figure in known]
    high = [figure["high"] - figure["mean"] for _, figure in known]
    panel.errorbar(at, means, yerr=[low, high], capsize=2, elinewidth=0.8, **style)
