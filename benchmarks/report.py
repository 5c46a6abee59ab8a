"""Results for eyes: tables on the terminal; and for machines: JSON. The picture is made by plot.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.limits import Limits

# Piped, rich would take 80 columns and break every row.
console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console = Console(highlight=False, width=170)


def seconds_text(us: float) -> str:
    """A time in three digits: 3.21 us, 45.6 ms, 1.23 s."""
    for unit, scale in (("us", 1.0), ("ms", 1e3)):
        if us < 999.5 * scale:
            return f"{us / scale:.3g} {unit}"
    return f"{us / 1e6:.3g} s"


def rate_text(record: dict[str, Any], variant: dict[str, Any]) -> str:
    """GB/s or TFLOP/s, whichever the case is bound by."""
    if record["bound"] == "compute":
        return f"{variant['tflop_per_s']:.3g} TFLOP/s"
    return f"{variant['gb_per_s']:.3g} GB/s"


def share_text(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def print_header(result: dict[str, Any]) -> None:
    facts, versions, git = result["machine"], result["versions"], result["git"]
    args = result["arguments"]
    where = facts["gpu"]["name"] if args["device"] == "cuda" else f"{facts['cpu']}, {facts['threads']} threads"
    commit = f"{git['commit'][:10]}{' + changes' if git['dirty'] else ''}" if git["commit"] else "no git checkout"
    console.print(
        f"[bold]{result['shapes']}[/bold] shapes, {args['dtype']}, {where} ({facts['cpu_isa']}); "
        f"persimmon_fast {versions['persimmon_fast']} ({commit}), torch {versions['torch']}"
    )
    load = facts["load_average"][0]
    if load > 0.5:
        console.print(f"[yellow]load average {load:.1f}: something else is running, times will be too long[/yellow]")


def print_limits(limits: Limits) -> None:
    console.print(
        f"limits now: {limits.bytes_per_second / 1e9:.1f} GB/s read, {limits.flops_per_second / 1e12:.2f} TFLOP/s "
        f"in torch.mm; measured again beside each case\n"
    )


def print_progress(record: dict[str, Any]) -> None:
    ours, best = record["variants"]["ours"], record["variants"][record["best_torch"]]
    console.print(
        f"  {record['op']}, {record['case']}: {seconds_text(ours['us']['median'])}, "
        f"{share_text(ours['share_of_limit'])} of the limit, torch {seconds_text(best['us']['median'])}"
    )


def print_tables(result: dict[str, Any]) -> None:
    if result["ops"]:
        console.print()
        console.print(op_table(result["ops"]))
        console.print(
            "median and p10 .. p90 of interleaved rounds; rate: useful bytes or flops over the median; share: of the "
            "read bandwidth or matmul peak of the same rounds, '-' where overhead dominates", style="dim",
        )  # fmt: skip
    if result["end_to_end"]:
        for table in end_to_end_tables(result["end_to_end"]):
            console.print()
            console.print(table)
    if result.get("decode"):
        console.print()
        console.print(decode_table(result["decode"]))
        console.print(
            "median and p10 .. p90 of interleaved rounds; zeros: mean of the tokens / common to the batch; share: of "
            "what the read bandwidth of the same rounds allows, for the bytes that the variant must read, and for "
            "those of the dense model; then ratios to ours dense and to transformers' default and best", style="dim",
        )  # fmt: skip
    if result.get("prefill") and result["prefill"]["cases"]:
        console.print()
        console.print(prefill_table(result["prefill"]))
        console.print(
            "median and p10 .. p90 of interleaved rounds; share: of the matmul peak of the same rounds, for the flops "
            "of the products; torch.mm: the bare product alone", style="dim",
        )  # fmt: skip
    for skipped in result["skipped"]:
        console.print(f"[yellow]skipped {skipped['op']}: {skipped['reason']}[/yellow]")


def op_table(records: list[dict[str, Any]]) -> Table:
    table = Table(title="Ops", title_justify="left")
    for name in ("op", "case"):
        table.add_column(name)
    for name in ("ours", "spread", "rate", "share", "best torch", "torch share", "vs torch", "vs reference"):
        table.add_column(name, justify="right")
    previous = None
    for record in records:
        if previous not in (None, record["op"]):
            table.add_section()
        variants = record["variants"]
        ours, best, slow = variants["ours"], variants[record["best_torch"]], variants["reference"]
        speedup = record["speedup_over_torch"]
        colour = "green" if speedup >= 1 else "red"
        table.add_row(
            record["op"] if record["op"] != previous else "",
            record["case"],
            seconds_text(ours["us"]["median"]),
            f"{seconds_text(ours['us']['p10'])} .. {seconds_text(ours['us']['p90'])}",
            rate_text(record, ours),
            share_text(ours["share_of_limit"]),
            seconds_text(best["us"]["median"]),
            share_text(best["share_of_limit"]),
            f"[{colour}]{speedup:.2f}x[/{colour}]",
            f"{slow['us']['median'] / ours['us']['median']:.3g}x",
        )
        previous = record["op"]
    return table


def end_to_end_tables(record: dict[str, Any]) -> list[Table]:
    model = record["model"]
    title = f"End to end: {model_text(model)}"
    tables = []
    for section in record["sections"]:
        table = Table(title=f"{title}\n{section['title']}", title_justify="left")
        table.add_column("variant")
        for name in ("tokens/s", "spread", "share of limit", "vs best transformers"):
            table.add_column(name, justify="right")
        best = best_transformers(section)
        for name, variant in section["variants"].items():
            rate = variant["tokens_per_s"]
            ratio = rate["median"] / section["variants"][best]["tokens_per_s"]["median"] if best else None
            table.add_row(
                name,
                f"{rate['median']:.4g}",
                f"{rate['p10']:.4g} .. {rate['p90']:.4g}",
                share_text(variant["share_of_limit"]),
                "-" if ratio is None else f"{ratio:.2f}x",
            )
        tables.append(table)
    return tables


def decode_table(record: dict[str, Any]) -> Table:
    """All cells, one group of rows each."""
    table = Table(title=f"Decode: {model_text(record['model'])}", title_justify="left")
    table.add_column("variant", no_wrap=True)
    for name in (
        "tokens/s", "spread", "MB/token", "zeros", "share", "of dense", "vs dense", "vs default", "vs best",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for section in record["sections"]:
        variants = section["variants"]
        rates = {name: variant["tokens_per_s"]["median"] for name, variant in variants.items()}
        against = (next(iter(variants)), section["transformers_default"], best_transformers(section))
        table.add_section()
        table.add_row(f"[bold]{section['title']}[/bold]")
        for name, variant in variants.items():
            spread = variant["tokens_per_s"]
            zeros = (variant["zeros"], variant["zeros_common_to_batch"])
            table.add_row(
                name,
                f"{rates[name]:.4g}",
                f"{spread['p10']:.4g} .. {spread['p90']:.4g}",
                f"{variant['bytes_per_token'] / 1e6:,.0f}",
                "-" if zeros[0] is None else " / ".join(f"{share:.1%}" for share in zeros),
                share_text(variant["share_of_limit"]),
                share_text(variant["share_of_dense_limit"]),
                *("-" if other is None else f"{rates[name] / rates[other]:.2f}x" for other in against),
            )
    return table


def print_prefill_progress(record: dict[str, Any]) -> None:
    times = (f"{name} {seconds_text(variant['us']['median'])}" for name, variant in record["variants"].items())
    console.print(f"  {record['case']}: {', '.join(times)}")


def prefill_table(record: dict[str, Any]) -> Table:
    """All cases, one group of rows each."""
    table = Table(title=f"Prefill: {model_text(record['model'])}", title_justify="left")
    table.add_column("variant", no_wrap=True)
    for name in ("time", "spread", "TFLOP/s", "share of peak", "time / ours"):
        table.add_column(name, justify="right")
    for case in record["cases"]:
        table.add_section()
        table.add_row(f"[bold]{case['case']}[/bold]")
        ours = case["variants"]["ours"]["us"]["median"]
        for name, variant in case["variants"].items():
            us = variant["us"]
            table.add_row(
                name,
                seconds_text(us["median"]),
                f"{seconds_text(us['p10'])} .. {seconds_text(us['p90'])}",
                f"{variant['tflop_per_s']:.3g}",
                share_text(variant["share_of_limit"]),
                f"{us['median'] / ours:.3f}",
            )
    return table


def model_text(model: dict[str, Any]) -> str:
    return (
        f"{model['num_hidden_layers']} layers, hidden {model['hidden_size']}, vocabulary "
        f"{model['vocab_size']:,}, {model['weight_bytes'] / 1e9:.2f} GB of random weights"
    )


def best_transformers(section: dict[str, Any]) -> str | None:
    """Name of the fastest variant of transformers in a section."""
    theirs = {
        name: variant["tokens_per_s"]["median"]
        for name, variant in section["variants"].items()
        if name.startswith("transformers")
    }
    return max(theirs, key=theirs.__getitem__) if theirs else None


def write(result: dict[str, Any], folder: Path, stem: str) -> None:
    """folder/stem.json and, with matplotlib, folder/stem.png."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    console.print(f"\n{path}  ({result['seconds']:.0f} s in all)")
    try:
        from benchmarks import plot
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        console.print("[yellow]no picture: matplotlib is not installed (pip install matplotlib)[/yellow]")
        return
    for picture in plot.draw(result, folder / stem):
        console.print(str(picture))
