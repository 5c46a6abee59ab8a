"""`persimmon-fast doctor`: what was built, where it runs, and whether every op computes what it should."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from persimmon_fast.cli import terminal
from persimmon_fast.cli.terminal import bytes_text
from persimmon_fast.version import __version__

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from persimmon_fast.cli.selfcheck import Check

SWITCHES = {  # and what holds where they are not set
    "PERSIMMON_FAST_CPU_ISA": "the best instruction set runs",
    "PERSIMMON_FAST_FORCE_REFERENCE": "the kernels run",
    "PERSIMMON_FAST_TRACEBACK": "errors are one line",
}
_PREFIX = "PERSIMMON_FAST_"


def run(as_json: bool) -> int:
    """Prints everything and returns 1 if a check failed."""
    with terminal.transient_line("Looking at this machine ...", not as_json):
        from persimmon_fast.cli import selfcheck
        from persimmon_fast.cli.device import choose_device

        build, runtime, environment = build_facts(), runtime_facts(), environment_facts()
        devices = dict.fromkeys(["cpu", choose_device("auto")])
        checks = [check for device in devices for check in selfcheck.run_checks(device)]
    failed = [check for check in checks if not check.ok]
    if as_json:
        print(
            json.dumps(
                {
                    "ok": not failed,
                    "build": build,
                    "runtime": runtime,
                    "environment": environment,
                    "checks": [asdict(check) for check in checks],
                }
            )
        )
    else:
        _print({"Build": build, "Runtime": runtime, "Environment": environment}, checks, failed)
    return 1 if failed else 0


def build_facts() -> dict[str, str]:
    """What the extension was made with and for."""
    import torch

    from persimmon_fast import _C

    built_for = _C.torch_version
    return {
        "persimmon_fast": __version__,
        "torch": torch.__version__ + ("" if built_for == torch.__version__ else f" (built for {built_for})"),
        "compiler": _C.compiler,
        "CPU kernels": _C.cpu_summary,
        "CUDA kernels": _C.cuda_summary,
    }


def runtime_facts() -> dict[str, str]:
    """The machine as this process sees it, and its speeds measured now."""
    import torch

    from persimmon_fast import _C, measure
    from persimmon_fast.cli.device import cuda_problem

    active, best = _C.cpu_isa(), _C.best_cpu_isa()
    problem = cuda_problem()
    return {
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instructions": active if active == best else f"{active} (chosen; the best here is {best})",
        "threads": str(torch.get_num_threads()),
        "memory": f"{bytes_text(measure.total_memory())}, {bytes_text(measure.available_memory())} available",
        "read bandwidth": f"{measure.read_bandwidth() / 1e9:.1f} GB/s",
        "matmul": f"{measure.matmul_flops(torch.bfloat16, 1024) / 1e12:.2f} TFLOP/s in bfloat16",
        "CUDA device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no device",
        "--device auto": "cuda:0" if problem is None else f"cpu, since {problem}",
    }


def environment_facts() -> dict[str, str]:
    """The switches of this package, and variables that look like one but are none."""
    facts = {name: os.environ.get(name) or f"not set: {default}" for name, default in SWITCHES.items()}
    unknown = sorted(name for name in os.environ if name.startswith(_PREFIX) and name not in SWITCHES)
    return facts | {name: f"{os.environ[name]} (not a switch of this version)" for name in unknown}


def _processor() -> str:
    """Its name as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _print(sections: dict[str, dict[str, str]], checks: Sequence[Check], failed: Sequence[Check]) -> None:
    out = terminal.console()
    for title, values in sections.items():
        out.print(title, style=f"bold {terminal.ACCENT}")
        out.print(terminal.facts(values))
        out.print()
    for device in dict.fromkeys(check.device for check in checks):
        out.print(f"Ops on {device} against their reference", style=f"bold {terminal.ACCENT}", end="")
        out.print("  share of the error bound used", style="dim")
        out.print(_table([check for check in checks if check.device == device]))
        out.print()
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for check in failed:
        reasons.setdefault((check.op, check.device, check.detail), []).append(check.dtype)
    for (op, device, detail), dtypes in reasons.items():
        out.print(f"{op} in {', '.join(dtypes)} on {device}: {detail}", style="red", soft_wrap=True)
    num_ops = len({check.op for check in checks})
    if failed:
        out.print(f"{len(failed)} of {len(checks)} checks of {num_ops} ops failed", style="bold red")
    else:
        out.print(f"all {len(checks)} checks of {num_ops} ops passed", style="bold green")
    sys.stdout.flush()


def _table(checks: Sequence[Check]) -> Table:
    """A row for each op, a column for each dtype, of the checks of one device."""
    dtypes = list(dict.fromkeys(check.dtype for check in checks))
    found = {(check.op, check.dtype): check for check in checks}
    table = terminal.table("op", *dtypes)
    for op in dict.fromkeys(check.op for check in checks):
        table.add_row(op, *(_cell(found[op, dtype]) for dtype in dtypes))
    return table


def _cell(check: Check) -> Text:
    from rich.text import Text

    if not check.ok:
        return Text("FAILED", "bold red")
    share = 0.0 if not check.bound else (check.error or 0.0) / check.bound
    return Text(f"ok  {share:4.0%}", "green")
