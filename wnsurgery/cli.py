"""The command line: parse, one library call, show its report, exit with its code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from click.core import ParameterSource

from wnsurgery import __version__
from wnsurgery.arguments import parse_axes, parse_dims, parse_scales
from wnsurgery.completion import SHELLS, script
from wnsurgery.errors import InputError, SelectionError
from wnsurgery.leaving import leave
from wnsurgery.report import counting, escape, quiet, show, speak, working

__all__ = ["cli", "main"]

F = TypeVar("F", bound=Callable[..., Any])

_PROVIDERS = ("cpu", "cuda", "tensorrt", "coreml", "dml", "openvino", "auto")


class _Path(click.Path):
    """A path; whether it can be read turns out when it is read, but an empty one is the current directory to nobody."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value:
            self.fail("an empty path", param, ctx)
        if "\0" in os.fspath(value):
            self.fail("no path holds a NUL", param, ctx)
        return super().convert(value, param, ctx)


class _Commands(click.Group):
    """A slip in a command's name is answered with the names like it, which click itself does from 8.4 on alone."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = [] if args[0] in self.commands else get_close_matches(args[0], self.commands)
        if near and not ctx.resilient_parsing:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {' or '.join(map(repr, near))}?")
        return super().resolve_command(ctx, args)


_PATH = _Path(readable=False, path_type=Path)


# Options that several commands share ---------------------------------------------------------------------


def _options(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


_manner = _options(
    click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=speak("quiet"),
        help="Print errors only, and what --json or --csv ask for.",
    ),
    click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=speak("verbose"),
        help="Tell on stderr what is done, with what, in how much time and memory.",
    ),
)  # fmt: skip
_common = _options(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback when something fails."),
    _manner,
)
_writing = _options(
    click.option("-o", "--output", type=_PATH, help="Where to write; default: beside MODEL."),
    click.option("--force", is_flag=True, help="Overwrite an existing output."),
)
_in_place = click.option("--in-place", is_flag=True, help="Let the output replace the input.")
_loading = _options(
    click.option("--arch", metavar="PACKAGE.MODULE:FACTORY", help="Callable that builds the model for a state dict."),
    click.option("--trust-pickle", is_flag=True, help="Allow code inside MODEL to run while it is loaded."),
)
_selection = _options(
    click.option(
        "--include", multiple=True, metavar="PATTERN", help='Only these weights: a glob, or "re:..."; repeat.'
    ),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Not these weights; repeat."),
    click.option(
        "--dim",
        "dims",
        multiple=True,
        metavar="[PATTERN=]AXES",
        help='Kept axes: 0, "0,2" or none, for the rest or by pattern; repeat.',
    ),
)
_feeding = _options(
    click.option("--input", "input_file", type=_PATH, help="Inputs: .npz, .npy, .pt, .safetensors."),
    click.option(
        "--input-shape", multiple=True, metavar="1x3x32x32[:DTYPE]", help="Random input of this shape; repeat."
    ),
)
_stored = click.option(
    "--magnitude",
    type=click.Choice(["linear", "log"]),
    default="linear",
    show_default=True,
    help="What pairs of a state dict store that do not say: g, or s with g = e^s.",
)
_filing = _options(
    click.option("--dry-run", is_flag=True, help="Show what would change and write nothing."),
    click.option("--strict", is_flag=True, help="Treat warnings as errors: write nothing, exit code 7."),
    click.option("--manifest", type=_PATH, help="Write a JSON table of every tensor with its SHA-256 here."),
    click.option("--resume", is_flag=True, help="Go on where a killed run on a directory left off."),
)
_entry = click.option("--entry", metavar="PATH", help="Which state dict or module to take, where several fit: ema.")
_alone = click.option(
    "--entry",
    metavar="PATH",
    help="Write this state dict or module of MODEL alone: generator. A .safetensors output takes the only one.",
)
_model = click.argument("model", type=_PATH)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
@_manner
def cli() -> None:
    """Put a neural network into weight normalization, take it out, and ship it.

    Results go to stdout, messages and progress to stderr. `wnsurgery COMMAND --help` shows examples. What weight
    normalization is, and what people ask about it: python -c "import wnsurgery; help(wnsurgery)"

    \b
    Exit codes: 0 done; 1 a bug of ours; 2 usage; 3 input missing, damaged, unsupported or ambiguous; 4 refused as
    unsafe; 5 output could not be written; 6 device, provider or package missing; 7 verification failed.
    """


@cli.command()
@_model
@_writing
@_in_place
@_loading
@_selection
@click.option(
    "--init",
    type=click.Choice(["preserve", "data", "fan"]),
    default="preserve",
    show_default=True,
    help="Keep the function bit for bit, set g and biases from --data, or g, v and biases anew without data.",
)
@click.option("--data", type=_PATH, help="One batch for --init data: .npz, .npy, .pt, .safetensors.")
@click.option(
    "--init-scale",
    "scales",
    multiple=True,
    metavar="[PATTERN=]X",
    help="Standard deviation --init data aims at, factor of g for --init fan; default 1; for the rest or by pattern; "
    "repeat.",
)
@click.option(
    "--layout",
    type=click.Choice(["parametrized", "legacy"]),
    default="parametrized",
    show_default=True,
    help="Key names in a state dict.",
)
@click.option(
    "--magnitude",
    type=click.Choice(["linear", "log"]),
    default="linear",
    show_default=True,
    help="Store g, or s with g = e^s.",
)
@_alone
@click.option(
    "--batch-norm",
    type=click.Choice(["keep", "fold", "mean-only"]),
    default="keep",
    show_default=True,
    help="Fold each BatchNorm into its layer, or keep its mean only; needs the model.",
)
@click.option(
    "--input",
    "input_file",
    type=_PATH,
    help="Example inputs that show --batch-norm the data flow.",
)
@_filing
@_common
def convert(model: Path, as_json: bool, **options: Any) -> None:
    """Replace weights w of MODEL by (g, v) with w = g * v / ||v||.

    MODEL is a state dict (.pt .pth .bin .ckpt .safetensors), a directory of them as the Hugging Face hub or
    torch.distributed.checkpoint has it, or a whole module saved with torch.save.

    \b
    Examples:
      wnsurgery convert model.pt
      wnsurgery convert model.pt --init data --data batch.npz -o model.wn.pt
      wnsurgery convert weights.safetensors --dim 'ups.*=1' --exclude '*embed*'
      wnsurgery convert model.pt --batch-norm mean-only
    """
    from wnsurgery.files import convert_checkpoint

    output = options.pop("output") or _beside(model, "wn")
    batch = options.pop("data")
    for path in (output, options["manifest"]):
        _refuse_inputs(path, batch, options["input_file"])
    if (options["init"] == "data") != (batch is not None):
        raise SelectionError("--init data and --data FILE go together")
    if options["scales"] and options["init"] == "preserve":
        raise SelectionError("--init-scale goes with --init data or --init fan")
    if options["input_file"] is not None and options["batch_norm"] == "keep":
        raise SelectionError("--input goes with --batch-norm fold or --batch-norm mean-only")
    if batch is not None:
        options["data"] = _read_inputs(batch)
    options["inputs"] = _inputs(options.pop("input_file"), ())
    options["include"], options["exclude"] = options["include"] or None, options["exclude"] or None
    dim = parse_dims(options.pop("dims"))
    options["init_scale"] = parse_scales(options.pop("scales"))
    with counting(f"converting {model.name}", data=True) as told:
        report = convert_checkpoint(model, output, dim=dim, progress=told, **options)
    show(report, as_json=as_json)


@cli.command()
@_model
@_writing
@_in_place
@_loading
@_stored
@click.option(
    "--zero-norm",
    type=click.Choice(["error", "zero", "nan"]),
    default="error",
    show_default=True,
    help="What a row with v = 0 and g != 0 becomes, which has no direction.",
)
@click.option(
    "--dim",
    "dims",
    multiple=True,
    metavar="[PATTERN=]AXIS",
    help="The axis of magnitudes stored as a plain list, which does not tell; repeat.",
)
@_alone
@_filing
@_common
def fold(model: Path, as_json: bool, **options: Any) -> None:
    """Fold every (g, v) of MODEL back into a plain weight g * v / ||v||.

    MODEL is a state dict or whole module (.pt .pth .bin .ckpt .safetensors), a directory of state dicts as the
    Hugging Face hub or torch.distributed.checkpoint has it, or an ONNX graph (.onnx).

    \b
    Examples:
      wnsurgery fold model.wn.pt -o model.pt
      wnsurgery fold generator.safetensors
      wnsurgery fold checkpoint.pth --entry generator -o plain.safetensors
      wnsurgery fold exported.onnx -o clean.onnx
      torchrun --nproc-per-node 4 -m wnsurgery fold sharded-model -o plain-model
    """
    output = options.pop("output") or _beside(model, "folded")
    if model.suffix.lower() == ".onnx":
        from wnsurgery.graph import fold_onnx

        own = "dry_run", "strict", "manifest", "resume", "dims", "magnitude", "arch", "trust_pickle", "entry"
        _refuse_given("ONNX files", *own)
        keywords = {name: options[name] for name in ("zero_norm", "force", "in_place")}
        report = fold_onnx(model, output, **keywords)
        show(report, as_json=as_json)
        return
    from wnsurgery.files import fold_checkpoint
    from wnsurgery.ranks import launched
    from wnsurgery.stores import is_file_name

    dim = parse_dims(options.pop("dims"))
    with launched() as ranks:
        group = None if model.is_dir() and not is_file_name(output) and ranks.size > 1 else False
        if ranks.rank > 0:
            if group is None:
                fold_checkpoint(model, output, dim=dim, process_group=group, **options)
            return
        with counting(f"folding {model.name}", data=True) as told:
            folded = fold_checkpoint(model, output, dim=dim, progress=told, process_group=group, **options)
    show(folded, as_json=as_json)


@cli.command()
@_model
@_writing
@_loading
@_entry
@_stored
@_feeding
@click.option("--opset", type=int, help="ONNX opset; default: the exporter's.")
@click.option("--dynamic", is_flag=True, help="Let the first axis of every input vary.")
@click.option("--dynamic-axes", multiple=True, metavar="NAME=0,2", help="Let these axes of an input vary; repeat.")
@click.option("--half", is_flag=True, help="Round the folded weights to float16.")
@click.option("--external", is_flag=True, help="Put the weights, but those under 256 bytes, into OUTPUT.data.")
@click.option(
    "--exporter",
    type=click.Choice(["dynamo", "torchscript"]),
    default="dynamo",
    show_default=True,
    help="Which of torch's exporters.",
)
@click.option("--example", metavar="PACKAGE.MODULE:FUNCTION", help="Callable that returns the inputs.")
@click.option("--rtol", type=float, help="Relative tolerance on outputs; default: by type.")
@click.option("--atol", type=float, help="Absolute tolerance on outputs; default: by type.")
@_common
def export(model: Path, as_json: bool, **options: Any) -> None:
    """Fold MODEL, export it to ONNX, check the graph and compare it with onnxruntime.

    \b
    Examples:
      wnsurgery export model.pt -o model.onnx --input-shape 1x3x32x32
      wnsurgery export weights.pt --arch mypackage.nets:build --input batch.npz
    """
    from wnsurgery.export import export_onnx
    from wnsurgery.files import load_model
    from wnsurgery.onnx_file import refuse_sources

    output = options.pop("output") or model.with_suffix(".onnx")
    example, file = options.pop("example"), options.pop("input_file")
    inputs = _inputs(file, options.pop("input_shape"))
    if example is not None:
        from wnsurgery.inout import example_inputs

        if inputs is not None:
            raise click.UsageError("--example excludes --input and --input-shape")
        inputs = example_inputs(example)
    if inputs is None:
        raise SelectionError("export needs inputs", hint="--input-shape 1x3x32x32, --input FILE or --example FUNCTION")
    axes = parse_axes(options.pop("dynamic_axes"))
    if axes and options["dynamic"]:
        raise click.UsageError("--dynamic and --dynamic-axes exclude each other")
    options["dynamic"] = axes or options["dynamic"]
    module = load_model(model, **{name: options.pop(name) for name in ("arch", "trust_pickle", "entry", "magnitude")})
    refuse_sources(output, [model] if file is None else [model, file])
    with working(f"exporting {model.name}"):
        report = export_onnx(module, inputs, output, **options)
    show(report, as_json=as_json)


@cli.command()
@_model
@click.option("--input", "input_file", type=_PATH, required=True, help="Inputs: .npz, .npy or a folder.")
@click.option("-o", "--output", type=_PATH, required=True, help="Outputs: .npz, or .npy for one.")
@click.option("--provider", default="cpu", show_default=True, metavar="|".join(_PROVIDERS), help="Where to run.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Files of a folder run at once.")
@click.option(
    "--time",
    "repeats",
    type=click.IntRange(1),
    help="Run a file this often and print the times; a folder's always are.",
)
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@_common
def run(model: Path, input_file: Path, output: Path, provider: str, force: bool, as_json: bool, **options: Any) -> None:
    """Run an ONNX MODEL on the inputs of a file, or of each file of a folder.

    Fails if the provider is not the one onnxruntime took.

    \b
    Examples:
      wnsurgery run model.onnx --input x.npz -o y.npz --provider cpu
      wnsurgery run model.onnx --input inputs -o outputs --batch 8
    """
    _refuse_given(*(("a folder", "repeats") if input_file.is_dir() else ("a file", "batch")))
    if input_file.is_dir():
        from wnsurgery.folder import run_folder

        with counting(f"running {model.name}") as progress:
            report = run_folder(
                model, input_file, output, provider=provider, batch=options["batch"], force=force, progress=progress
            )
        show(report, as_json=as_json)
        return
    from wnsurgery.inout import read_arrays, write_arrays
    from wnsurgery.parity import open_session, run_session, time_session

    _refuse_inputs(output, model, input_file)
    arrays = read_arrays(input_file)
    session = open_session(model, provider)
    outputs = run_session(session, arrays, model)
    write_arrays(output, outputs, force=force)
    shapes = {escape(name): tuple(value.shape) for name, value in outputs.items()}
    result: dict[str, Any] = {"outputs": shapes, "provider": session.get_providers()[0]}
    lines = [f"{name}: {shape}" for name, shape in shapes.items()]
    lines.append(f"ran on {result['provider']}")
    if options["repeats"]:
        low, middle, high = time_session(session, arrays, model, options["repeats"])
        lines.append(f"{middle:.3f} ms ({low:.3f} .. {high:.3f}) in {options['repeats']} runs on {provider}")
        result |= {"runs": options["repeats"], "milliseconds": {"least": low, "median": middle, "most": high}}
    show(result if as_json else "\n".join([f"wrote {output}", *lines]), as_json=as_json)


@cli.command()
@click.argument("a", type=_PATH)
@click.argument("b", type=_PATH)
@_loading
@_entry
@_stored
@_feeding
@click.option("--rtol", type=float, help="Relative tolerance on outputs; default: by type.")
@click.option("--atol", type=float, help="Absolute tolerance on outputs; default: by type.")
@click.option(
    "--random", "n_inputs", type=click.IntRange(1), default=3, show_default=True, help="Random sets of inputs."
)
@click.option("--more", type=_PATH, multiple=True, help="A further file of inputs; repeat.")
@click.option("--bisect", is_flag=True, help="If outputs differ, name the layer where the two part.")
@click.option("--any-dtype", is_flag=True, help="Let the sides be of different types (fp16 against fp32).")
@_common
def verify(a: Path, b: Path, as_json: bool, **options: Any) -> None:
    """Compare two artefacts: weights in units in the last place, outputs in absolute and relative difference.

    A and B are state dicts, directories of them, whole modules or ONNX files. A converted one counts as the plain
    weights it stands for. Exit code 7 if they differ.

    \b
    Examples:
      wnsurgery verify model.pt model.wn.pt
      wnsurgery verify model.pt model.onnx --input-shape 1x3x32x32
      wnsurgery verify before.pt after.pt --input-shape 1x3x32x32 --bisect
    """
    from wnsurgery.verification import verify as compare

    shapes = options.pop("input_shape")
    _refuse_loading(a, b)
    if options["input_file"] is not None:
        _refuse_given("--input", "n_inputs")
    elif not shapes and ".onnx" not in (a.suffix.lower(), b.suffix.lower()):
        _refuse_given("two checkpoints without --input-shape", "n_inputs")
    inputs = _inputs(options.pop("input_file"), shapes)
    options["more"] = [_read_inputs(path) for path in options["more"]]
    if shapes:
        from wnsurgery.inout import random_inputs

        options["more"] += [random_inputs(shapes, seed) for seed in range(1, options["n_inputs"])]
    with working(f"comparing {a.name} and {b.name}"):
        report = compare(a, b, inputs, **options)
    show(report, as_json=as_json)
    report.raise_for_status()


@cli.command()
@_model
@_loading
@_entry
@_stored
@click.option("--lr", type=float, default=1.0, show_default=True, help="Learning rate to give the effective steps for.")
@click.option("--reference", type=_PATH, help="The same net earlier: print ||v|| and |g| against it.")
@click.option("--against", type=_PATH, help="Print what changed since this one.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the result as CSV.")
@click.option("--html", "page", type=_PATH, help="Write the result as a page, too.")
@click.option("--parity", type=_PATH, help="JSON of a fold, export or verify to show on the page.")
@click.option("--force", is_flag=True, help="Overwrite an existing page.")
@click.option("--all", "everything", is_flag=True, help="On a terminal: every weight of a large net, not groups.")
@_common
def inspect(model: Path, as_json: bool, as_csv: bool, everything: bool, against: Path | None, **options: Any) -> None:
    """List the weights of MODEL: layout, shape, kept axes, g and ||v||, effective step of the direction
    lr |g| / ||v||^2, and what is not normalized and why.

    \b
    Examples:
      wnsurgery inspect generator.pth
      wnsurgery inspect step9000.pt --reference step0.pt --lr 1e-3
      wnsurgery inspect step9000.pt --against step0.pt --html changes.html
      wnsurgery inspect generator.pth --html report.html
      wnsurgery inspect generator.pth --csv > weights.csv
    """
    from wnsurgery.inspection import inspect as look

    page, parity, force = (options.pop(name) for name in ("page", "parity", "force"))
    if page is None and (parity is not None or force):
        raise click.UsageError(f"{'--force' if parity is None else '--parity'} needs --html")
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    _refuse_loading(model, against, options["reference"])
    if against is not None:
        _refuse_given("--against", "everything")
        _refuse_given("--against without --html", *(() if page else ("lr",)))
    _refuse_inputs(page, model, against, options["reference"], parity)
    if against is not None:
        changes = _changes(model, against, options)
        if page is not None:
            _write_page(look(model, **options), page, model, parity, changes, force)
        _show_table(changes, as_json, as_csv)
        return
    with counting(f"reading {model.name}", data=True) as told:
        report = look(model, progress=told, **options)
    if page is not None:
        _write_page(report, page, model, parity, None, force)
    if as_csv or as_json or quiet() or not sys.stdout.isatty():
        _show_table(report, as_json, as_csv)
    else:
        from wnsurgery.weight_table import show_weights

        show_weights(report, everything=everything)


@cli.command()
@click.argument("model", type=_PATH, required=False)
@_loading
@_entry
@_stored
@_feeding
@click.option("--repeats", type=click.IntRange(min=3), default=20, show_default=True, help="Interleaved repeats.")
@click.option("--deploy", is_flag=True, help="Time deployment: torch, torch.compile and onnxruntime, folded and not.")
@click.option("--no-compile", is_flag=True, help="Leave torch.compile out of --deploy.")
@click.option("--suite", is_flag=True, help="Time the built-in nets and surgery; MODEL then chooses among them.")
@click.option("--work", "works", multiple=True, metavar="WORK", help="Suite: train, eval, accumulate, gan; repeat.")
@click.option("--threads", multiple=True, type=click.IntRange(min=1), help="Suite: CPU threads; repeat.")
@click.option("--fault-free", is_flag=True, help="Suite: measure again without page faults.")
@_common
def bench(model: Path | None, as_json: bool, suite: bool, deploy: bool, no_compile: bool, **options: Any) -> None:
    """Time MODEL plain, under torch's weight norm and under ours: training step and evaluation.

    \b
    Examples:
      wnsurgery bench model.pt --input-shape 16x3x32x32
      wnsurgery bench model.pt --input-shape 1x3x32x32 --deploy --json
      wnsurgery bench --suite "gpt-*" --work train --threads 1 --json
    """
    from wnsurgery.files import load_model

    own = {name: options.pop(name) for name in ("works", "threads", "fault_free")}
    if no_compile and not deploy:
        raise SelectionError("--no-compile goes with --deploy")
    if suite:
        loading = "arch", "trust_pickle", "entry", "magnitude", "input_file", "input_shape"
        _refuse_given("--suite", *loading, "deploy")
        _bench_suite(model, as_json, options["repeats"], own)
        return
    if model is None or any(own.values()):
        raise SelectionError("bench needs a MODEL" if model is None else "--work, --threads, --fault-free need --suite")
    if model.suffix.lower() == ".onnx" and model.is_file():
        hint = "wnsurgery run GRAPH --input FILE -o OUTPUT --time N times a graph"
        raise InputError.of(model, "an ONNX graph; bench takes the model that it was made of", hint)
    inputs = _inputs(options.pop("input_file"), options.pop("input_shape"))
    if inputs is None:
        raise SelectionError("bench needs inputs", hint="--input-shape 16x3x32x32 or --input FILE")
    module = load_model(model, **{name: options.pop(name) for name in ("arch", "trust_pickle", "entry", "magnitude")})
    with working(f"timing {model.name}"):
        report: Any
        if deploy:
            from wnsurgery.deployment import bench_deployment

            report = bench_deployment(module, inputs, compiled=not no_compile, **options)
        else:
            from wnsurgery.benchmark import bench as measure

            report = measure(module, inputs, **options)
    show(report, as_json=as_json)


def _changes(model: Path, against: Path, options: dict[str, Any]) -> Any:
    from wnsurgery.turning import compare_weight_norm

    if options["reference"] is not None:
        raise click.UsageError("--against and --reference exclude each other")
    own = {name: value for name, value in options.items() if name not in ("lr", "reference")}
    with counting(f"comparing {model.name} and {against.name}") as told:
        return compare_weight_norm(model, against, progress=told, **own)


def _write_page(report: Any, page: Path, model: Path, parity: Path | None, changes: Any, force: bool) -> None:
    from wnsurgery.html_report import write_html

    write_html(report, page, title=model.name, parity=parity, changes=changes, force=force)


def _show_table(report: Any, as_json: bool, as_csv: bool) -> None:
    if as_csv:
        print(report.to_csv(), end="")
    else:
        show(report, as_json=as_json)


def _bench_suite(model: Path | None, as_json: bool, repeats: int, own: dict[str, Any]) -> None:
    from wnsurgery.suite import bench_suite

    options = {name: value for name, value in own.items() if value}
    if model is not None:  # a choice of nets, and nothing but nets
        options |= {"models": [str(model)], "layers": [], "megabytes": 0}
    with working("timing"):
        report = bench_suite(**options, repeats=repeats)
    show(report, as_json=as_json)


@cli.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands, options and their values.

    \b
    Examples:
      wnsurgery completion bash >> ~/.bashrc
      wnsurgery completion zsh >> ~/.zshrc
      wnsurgery completion fish > ~/.config/fish/completions/wnsurgery.fish
    """
    print(script(cli, shell))


