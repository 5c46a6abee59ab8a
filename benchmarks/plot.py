"""Pictures of a result: share of the limit per op, tokens per second end to end. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import best_transformers, model_text, rate_text

matplotlib.use("Agg")

OURS, OURS_SPARSE, TORCH, LIMIT, TEXT, FAINT = "#e4572e", "#a63a1b", "#a9b4c2", "#2e4057", "#22303c", "#7a8794"
X_MAX = 110  # per cent; bars end here
RATE_X, SPEEDUP_X = X_MAX + 20, X_MAX + 36  # right ends of the columns of figures
BAR = 0.38  # height of a bar, rows are 1 apart
ROW_INCHES = 0.36
STYLE: Any = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": TEXT,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": TEXT,
    "xtick.color": FAINT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def draw(result: dict[str, Any], stem: Path) -> list[Path]:
    """Writes stem-ops.png, stem-end_to_end.png and stem.png (decode), those for which there are results, and returns
    their paths."""
    figures = {
        "-ops": draw_ops(result),
        "-end_to_end": draw_sections(result, result["end_to_end"]),
        "": draw_sections(result, result.get("decode")),
    }
    paths = []
    for suffix, figure in figures.items():
        if figure is not None:
            paths.append(stem.with_name(f"{stem.name}{suffix}.png"))
            figure.savefig(paths[-1], dpi=150)
    return paths


def draw_ops(result: dict[str, Any]) -> Figure | None:
    """Bars of the share of the limit, ours above the best of plain torch, decode left and prefill right."""
    phases = {
        "decode": "Decode: share of the read bandwidth",
        "prefill": "Prefill: share of the matmul peak (read bandwidth where there are no products)",
    }
    shown = {phase: [r for r in result["ops"] if r["phase"] == phase and r["bound"] != "overhead"] for phase in phases}
    shown = {phase: records for phase, records in shown.items() if records}
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        rows = max(len(records) + 0.7 * len({r["op"] for r in records}) for records in shown.values())
        figure = Figure(figsize=(8.2 * len(shown), 1.9 + ROW_INCHES * rows), layout="constrained")
        axes = figure.subplots(1, len(shown), squeeze=False)[0]
        for axis, (phase, records) in zip(axes, shown.items(), strict=True):
            _draw_phase(axis, records, phases[phase])
        axes[0].legend(loc="upper left", bbox_to_anchor=(0, -0.03), ncols=3, frameon=False)
        _title(figure, result, f"{result['shapes']} shapes: how close to the limit of the machine")
    return figure


def _draw_phase(axis: Axes, records: list[dict[str, Any]], title: str) -> None:
    y, previous = 0.0, None
    ticks: list[float] = []
    labels: list[str] = []
    for record in records:
        if record["op"] != previous:
            y += 0.7 if previous else 0.0
            axis.text(0, y - 0.62, record["op"], fontweight="bold", va="center", clip_on=False)
            previous = record["op"]
        ours, best = record["variants"]["ours"], record["variants"][record["best_torch"]]
        for offset, variant, colour in ((-BAR / 2, ours, OURS), (BAR / 2, best, TORCH)):
            first = not ticks
            axis.barh(
                y + offset, min(X_MAX, 100 * variant["share_of_limit"]), BAR, color=colour, zorder=2,
                label=("persimmon_fast" if variant is ours else "best plain torch") if first else None,
            )  # fmt: skip
        axis.text(RATE_X, y, rate_text(record, ours), va="center", ha="right")
        axis.text(SPEEDUP_X, y, f"{record['speedup_over_torch']:.2f}x", va="center", ha="right", fontweight="bold")
        ticks.append(y)
        labels.append(record["case"])
        y += 1
    axis.axvline(100, color=LIMIT, linewidth=1, zorder=3, label="limit, measured in the same rounds")
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(axis="x", length=0)
    axis.set_yticks(ticks, labels)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(y - 0.3, -1.1)
    axis.set_xlim(0, SPEEDUP_X)
    axis.text(RATE_X, -1.0, "ours", va="center", ha="right", color=FAINT)
    axis.text(SPEEDUP_X, -1.0, "vs torch", va="center", ha="right", color=FAINT)
    axis.set_xticks(range(0, 101, 20), [f"{p} %" for p in range(0, 101, 20)])
    axis.grid(axis="x", color="#e6eaee", zorder=0)
    axis.set_title(title, loc="left", fontsize=9.5, color=FAINT)


def draw_sections(result: dict[str, Any], record: dict[str, Any] | None) -> Figure | None:
    """One panel per section, bars of tokens per second; a stroke marks each variant's limit, a line its spread."""
    if not record or not record["sections"]:
        return None
    sections = record["sections"]
    with matplotlib.rc_context(STYLE):
        columns = 2
        lines = -(-len(sections) // columns)
        bars = max(len(section["variants"]) for section in sections)
        figure = Figure(figsize=(15, 1.0 + lines * (0.9 + ROW_INCHES * bars)), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for axis, section in zip(axes, sections, strict=False):
            _draw_section(axis, section)
        for axis in axes[len(sections) :]:
            axis.axis("off")
        model = record["model"]
        figure.supxlabel(
            "tokens per second; upright stroke: the limit of the same rounds (matmul peak, or read bandwidth over the "
            "bytes that the variant must read); line: p10 .. p90",
            fontsize=9, color=FAINT,
        )  # fmt: skip
        _title(
            figure,
            result,
            f"{model_text(model)}: tokens per second",
        )
    return figure


def _draw_section(axis: Axes, section: dict[str, Any]) -> None:
    variants = section["variants"]
    best = best_transformers(section)
    reference = variants[best]["tokens_per_s"]["median"] if best else None
    rightmost = top = max(v["tokens_per_s"]["median"] for v in variants.values())
    for y, (name, variant) in enumerate(variants.items()):
        stats = variant["tokens_per_s"]
        ours = name.startswith("persimmon_fast")
        colour = (OURS_SPARSE if "zeros" in name else OURS) if ours else TORCH
        axis.barh(y, stats["median"], 0.68, color=colour, zorder=2)
        axis.plot([stats["p10"], stats["p90"]], [y, y], color=TEXT, linewidth=1, zorder=3)
        text = f"{stats['median']:.4g}"
        if ours and reference:
            text += f"  ({stats['median'] / reference:.2f}x transformers' best)"
        axis.text(0.012 * top, y, text, va="center", color="white" if ours else TEXT, fontweight="bold", zorder=4)
        limit = variant["limit_tokens_per_s"]
        if limit is not None and limit < 2.2 * top:
            axis.plot([limit, limit], [y - 0.4, y + 0.4], color=LIMIT, linewidth=2, zorder=3)
            rightmost = max(rightmost, limit)
        rightmost = max(rightmost, stats["p90"])
    axis.set_yticks(range(len(variants)), list(variants))
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(variants) - 0.4, -0.6)
    axis.set_xlim(0, 1.04 * rightmost)
    axis.grid(axis="x", color="#e6eaee", zorder=0)
    axis.set_title(section["title"], loc="left", fontsize=10, fontweight="bold")


def _title(figure: Figure, result: dict[str, Any], text: str) -> None:
    facts, versions, git = result["machine"], result["versions"], result["git"]
    device = facts["gpu"]["name"] if "gpu" in facts else f"{facts['cpu']}, {facts['threads']} threads"
    commit = f", commit {git['commit'][:10]}{' + changes' if git['dirty'] else ''}" if git["commit"] else ""
    figure.suptitle(
        f"{text}\n{result['arguments']['dtype']}, {device} ({facts['cpu_isa']}), torch {versions['torch']}{commit}, "
        f"{result['date'][:10]}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
