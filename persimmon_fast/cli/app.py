"""Commands and options. Typer only parses: each command returns what is to be run, and `dispatch` runs it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from persimmon_fast.cli import terminal
from persimmon_fast.cli.terminal import UsageError
from persimmon_fast.version import __version__

app = typer.Typer(
    name="persimmon-fast",
    help="Run Persimmon language models on handwritten kernels.",
    epilog="Try: persimmon-fast generate 'def read_config(path):'",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass(frozen=True)
class _Action:
    run: Callable[[], int]
    traceback: bool


def dispatch(arguments: list[str]) -> int:
    """Parses and runs one command line; returns its exit status. KeyboardInterrupt and BrokenPipeError pass."""
    try:
        action = app(arguments or ["--help"], prog_name="persimmon-fast", standalone_mode=False)
    except Exception as error:
        # what typer raises for a wrong command line has no public name in all of its versions
        if not hasattr(error, "format_message"):
            raise
        terminal.print_error(f"{error.format_message()} (see persimmon-fast --help)")
        return int(getattr(error, "exit_code", 2))
    if not isinstance(action, _Action):  # --help, --version
        return int(action or 0)
    try:
        with terminal.one_line_warnings():
            return action.run()
    except BrokenPipeError:
        raise
    except Exception as error:
        if action.traceback:
            traceback.print_exc()
        else:
            terminal.print_error(_message(error))
        return 2 if isinstance(error, UsageError) else 1


def _message(error: Exception) -> str:
    """One line for a person. ValueError and OSError are about their input; anything else is a fault of ours."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, UsageError | ValueError | OSError | MemoryError) and str(error):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU; three sentences have the sizes
        return ". ".join(str(error).split(". ")[:3]).rstrip(".") + ": --device cpu runs it in the machine's memory"
    return f"{type(error).__name__}: {error} (--traceback shows where)"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"persimmon-fast {__version__}")
        raise typer.Exit


def _option(*names: str, help: str, metavar: str = "", panel: str | None = None, **more: Any) -> Any:
    """A typer option; metavar "": a flag."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False, **more)


@app.callback()
def _root(
    version: Annotated[
        bool, _option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


# ---- options that several commands share; cli/session.py checks their values ----


_SAMPLING, _RUNNING, _OUTPUT = "Choosing tokens", "Running", "Output"
MaxNewTokens = Annotated[
    int | None,
    _option("--max-new-tokens", "-n", metavar="N", help="Stop after N tokens. Default: 256, or what fits."),
]
Stop = Annotated[
    list[str] | None,
    _option(
        "--stop", metavar="TEXT", help="End where the new text contains TEXT, which is not printed. Can be repeated."
    ),
]
Greedy = Annotated[bool, _option("--greedy", help="Take the most likely token.", panel=_SAMPLING)]
Sample = Annotated[
    bool,
    _option(
        "--sample",
        help="Draw tokens. Implied by --temperature, --top-k, --top-p, --min-p. Default: the model's own setting.",
        panel=_SAMPLING,
    ),
]
Temperature = Annotated[
    float | None,
    _option("--temperature", metavar="X", help="Divide the logits by X; 0 is --greedy.", panel=_SAMPLING),
]
TopK = Annotated[
    int | None, _option("--top-k", metavar="N", help="Only the N most likely tokens; 0: all.", panel=_SAMPLING)
]
TopP = Annotated[
    float | None,
    _option(
        "--top-p", metavar="X", help="Only the most likely tokens that together have probability X.", panel=_SAMPLING
    ),
]
MinP = Annotated[
    float | None,
    _option("--min-p", metavar="X", help="Only tokens at least X times as likely as the first.", panel=_SAMPLING),
]
RepetitionPenalty = Annotated[
    float | None,
    _option("--repetition-penalty", metavar="X", help="Above 1: tokens seen before are less likely.", panel=_SAMPLING),
]
Seed = Annotated[
    int | None,
    _option(
        "--seed",
        metavar="N",
        help="The same seed, the same text. Default: a new one, shown at the end.",
        panel=_SAMPLING,
    ),
]
Model = Annotated[
    Path | None,
    _option(
        "--model",
        "-m",
        metavar="FOLDER",
        help="A checkpoint in the Hugging Face layout. Default: the small code model that ships with the package.",
        panel=_RUNNING,
    ),
]
DtypeOption = Annotated[
    str,
    _option(
        "--dtype",
        metavar="NAME",
        help="float32, float16, bfloat16; auto (default): what config.json names.",
        panel=_RUNNING,
    ),
]
Device = Annotated[
    str,
    _option(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:N; auto (default): cuda where the CUDA kernels run, else cpu.",
        panel=_RUNNING,
    ),
]
Threads = Annotated[
    int | None,
    _option(
        "--threads", "-t", metavar="N", help="CPU threads. Default: all cores, one for tiny models.", panel=_RUNNING
    ),
]
NoBos = Annotated[
    bool,
    _option("--no-bos", help="No begin-of-text token in front. Default: what the tokenizer says.", panel=_RUNNING),
]
Quiet = Annotated[bool, _option("--quiet", "-q", help="Only the text: no model line, no figures.", panel=_OUTPUT)]
Json = Annotated[bool, _option("--json", help="One JSON object on stdout, nothing else.", panel=_OUTPUT)]
Traceback = Annotated[
    bool,
    _option("--traceback", envvar="PERSIMMON_FAST_TRACEBACK", help="On an error, show where it arose.", panel=_OUTPUT),
]


# ---- commands ----


@app.command(epilog="GB/s: the bytes of all weights and of the cache, per token, times tokens per second.")
def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")
    ] = None,
    file: Annotated[
        str | None, _option("--file", "-f", metavar="FILE", help="Read the prompt from FILE; - is stdin.")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    stop: Stop = None,
    greedy: Greedy = False,
    sample: Sample = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    model: Model = None,
    dtype: DtypeOption = "auto",
    device: Device = "auto",
    threads: Threads = None,
    no_bos: NoBos = False,
    as_json: Json = False,
    quiet: Quiet = False,
    show_traceback: Traceback = False,
) -> _Action:
    """Continue a text, printed as it is made. In a pipe: prompt and new text, nothing else."""

    def run() -> int:
        from persimmon_fast.cli import generate
        from persimmon_fast.cli.session import Options

        options = Options(
            model=model,
            dtype=dtype,
            device=device,
            threads=threads,
            max_new_tokens=max_new_tokens,
            greedy=greedy,
            sample=sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=tuple(stop or ()),
            add_bos=False if no_bos else None,
            quiet=quiet,
        )
        return generate.run(generate.Request(prompt, file, as_json), options)

    return _Action(run, show_traceback)


@app.command()
def chat(
    max_new_tokens: MaxNewTokens = None,
    greedy: Greedy = False,
    sample: Sample = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    model: Model = None,
    dtype: DtypeOption = "auto",
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    show_traceback: Traceback = False,
) -> _Action:
    """Talk to a model in Adept's format: "human: ...", "adept: ..."."""

    def run() -> int:
        from persimmon_fast.cli import chat
        from persimmon_fast.cli.session import Options

        options = Options(
            model=model,
            dtype=dtype,
            device=device,
            threads=threads,
            max_new_tokens=max_new_tokens,
            greedy=greedy,
            sample=sample,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            quiet=quiet,
        )
        return chat.run(options)

    return _Action(run, show_traceback)