# Arguments -----------------------------------------------------------------------------------------------


def _beside(model: Path, word: str) -> Path:
    if model.is_dir():
        model = model.resolve() if model.name in ("", "..") else model
        return model.with_name(f"{model.name}.{word}")
    return model.with_name(f"{model.stem}.{word}{model.suffix}")


def _refuse_given(what: str, *names: str) -> None:
    """Refuse options of the command that mean nothing for `what`, where they were given."""
    context = click.get_current_context()
    for option in context.command.params:
        if option.name in names and context.get_parameter_source(option.name) is not ParameterSource.DEFAULT:
            hint = "wnsurgery inspect shows what is there" if option.name == "dry_run" else None
            raise SelectionError(f"{option.opts[0]} does not apply to {what}", hint=hint)


def _refuse_loading(*inputs: Path | None) -> None:
    """Refuse what tells how checkpoints are read where there is none, and --trust-pickle where none could hold code of
    others."""
    files = [path for path in inputs if path is not None and path.suffix.lower() != ".onnx"]
    if not files:
        _refuse_given("ONNX files", "arch", "trust_pickle", "entry", "magnitude")
    if all(path.is_dir() for path in files):
        _refuse_given("directories and ONNX files", "trust_pickle")


def _refuse_inputs(output: Path | None, *inputs: Path | None) -> None:
    """Whatever --force says, no output replaces what is read, the weights files of graphs included."""
    from wnsurgery.stores.commit import refuse_inputs

    if output is None:
        return
    refuse_inputs(output, *inputs)
    graphs = [path for path in inputs if path is not None and path.suffix.lower() == ".onnx"]
    if graphs and output.exists():
        from wnsurgery.onnx_file import weights_read_by

        refuse_inputs(output, *(weights for graph in graphs for weights in weights_read_by(graph)))


def _read_inputs(path: Path) -> Any:
    from wnsurgery.inout import read_batch

    return read_batch(path)


def _inputs(file: Path | None, shapes: tuple[str, ...]) -> Any:
    if file is not None and shapes:
        raise click.UsageError("--input and --input-shape exclude each other")
    if file is not None:
        return _read_inputs(file)
    if not shapes:
        return None
    from wnsurgery.inout import random_inputs

    return random_inputs(shapes)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and leave the process with its exit code."""
    leave(cli, arguments)
