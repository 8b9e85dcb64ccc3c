"""The command line: `vlmflow run RECIPE` and what belongs to it.

Heavy libraries are imported inside the commands that need them, so `--help` stays instant.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flows.convert_command import convert_app
from flows.data_command import data_app
from flows.json_output import print_json
from flows.swap_command import swap
from vlmcore.errors import GateError, VlmflowError

if TYPE_CHECKING:
    from flows.pipeline import Results
    from flows.request import Request
    from tasks.caching import Run

app = typer.Typer(
    name="vlmflow",
    help="One recipe file and one command: a trained, exported, served and scored VLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
artifacts_app = typer.Typer(help="Look at the artifact store.", no_args_is_help=True)
app.add_typer(artifacts_app, name="artifacts")
recipe_app = typer.Typer(help="Look at recipes.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
app.add_typer(convert_app, name="convert")
app.add_typer(data_app, name="data")

RecipeArg = Annotated[
    str, typer.Argument(help="A recipe file, or the name of one in deployments/recipes.")
]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Another value, e.g. train.full.learning_rate=1e-4."
    ),
]
StoreOption = Annotated[
    Path | None,
    typer.Option(help="Artifact store; default $VLMFLOW_STORE, else .vlmflow/store."),
]
RefreshOption = Annotated[
    list[str],
    typer.Option(metavar="STAGE", help="Build this stage again although the store has it."),
]
FromOption = Annotated[
    str, typer.Option("--from", metavar="STAGE", help="Build nothing before this stage.")
]
UntilOption = Annotated[str, typer.Option(metavar="STAGE", help="End after this stage.")]
ArtifactArg = Annotated[str, typer.Argument(help="A stage, or the start of a digest or key.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

console = Console(stderr=True)
app.command()(swap)


@app.command()
def run(
    recipe: RecipeArg,
    set_: SetOption = [],  # noqa: B006 - typer reads it
    from_: FromOption = "",
    until: UntilOption = "",
    refresh: RefreshOption = [],  # noqa: B006
    store: StoreOption = None,
    json_: JsonOption = False,
) -> None:
    """Build everything a recipe asks for that the store does not have yet.

    A stage is named like `data.numbers.shards`, `swap`, `train.full`, `evaluate.full.holdout`; a
    bare prefix such as `train` means all stages under it. A run that was killed goes on where it
    stopped when it is started again. Exit code 3: a gate of the recipe was missed.
    """
    began = time.perf_counter()
    request = _request(
        recipe, overrides=set_, refresh=refresh, start_from=from_, until=until, store=store
    )
    with contextlib.redirect_stdout(sys.stderr):  # only --json speaks on stdout
        done, results, error = _run(request)
    wall_s = time.perf_counter() - began
    report = done.artifacts.get("report")
    from flows.terminal import print_summary

    print_summary(
        console,
        done.outcomes,
        results.scores,
        results.gates,
        wall_s=wall_s,
        report=report.path / "report.html" if report else None,
    )
    if json_:
        print_json(
            {
                "stages": [
                    {"name": o.name, "state": o.state, "seconds": o.seconds, "digest": o.digest}
                    for o in done.outcomes
                ],
                "scores": results.scores,
                "gates": [
                    {"gate": g.gate, "value": g.value, "passed": g.passed} for g in results.gates
                ],
                "report": str(report.path / "report.html") if report else None,
                "wall_s": round(wall_s, 3),
            }
        )
    if error is not None:
        raise error
    results.require_gates()


def _run(request: Request) -> tuple[Run, Results, VlmflowError | None]:
    """Runs a request; an error of the user's comes back beside what was done before it."""
    from flows.pipeline import Results
    from flows.pipeline import plan as walk_dry
    from flows.terminal import TerminalWatcher

    planned, results = walk_dry(request)
    if all(outcome.state == "cached" for outcome in planned.outcomes) and not os.environ.get(
        "PREFECT_API_URL"
    ):
        for outcome in planned.outcomes:
            TerminalWatcher(console).finished(outcome)
        return planned, results, None  # nothing to run: no Prefect server is started for that
    # Prefect would print a traceback for an error that we print as a sentence
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    with contextlib.ExitStack() as stack:
        if not os.environ.get("PREFECT_API_URL"):
            from flows.up import private_server

            home = request.store.parent / "prefect-run"  # `vlmflow up` may be using its own
            server = private_server(home=home, log_dir=request.log_dir)
            os.environ["PREFECT_API_URL"] = stack.enter_context(server)
        from flows.build_vlm import new_run, run_as_flow  # imports prefect, which reads the URL

        watcher = stack.enter_context(TerminalWatcher(console))
        run = new_run(request, watcher)
        try:
            return run, run_as_flow(request, run), None
        except VlmflowError as error:
            return run, Results(), error


def _request(recipe: str, **options: Any) -> Request:
    from flows.request import make_request

    return make_request(recipe, **options)


@app.command()
def plan(
    recipe: RecipeArg,
    set_: SetOption = [],  # noqa: B006
    from_: FromOption = "",
    until: UntilOption = "",
    refresh: RefreshOption = [],  # noqa: B006
    store: StoreOption = None,
    json_: JsonOption = False,
) -> None:
    """Show which stages are cached, which would run, and which change makes them run."""
    request = _request(
        recipe, overrides=set_, refresh=refresh, start_from=from_, until=until, store=store
    )
    from flows.pipeline import plan as walk_dry

    planned, _ = walk_dry(request)
    if json_:
        print_json(
            {
                "stages": [
                    {"name": o.name, "state": o.state, "digest": o.digest, "why": list(o.reasons)}
                    for o in planned.outcomes
                ]
            }
        )
        return
    from flows.terminal import plan_table

    Console().print(plan_table(planned.outcomes))