@app.command()
def info(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER", help="A folder with config.json; weights are not needed. Default: the shipped model."
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        _option("--bandwidth", metavar="GB/S", help="Predict speeds for this bandwidth instead of measuring here."),
    ] = None,
    as_json: Json = False,
    show_traceback: Traceback = False,
) -> _Action:
    """Sizes of a model, and how fast this machine's memory lets it be."""

    def run() -> int:
        from persimmon_fast.cli import info

        return info.run(folder, bandwidth, as_json)

    return _Action(run, show_traceback)


@app.command(epilog="A neuron is zero where squared ReLU makes it exactly 0; a step need not read its down-projection.")
def sparsity(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE", help="The text; - reads stdin. Default: a module of Python's standard library, plistlib."
        ),
    ] = None,
    model: Model = None,
    dtype: DtypeOption = "auto",
    device: Device = "auto",
    plot: Annotated[
        Path | None, _option("--plot", metavar="PNG", help="Also draw the zeros, layer by position.", panel=_OUTPUT)
    ] = None,
    as_json: Json = False,
    show_traceback: Traceback = False,
) -> _Action:
    """Exact zeros of a model on a text, per layer, and what skipping them saves."""

    def run() -> int:
        from persimmon_fast.cli import sparsity
        from persimmon_fast.cli.session import Options

        options = Options(model=model, dtype=dtype, device=device, quiet=as_json)
        return sparsity.run(sparsity.Request(file, plot, as_json), options)

    return _Action(run, show_traceback)


@app.command(epilog="Nothing in the pickles is executed. An interrupted conversion goes on when it is started again.")
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="Adept's release tar, the folder that it holds, or one model_optim_rng.pt; with --to adept: a folder "
            "in the Hugging Face layout.",
            show_default=False,
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder.", show_default=False)],
    to: Annotated[
        str, _option("--to", metavar="NAME", help="hf (default): the Hugging Face layout; adept: Adept's.")
    ] = "hf",
    md5: Annotated[
        str | None,
        _option("--md5", metavar="HEX", help="MD5 of the file IN. Default: the published one of a release tar's name."),
    ] = None,
    max_shard_size: Annotated[
        str, _option("--max-shard-size", metavar="SIZE", help="Of safetensors files: 5GB (default), 500MB, ...")
    ] = "5GB",
    tensor_parallel: Annotated[
        int, _option("--tensor-parallel", metavar="N", help="With --to adept: split over N ranks. Default: 1.")
    ] = 1,
    quiet: Annotated[bool, _option("--quiet", "-q", help="Only warnings and errors.", panel=_OUTPUT)] = False,
    show_traceback: Traceback = False,
) -> _Action:
    """Adept's original checkpoints to the Hugging Face layout, or back."""

    def run() -> int:
        from persimmon_fast.cli import convert

        return convert.run(convert.Request(source, target, to, md5, max_shard_size, tensor_parallel, quiet))

    return _Action(run, show_traceback)


@app.command()
def doctor(as_json: Json = False, show_traceback: Traceback = False) -> _Action:
    """Facts about this installation, and a check of every op against its reference."""

    def run() -> int:
        from persimmon_fast.cli import doctor

        return doctor.run(as_json)

    return _Action(run, show_traceback)
