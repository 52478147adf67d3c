"""The command line, `llama-probe`.

Whatever takes long to import is imported inside the command that needs it, so that `--help`
answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from llama_probe.errors import LlamaProbeError

app = typer.Typer(
    name="llama-probe",
    help="Look inside Llama-family models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; an error of the package ends it with one sentence and code 1."""
    try:
        app()
    except LlamaProbeError as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        sys.exit(1)


def _print_version(wanted: bool) -> bool:
    if wanted:
        from llama_probe import __version__

        typer.echo(__version__)
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="A catalogue name, a folder, a GGUF file or a hub name. Left out: SmolLM2, or "
            "tiny-moe, which is part of this package, where SmolLM2 cannot be fetched."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path(
        "llama-probe-demo.html"
    ),
    open_: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the report in a browser.")
    ] = False,
) -> None:
    """Look into one prompt and write an interactive report about it."""
    from llama_probe.runner.demo import run_demo

    report = run_demo(model or _at_hand(), out).resolve()
    typer.echo(f"Report: {report}")
    if open_:
        typer.launch(report.as_uri())


def _at_hand() -> str:
    """SmolLM2 if it is on disk or can be fetched, else the model that needs no network."""
    from llama_probe.checkpoints import catalogue
    from llama_probe.errors import DownloadError

    try:
        catalogue.pull("smollm2-135m-instruct")
    except DownloadError as error:
        typer.echo(f"{error}\nThe demo goes on with tiny-moe, which needs no network.", err=True)
        return "tiny-moe"
    return "smollm2-135m-instruct"


@app.command()
def models() -> None:
    """List the models that can be had by name."""
    from llama_probe.checkpoints import catalogue

    for name in catalogue.names():
        entry = catalogue.entry(name)
        typer.echo(f"{name}: {entry.summary}, {entry.size / 1e6:.0f} MB, {entry.licence}")
        typer.echo(f"  {catalogue.path_of(name) or f'not on disk: llama-probe pull {name}'}")


@app.command()
def pull(name: Annotated[str, typer.Argument(help="A name that `models` lists.")]) -> None:
    """Fetch a model, check it and keep it on disk."""
    from llama_probe.checkpoints import catalogue

    typer.echo(catalogue.pull(name))


_OUT = Annotated[Path, typer.Option(help="The folder of the runs' folders.")]


@app.command()
def run(
    experiment: Annotated[
        str, typer.Argument(help="FILE.py, or FILE.py::FUNCTION where it has several.")
    ],
    parameters: Annotated[
        list[str] | None,
        typer.Option("-P", "--parameter", metavar="KEY=V1,V2", help="Values of a parameter."),
    ] = None,
    out: _OUT = Path("runs"),
    again: Annotated[bool, typer.Option("--again", help="Begin anew, whatever there is.")] = False,
    engine: Annotated[str, typer.Option(help="Who runs the grid: local or ray.")] = "local",
) -> None:
    """Run an experiment for all combinations of its parameters' values.

    What is complete is not done again, and what was cut short goes on. The exit code is 0 if all
    runs are complete, 1 if one is not, and 130 after Ctrl-C.
    """
    from llama_probe.runner.grid import plan, run_cells

    try:
        found, cells = plan(experiment, parameters or [], out, again)
        outcomes = run_cells(found, cells, engine)
    except KeyboardInterrupt:
        typer.echo("Interrupted: the same command goes on from here.", err=True)
        raise typer.Exit(130) from None
    for outcome in outcomes:
        for note in outcome.notes:
            typer.echo(f"{outcome.run}: {note}")
    complete = [outcome for outcome in outcomes if outcome.status == "complete"]
    before = sum(not outcome.done for outcome in complete)
    typer.echo(
        f"{len(complete)} of {len(outcomes)} runs in {out} are complete"
        + (f", {before} of them from before." if before else ".")
    )
    if len(complete) < len(outcomes):
        raise typer.Exit(1)


@app.command()
def runs(
    out: _OUT = Path("runs"),
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two runs: in what do they differ?"),
    ] = None,
) -> None:
    """List the runs of a folder, or compare two of them."""
    from llama_probe.runner.listing import compare_runs, list_runs

    typer.echo(compare_runs(out, *compare) if compare else list_runs(out))


@app.command()
def report(
    name: Annotated[
        str, typer.Argument(metavar="RUN", help="Its name, the end of it, or its folder.")
    ],
    out: _OUT = Path("runs"),
) -> None:
    """Write a run's report again, from what is saved in its folder."""
    from llama_probe.runner.report import rebuild
    from llama_probe.runner.saved import folder_of

    typer.echo(rebuild(folder_of(name, out)))


@app.command()
def audit(
    model: Annotated[str, typer.Argument(help="A catalogue name, a folder, a file, a hub name.")],
    against: Annotated[
        str | None, typer.Option(help="Another checkpoint of its base, to see what changed.")
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(help="A CSV file with text, kind and pair. Left out: mild ones of our own."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of the audits' folders.")] = Path("audits"),
    again: Annotated[bool, typer.Option("--again", help="Begin anew, whatever there is.")] = False,
    show_answers: Annotated[
        bool, typer.Option("--show-answers", help="Show answers in full, not how they begin.")
    ] = False,
) -> None:
    """Report on how a model refuses: whether, by what, at what cost, and what would notice."""
    from llama_probe.runner.auditing import audit as made

    try:
        report = made(
            model, against, requests=requests, out=out, again=again, show_answers=show_answers
        )
    except KeyboardInterrupt:
        typer.echo("Interrupted: the same command goes on from here.", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"Report: {report.resolve()}")


if __name__ == "__main__":
    main()