@app.command()
def up(
    port: Annotated[int, typer.Option(help="Port of the UI and the API.")] = 4200,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Start a Prefect server, a worker and the deployments; Ctrl-C stops them."""
    from flows.up import screen
    from flows.up import up as start

    console.print("starting Prefect …", style="dim")
    with contextlib.suppress(KeyboardInterrupt), start(host=host, port=port) as instance:
        console.print(screen(instance), highlight=False, markup=False, soft_wrap=True)
        instance.wait()
    console.print("stopped")


@recipe_app.command("list")
def recipe_list() -> None:
    """The recipes of this checkout."""
    from vlmcore.recipe import list_recipes

    for path in list_recipes():
        typer.echo(path.stem)


@recipe_app.command("schema")
def recipe_schema() -> None:
    """The JSON schema of a recipe: every field with its meaning, unit and default."""
    from vlmcore.recipe import Recipe

    print_json(Recipe.model_json_schema())


@recipe_app.command("check")
def recipe_check(recipe: RecipeArg, set_: SetOption = []) -> None:  # noqa: B006
    """Load a recipe and print it with every default, or list all of its faults."""
    from vlmcore.recipe import load_recipe
    from vlmcore.recipe.loading import dump_recipe

    typer.echo(dump_recipe(load_recipe(recipe, set_)), nl=False)


@artifacts_app.command("list")
def artifacts_list(store: StoreOption = None, json_: JsonOption = False) -> None:
    """Every artifact, oldest first; and what encoded samples take of the disk."""
    found = _store(store)
    records = found.artifacts()
    encoded, encoded_bytes = found.encoded_samples, found.encoded_samples_bytes()
    if json_:
        print_json(
            {
                "artifacts": [record.model_dump(mode="json") for record in records],
                "encoded_samples": {"path": str(encoded), "size_bytes": encoded_bytes},
            }
        )
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("stage", "digest", "key", "size", "built", "seconds"):
        table.add_column(column, justify="right" if column in {"size", "seconds"} else "left")
    for record in records:
        table.add_row(
            record.stage,
            record.digest[:12],
            record.key[:12],
            _readable(record.size_bytes),
            f"{record.started_at:%Y-%m-%d %H:%M}",
            f"{record.seconds:.1f}",
        )
    out = Console()
    out.print(table)
    if encoded_bytes:
        size = _readable(encoded_bytes)
        out.print(f"encoded samples: {size} in {encoded}, deleted at will", soft_wrap=True)


@artifacts_app.command("show")
def artifacts_show(
    name: ArtifactArg,
    store: StoreOption = None,
    json_: JsonOption = False,
) -> None:
    """One artifact: parameters, inputs, versions, figures, files."""
    found = _store(store)
    manifest = found.show(name)
    if json_:
        print_json(manifest.model_dump(mode="json"))
        return
    out = Console()
    out.print(f"[bold]{manifest.stage}[/]  {found.ref(manifest).path}", soft_wrap=True)
    shown = manifest.model_dump(mode="json", exclude={"files"})
    out.print_json(json.dumps(shown))
    for entry in manifest.files:
        mark = " (volatile)" if entry.volatile else ""
        out.print(f"{_readable(entry.size):>10}  {entry.path}[dim]{mark}[/]", highlight=False)


@artifacts_app.command("verify")
def artifacts_verify(store: StoreOption = None, json_: JsonOption = False) -> None:
    """Read every byte of every artifact; set the damaged aside, so the next run rebuilds them.

    Exit code 1: something was damaged.
    """
    bad = _store(store).verify(set_aside=True)
    if json_:
        rows = [
            {"stage": b.stage, "digest": b.digest, "path": str(b.path), "cause": b.cause}
            for b in bad
        ]
        print_json({"bad": rows})
    for one in bad:
        console.print(f"[bold red]bad[/]  {one}", highlight=False, soft_wrap=True)
    if bad:
        console.print("set aside in quarantine/; run the recipe again to rebuild them")
        raise typer.Exit(1)
    console.print("every artifact is as it was published")


@artifacts_app.command("lineage")
def artifacts_lineage(
    name: ArtifactArg,
    store: StoreOption = None,
    json_: JsonOption = False,
) -> None:
    """What an artifact was made from, back to the sources."""
    from vlmcore.artifacts import lineage

    found = _store(store)
    root = lineage(found, found.resolve(name))
    rows = [
        {"depth": depth, "stage": node.ref.stage, "key": node.ref.key, "digest": node.ref.digest}
        for depth, node in root.walk()
    ]
    if json_:
        print_json({"lineage": rows})
        return
    for row in rows:
        typer.echo(f"{'  ' * row['depth']}{row['stage']}  {row['digest'][:12]}")


def _store(root: Path | None) -> Any:
    from flows.request import default_store
    from vlmcore.artifacts import Store

    return Store(root or default_store())


def _readable(size_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def main() -> None:
    """Entry point: errors that are the user's come as sentences, not as tracebacks."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Prefect's lines belong to its UI; here stages print theirs
    logging.root.handlers[0].addFilter(lambda record: not record.name.startswith("prefect"))
    try:
        app(standalone_mode=True)
    except GateError as error:
        console.print(f"[bold red]gate:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(3)
    except VlmflowError as error:
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error), highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
