"""`llavolta`: the verbs, each a call of the Python API; errors as one block, exit codes, one JSON document with --json.

Nothing is imported here that reads experiments: `llv` loads it when a verb calls it, so that --help is quick.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, cast

import typer

import orchestrator as llv
from orchestrator.dispatch.signals import ended_by_signals
from orchestrator.errors import OTHER_STORAGE, ErrorDetail, Interrupted, LlavoltaError, SpecError, UsageError, shorten
from orchestrator.redaction import redacted

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.dispatch.ray.jobs import ClusterJob
    from orchestrator.report.documents import Document, Documents
    from orchestrator.testing.contract import Checked

Spec = Annotated[Path, typer.Argument(metavar="SPEC", help="Experiment file.")]
Specs = Annotated[list[Path], typer.Argument(metavar="SPEC...", help="Experiment files.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Overrides a value of the file.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output and nothing else.")]
MaybeCell = Annotated[
    str | None,
    typer.Option("--cell", metavar="CELL", help="A name, an id's beginning, or axis=value (default: the only one)."),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write (default: standard output).")
]
Local = Annotated[bool, typer.Option("--local", help="In this process, without Ray, for a debugger.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Runs again what failed before.")]
FailFast = Annotated[bool, typer.Option("--fail-fast", help="Stops at the first failure.")]
MaxHours = Annotated[
    float | None,
    typer.Option(
        "--max-hours", min=0, metavar="H", help="After H hours: checkpoint, stop, exit 75; the same command resumes."
    ),
]
Address = Annotated[str, typer.Option("--address", metavar="URL", help="The cluster's dashboard: http://HOST:8265.")]
MaybeAddress = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="Of the job on this cluster instead: http://HOST:8265."),
]
MaybeSpec = Annotated[
    Path | None, typer.Argument(metavar="[SPEC]", help="Experiment file, whose storage is meant.", show_default=False)
]
Place = Annotated[
    str | None, typer.Option("--storage", metavar="PATH", help="The storage (default: $LLAVOLTA_STORAGE or ./runs).")
]
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", metavar="FILE", help="A plug-in file or module to include; repeatable.")
]

_OPTIONS: dict[str, Any] = {
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(
    name="llavolta",
    help="Experiments on stage-wise visual-token compression: a YAML file in, an efficiency-accuracy grid out.",
    epilog="Every verb takes --debug, which shows the traceback of an error.",
    add_completion=False,
    pretty_exceptions_enable=False,
    **_OPTIONS,
)
data_app = typer.Typer(help="What the data of an experiment holds, and what the model gets of it.", **_OPTIONS)
ledger_app = typer.Typer(help="List, verify and garbage-collect stored results.", **_OPTIONS)
app.add_typer(data_app, name="data")
app.add_typer(ledger_app, name="ledger")


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="NAME.yaml", help="File to write; it must not exist.")],
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="A folder or a hub id.", show_default=True)
    ] = "llava-hf/llava-1.5-7b-hf",
    data: Annotated[
        str, typer.Option("--data", metavar="DATA", help="A LLaVA JSON file, or easy_vqa.", show_default=True)
    ] = "easy_vqa",
) -> None:
    """Write a commented experiment to start from, valid as it stands."""
    experiment = llv.init(file, model=model, data=data)
    print(f"{file}: {len(experiment.loaded.cells)} cells; next: llavolta plan {file}")
    if data != "easy_vqa":
        print(f"note: data.test is {data} as well, which is trained on; put rows there that are not", file=sys.stderr)


@app.command("import-llavolta")
def import_llavolta(
    scripts: Annotated[list[Path], typer.Argument(metavar="SCRIPT...", help="Training scripts, read as one.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="NAME.yaml", help="File to write.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="The LLaVA they train, where it is not LLaVA-1.5.")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs they run on, where they do not say.")] = 8,
    define: Annotated[
        list[str] | None, typer.Option("--define", metavar="NAME=VALUE", help="A variable's value; repeatable.")
    ] = None,
    drop_unreachable: Annotated[
        bool, typer.Option("--drop-unreachable", help="Leaves out stages that a script never reaches.")
    ] = False,
) -> None:
    """Write the experiment that training scripts of LLaVA or LLaVolta describe; they are read, not run."""
    pairs = [one.partition("=") for one in define or ()]
    if wrong := next((name for name, equals, _ in pairs if not (name and equals)), None):
        raise UsageError(f"--define {wrong}: write NAME=VALUE")
    experiment, notes = llv.import_llavolta(
        scripts, output, model=model, gpus=gpus, drop_unreachable=drop_unreachable,
        define={name: value for name, _, value in pairs},
    )  # fmt: skip
    for note in (*notes, *experiment.notices):
        print(f"note: {note}", file=sys.stderr)
    print(f"{output}: {len(experiment.loaded.cells)} cell; next: llavolta plan {output}")


@app.command()
def deploy(
    target: Annotated[str, typer.Argument(metavar="kuberay|slurm|skypilot", help="Where it runs.")],
    spec: Spec,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the files.")],
    set_: Set = None,
    as_json: Json = False,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines over which the lanes are divided.")] = 1,
    image: Annotated[str | None, typer.Option("--image", help="Container image; not on SLURM.")] = None,
    queue: Annotated[str | None, typer.Option("--queue", help="Kueue's queue, or SLURM's partition.")] = None,
    max_hours: MaxHours = None,
    accelerator: Annotated[
        str | None, typer.Option("--accelerator", help="The GPU's name on SkyPilot, such as H100.")
    ] = None,
) -> None:
    """Write the files that run SPEC on a cluster of KubeRay, SLURM or SkyPilot, on the machines `cluster:` needs."""
    written = llv.deploy(
        target, llv.load(spec, set_ or ()), output,
        nodes=nodes, image=image, queue=queue, max_hours=max_hours, accelerator=accelerator,
    )  # fmt: skip
    if as_json:
        print_json({"files": [str(file) for file in written]})
    else:
        print(f"{written[0]}: how to start it stands at its top")


@app.command()
def validate(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    data: Annotated[
        bool, typer.Option("--data", help="Also reads every row and image and tries each with the model's processor.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Also that a run needs no network: whatever it reads is on this machine.")
    ] = False,
) -> None:
    """Validate SPEC and report all errors, or `valid: N cells`."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported
    experiment = llv.load(spec, set_ or ())
    missing = [each for each in experiment.fetch(download=False)["sources"] if each["problem"]] if offline else []
    if missing:
        lines = [f"    {each['key']}: {each['name']}: {each['problem']}" for each in missing]
        raise UsageError("\n".join(["a run would need what is not here; `llavolta fetch SPEC` gets it:", *lines]))
    notices = [*experiment.notices, *(experiment.check_data() if data else ())]
    number = len(experiment.loaded.cells)
    if as_json:
        print_json({"valid": True, "cells": number, "notices": notices, "faults": []})
        return
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    count = f"{number} cell{'s' if number != 1 else ''}"
    search = experiment.spec.search
    print(f"valid: {count}" if search is None else f"valid: a search of {search.num_trials} trials, {count} each")


@app.command()
def fetch(spec: Spec, set_: Set = None, as_json: Json = False) -> None:
    """Download model, processor and data of SPEC from the Hugging Face hub into its cache; exit code 1 if any lacks."""
    document = llv.load(spec, set_ or ()).fetch()
    show_document(document, as_json)
    raise typer.Exit(0 if document["complete"] else 1)


@app.command()
def plan(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    text_tokens: Annotated[
        int | None, typer.Option("--text-tokens", min=0, metavar="N", help="Text tokens a sample (default: measured).")
    ] = None,
) -> None:
    """Show the cells, the stage tree, what is done already, and the cost, alone and shared."""
    show_document(llv.load(spec, set_ or ()).plan(text_tokens=text_tokens), as_json)


@app.command()
def run(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    local: Local = False,
    retry_failed: RetryFailed = False,
    fail_fast: FailFast = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A trial: model, steps and data made small, in STORAGE/smoke.")
    ] = False,
    max_hours: MaxHours = None,
) -> None:
    """Run what is missing of SPEC, with live progress; ends with the table."""
    experiment = llv.load(spec, set_ or ())
    outcome = experiment.run(
        local=local, retry_failed=retry_failed, fail_fast=fail_fast, max_hours=max_hours, smoke=smoke,
        console=terminal(error=as_json),
    )  # fmt: skip
    _end(outcome, as_json)


@app.command()
def evaluate(
    spec: Spec,
    cell: Annotated[
        str | None,
        typer.Option("--cell", metavar="CELL", help="One cell: its name, its id's beginning, or axis=value."),
    ] = None,
    set_: Set = None,
    as_json: Json = False,
    local: Local = False,
    retry_failed: RetryFailed = False,
    fail_fast: FailFast = False,
) -> None:
    """Run the evaluations that trained cells lack, and train nothing; cells that are not trained yet are named."""
    experiment = llv.load(spec, set_ or ())
    outcome = experiment.evaluate(
        cell, local=local, retry_failed=retry_failed, fail_fast=fail_fast, console=terminal(error=as_json)
    )
    _end(outcome, as_json)


@app.command()
def record(
    spec: Spec,
    scores: Annotated[
        list[str], typer.Argument(metavar="METRIC=VALUE...", help="As in MLflow: eval/NAME/accuracy=78.5.")
    ],
    cell: Annotated[str, typer.Option("--cell", metavar="CELL", help="A name, an id's beginning, or axis=value.")],
    source: Annotated[str, typer.Option("--source", metavar="TEXT", help="Where the scores are from.")],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Record scores that a benchmark's server or someone else gave a cell; the table marks them."""
    experiment = llv.load(spec, set_ or ())
    outcome = experiment.record(cell, dict(map(_score, scores)), source=source, console=terminal(error=as_json))
    if as_json:
        print_json(outcome.document())
    else:
        outcome.table.print(terminal())
    warn_unsent(outcome.unsent, outcome.tracking_problem, outcome.tracking_notes)


def _score(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        what = f"{value!r} is no number" if equals else "there is no `=`"
        raise UsageError(f"{text}: {what}; write eval/NAME/METRIC=VALUE") from None


@app.command()
def search(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    local: Local = False,
    retry_failed: RetryFailed = False,
    fail_fast: FailFast = False,
    max_hours: MaxHours = None,
) -> None:
    """Run the search that SPEC's `search` describes, with live progress; ends with the table and the Pareto front."""
    experiment = llv.load(spec, set_ or ())
    outcome = experiment.search(
        local=local, retry_failed=retry_failed, fail_fast=fail_fast, max_hours=max_hours,
        console=terminal(error=as_json),
    )  # fmt: skip
    _end(outcome, as_json)


@app.command()
def submit(
    what: Annotated[list[str], typer.Argument(metavar="[run|search] SPEC", help="What to do, and with which file.")],
    address: Address,
    set_: Set = None,
    as_json: Json = False,
    retry_failed: RetryFailed = False,
    fail_fast: FailFast = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A trial, as of `run`.")] = False,
    max_hours: MaxHours = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Does not follow the log.")] = False,
) -> None:
    """Run SPEC as a job of a Ray cluster, or join the job that does; follows its log, Ctrl-C leaves it running."""
    *verbs, spec = what
    experiment = llv.load(Path(spec), set_ or ())
    verb = "run" if experiment.spec.search is None else "search"
    if verbs not in ([], [verb]):
        raise UsageError(f"submit {' '.join(what)}: write `submit {verb} {spec}`, which is what that file describes")
    job = experiment.submit(address, retry_failed=retry_failed, fail_fast=fail_fast, max_hours=max_hours, smoke=smoke)
    for each in job.elsewhere:
        print(f"note: must be on the cluster: {each}", file=sys.stderr)
    print(f"{job.id}: {'joined' if job.joined else 'submitted'}", file=sys.stderr, flush=True)
    code = 0 if no_wait else _follow(job, spec, set_, as_json)
    if as_json:
        print_json({**job.document(), "joined": job.joined})
    raise typer.Exit(code)


@app.command()
def cancel(spec: Spec, address: Address, set_: Set = None, as_json: Json = False) -> None:
    """Stop the job that runs SPEC on a Ray cluster at a checkpoint, and wait for its end; `submit` resumes it."""
    job = _job(spec, set_, address)
    if not job.is_open:
        raise UsageError(f"{job.id} has ended already: {job.status}")
    job.cancel(_writer(as_json))
    if as_json:
        print_json(job.document())
    else:
        print(f"{job.id}: {job.status}; submit it again to resume")


def _job(spec: Path, overrides: list[str] | None, address: str) -> ClusterJob:
    """Return the newest job of an experiment on a cluster."""
    if not (jobs := llv.load(spec, overrides or ()).jobs(address)):
        raise UsageError(
            f"{address} has no job of {spec} as it is now: a job goes by the content of the file, of what it names, "
            "and of --set"
        )
    return jobs[-1]


def _follow(job: ClusterJob, spec: str | Path, overrides: list[str] | None, as_json: bool) -> int:
    """Write a job's log until it ends, and return the exit code of its run.

    Raises:
        Interrupted: Ctrl-C; the job goes on.
    """
    try:
        return job.follow(_writer(as_json))
    except KeyboardInterrupt:
        settings = [word for text in overrides or () for word in ("--set", text)]
        call = shlex.join([str(spec), *settings, "--address", job.server.address])
        raise Interrupted(
            f"{job.id} goes on\n    llavolta logs {call} -f    follows it again\n    llavolta cancel {call}    stops it"
        ) from None


def _writer(as_json: bool) -> Callable[[str], None]:
    """Return what writes a job's log: to standard output, which is kept for a JSON document otherwise."""
    stream = sys.stderr if as_json else sys.stdout
    return lambda text: print(text, end="", file=stream, flush=True)


def _end(outcome: llv.RunOutcome, as_json: bool) -> None:
    """Print how a run ended, and end with its exit code."""
    if as_json:
        print_json(outcome.document())
    else:
        outcome.print(terminal())
    warn_unsent(outcome.unsent, outcome.tracking_problem, outcome.tracking_notes)
    raise typer.Exit(outcome.exit_code)


@app.command()
def status(specs: Specs, set_: Set = None, as_json: Json = False, address: MaybeAddress = None) -> None:
    """Show what runs where, what is done, waiting or failed and why, and the time left; works beside a live run."""
    if address is not None:
        jobs = [_job(spec, set_, address).document() for spec in specs]
        if as_json:
            print_json(jobs if len(jobs) > 1 else jobs[0])
        else:
            for job in jobs:
                print("\n".join(f"{key}: {value}" for key, value in job.items() if value is not None))
        return
    documents = [experiment.status() for experiment in [llv.load(spec, set_ or ()) for spec in specs]]
    if as_json and len(documents) > 1:
        print_json(documents)
        return
    for document in documents:
        show_document(document, as_json)


@app.command()
def table(
    specs: Specs,
    set_: Set = None,
    as_json: Json = False,
    form: Annotated[
        Literal["md", "csv", "latex", "json"] | None, typer.Option("--format", help="For a paper or a script.")
    ] = None,
    all_metrics: Annotated[bool, typer.Option("--all", help="Every metric, not the headline ones.")] = False,
) -> None:
    """Print one ablation table of one or several experiments, each compared with its own baseline."""
    found = llv.table([llv.load(spec, set_ or ()) for spec in specs], all_metrics=all_metrics)
    if form or as_json:
        print_document(found.render("json" if as_json else form or "md"))
    else:
        found.print(terminal())


@app.command()
def report(
    specs: Specs,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.html", help="The file (default: in short, on screen)."),
    ] = None,
    set_: Set = None,
    as_json: Json = False,
    answers: Annotated[
        int, typer.Option("--answers", min=0, metavar="N", help="Wrong answers shown of each row, with pictures.")
    ] = 8,
) -> None:
    """Write one HTML file about one or several experiments: figures, table, tests, stage tree; it works offline."""
    first, *others = (llv.load(spec, set_ or ()) for spec in specs)
    document = first.report(beside=others, answers=answers)
    if output is not None:
        write_document(document.to_html(), output)
    show_document(document, as_json)


@app.command()
def logs(
    spec: Spec,
    cell: MaybeCell = None,
    set_: Set = None,
    as_json: Json = False,
    address: MaybeAddress = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="With --address: until the job ends.")] = False,
) -> None:
    """Print the logs of a cell's stage runs and evaluations, in order; or what a job on a cluster has printed."""
    if (cell and address) or (follow and address is None):
        raise UsageError("logs: give --cell CELL, or --address URL, which takes -f")
    if address is not None:
        job = _job(spec, set_, address)
        if follow:
            raise typer.Exit(_follow(job, spec, set_, as_json))
        if as_json:
            print_json({job.id: job.log()})
        else:
            print(job.log(), end="")
        return
    found = llv.load(spec, set_ or ()).cell(cell)
    if as_json:
        print_json({str(path): path.read_text(errors="replace") for path in found.log_files})
    else:
        print(found.logs())


@app.command()
def path(spec: Spec, cell: MaybeCell = None, set_: Set = None, as_json: Json = False) -> None:
    """Print the folder of a cell's weights, model.safetensors alone; `export` writes what transformers loads."""
    found = llv.load(spec, set_ or ()).cell(cell)
    weights = found.weights_path
    if as_json:
        print_json({"cell": found.name, "id": found.id, "weights": str(weights), "exists": weights.exists()})
    elif not weights.exists():
        raise UsageError(
            f"cell {found.name} has no weights yet: {weights} does not exist; run the experiment first, or "
            f"{OTHER_STORAGE}"
        )
    else:
        print(weights)


@app.command()
def export(
    spec: Spec,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    cell: MaybeCell = None,
    set_: Set = None,
    as_json: Json = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="LoRA as a peft adapter beside its base's name; else it is merged.")
    ] = False,
) -> None:
    """Write a cell as a Hugging Face folder that transformers loads, its compressor recorded in llavolta.json."""
    found = llv.load(spec, set_ or ()).cell(cell)
    written = found.export(folder, adapter=adapter)
    if as_json:
        print_json({"cell": found.name, "id": found.id, "folder": str(written), "adapter": adapter})
    else:
        print(written)


@app.command()
def predictions(
    spec: Spec,
    cell: MaybeCell = None,
    set_: Set = None,
    as_json: Json = False,
    evaluation: Annotated[
        str | None, typer.Option("--evaluation", metavar="NAME", help="Entry under `evaluate` (default: the only one).")
    ] = None,
    under: Annotated[
        str | None, typer.Option("--under", metavar="VARIANT", help="What it was tested under (default: final).")
    ] = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="Only what was answered wrong.")] = False,
    form: Annotated[
        Literal["jsonl", "html"], typer.Option("--format", help="A line for each answer, or a page of pictures.")
    ] = "jsonl",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="The first N (default: all; in HTML 200).")
    ] = None,
    output: Output = None,
) -> None:
    """Print every answer of an evaluation beside the question, the paths of the pictures and the right answer."""
    document = llv.load(spec, set_ or ()).cell(cell).predictions(evaluation, under=under, wrong=wrong)
    if as_json:
        print_json({**document, "predictions": document["predictions"][:limit]})
    elif form == "html":
        write_document(document.to_html(**({} if limit is None else {"limit": limit})), output)
    else:
        lines = (json.dumps(each, ensure_ascii=False) for each in document["predictions"][:limit])
        write_document("".join(f"{line}\n" for line in lines), output)


@app.command()
def bench(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    text_tokens: Annotated[int, typer.Option("--text-tokens", min=1, metavar="N", help="Text tokens a sample.")] = 64,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, metavar="N", help="Samples of the micro-batch (default: the phase's)."),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=7, metavar="N", help="Rounds of the medians.")] = 7,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.png", help="The chart (default: in the storage).")
    ] = None,
) -> None:
    """Measure the step time of each variant on this machine, beside the limit of the cost formula."""

    def announce(number: int) -> None:
        print(f"round {number} of {repeats}" if number else "warming up", file=sys.stderr, flush=True)

    experiment = llv.load(spec, set_ or ())
    document = experiment.bench(text_tokens=text_tokens, rows=rows, repeats=repeats, chart=output, on_round=announce)
    show_document(document, as_json)
    if as_json:
        return
    figures = experiment.storage.folder / "bench" / f"{experiment.name}.json"
    print(f"chart: {output or figures.with_suffix('.png')}\nall figures: {figures}")


@app.command()
def compressors(as_json: Json = False) -> None:
    """List the compressors, their parameters and where they can act."""
    show_document(llv.compressors(), as_json)


@app.command()
def schema(as_json: Json = True) -> None:
    """Print the JSON Schema of an experiment file, for an editor's completion; JSON with and without --json."""
    print_json(llv.experiment_schema())


@app.command()
def show(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    resolved: Annotated[bool, typer.Option("--resolved", help="Defaults filled in, and where each came from.")] = False,
) -> None:
    """Show the experiment as it is understood: defaults filled in, names resolved."""
    experiment = llv.load(spec, set_ or ())
    if as_json:
        print_json({"spec": experiment.spec.model_dump(mode="json"), "sources": dict(experiment.loaded.sources)})
    else:
        print(experiment.to_yaml(sources=resolved), end="")


@app.command()
def components(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="[KIND]", help="One kind (average_pool), or one sort (schedules); by default all."),
    ] = None,
    plugin: Plugins = None,
    spec: Annotated[
        Path | None, typer.Option("--spec", metavar="SPEC", help="Include the plug-ins of an experiment file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List every compressor, schedule, data kind and evaluation with its fields, types and defaults."""
    if spec is not None:
        llv.load(spec)
    show_document(llv.components(kind, plugins=plugin or ()), as_json)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE.py", help="A plug-in file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KIND.FIELD=VALUE", help="A field's value, where the kit needs one."),
    ] = None,
    family: Annotated[
        list[str] | None,
        typer.Option("--family", metavar="NAME", help="Check compressors on these model families only; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the contract kit on every component that a plug-in file defines; exit code 1 if one breaks its contract."""

    def print_checked(one: Checked) -> None:
        if as_json:
            return
        print(f"{one.sort} {one.kind}: {'broken' if one.broken else 'holds'}")
        for line in (*one.broken, *one.report):
            print(f"  {line}")

    results = llv.check_file(file, _values(set_ or ()), family, on_checked=print_checked)
    if as_json:
        print_json([{**vars(one), "holds": not one.broken} for one in results])
    if any(one.broken for one in results):
        raise typer.Exit(1)


def _values(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return values by kind and field of `KIND.FIELD=VALUE`, values as YAML."""
    import yaml

    found: dict[str, dict[str, Any]] = {}
    for setting in settings:
        path, equals, value = setting.partition("=")
        kind, dot, name = path.partition(".")
        if not (equals and dot and kind and name):
            raise UsageError(f"--set {setting}: write KIND.FIELD=VALUE, e.g. my_rows.data_path=rows.json")
        found.setdefault(kind, {})[name] = yaml.safe_load(value)
    return found


@data_app.command("check")
def check_data(spec: Spec, set_: Set = None, as_json: Json = False) -> None:
    """Read every row and picture: all errors by row, and lengths as the model gets them; exit code 1 for errors."""
    document = llv.load(spec, set_ or ()).data_report()
    show_document(document, as_json)
    raise typer.Exit(0 if document["valid"] else 1)


@data_app.command("show")
def show_data(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    row: Annotated[
        int | None, typer.Option("--row", min=0, metavar="N", help="Its index in its file (default: the first).")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--data", metavar="NAME", help="Entry under `data` (default: what is trained on).")
    ] = None,
    form: Annotated[Literal["text", "html"], typer.Option("--format", help="For a terminal, or a page.")] = "text",
    output: Output = None,
) -> None:
    """Show one row as the model gets it: prompt, what of it is learned, tokens, lengths, pictures."""
    document = llv.load(spec, set_ or ()).data_row(row, name=name)
    if as_json:
        print_json(document)
    else:
        write_document(document.to_html() if form == "html" else document.to_text(), output)


@ledger_app.command()
def ls(spec: MaybeSpec = None, storage: Place = None, set_: Set = None, as_json: Json = False) -> None:
    """List states, evaluations, failures and running work: size, age, and the experiments that reach them."""
    show_document(_storage(spec, storage, set_).ls(), as_json)


@ledger_app.command()
def verify(
    spec: MaybeSpec = None,
    storage: Place = None,
    set_: Set = None,
    as_json: Json = False,
    discard: Annotated[bool, typer.Option("--discard", help="Removes what is damaged: `run` does it again.")] = False,
) -> None:
    """Read every byte of states, in-stage checkpoints and evaluations; exit code 1 if anything is damaged."""
    stored = _storage(spec, storage, set_)
    found = stored.verify(discard=discard)
    if as_json:
        print_json({"storage": stored.url, "damaged": found, "discarded": discard})
        raise typer.Exit(1 if found else 0)
    for entry in found:
        step = f" step {entry['step']}" if "step" in entry else ""
        print(f"damaged {entry['kind']} {entry['id']}{step}: {', '.join(entry['files'])}")
    if not found:
        print(f"{stored.url}: everything is intact")
    elif discard:
        print("removed; the next run of the experiment does it again")
    else:
        print("`llavolta ledger verify --discard` removes it, so that the next run does it again")
    raise typer.Exit(1 if found else 0)


@ledger_app.command()
def gc(
    spec: MaybeSpec = None,
    storage: Place = None,
    set_: Set = None,
    as_json: Json = False,
    delete: Annotated[bool, typer.Option("--delete", help="Deletes it; without, it is only listed.")] = False,
    forget: Annotated[
        list[str] | None,
        typer.Option("--forget", metavar="EXPERIMENT", help="A recorded experiment that no longer counts."),
    ] = None,
) -> None:
    """Delete what no recorded experiment reaches and what dead processes left behind; SPEC counts as recorded."""
    show_document(_storage(spec, storage, set_).gc(delete=delete, forget=forget or ()), as_json)


def _storage(spec: Path | None, place: str | None, overrides: list[str] | None) -> llv.Storage:
    if spec is None:
        return llv.Storage(place)
    if place is not None:
        raise UsageError("give SPEC or --storage, not both")
    return llv.load(spec, overrides or ()).storage


_document_stream: TextIO | None = None


def keep_output_for_json() -> None:
    """Keep standard output for the JSON document alone: whatever else is printed goes to standard error.

    Frameworks print from C++, child processes and at exit, so the file descriptor is moved, for good.
    """
    global _document_stream
    if _document_stream is not None:
        return
    sys.stdout.flush()
    _document_stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


class _Unread:
    """A stream that takes what is printed also when it can no longer be written, and says so on standard error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # what the stream still holds must go somewhere at exit
        os.close(nowhere)
        print(f"note: what follows is not printed: {error.strerror}", file=sys.stderr)


def keep_working_unread() -> None:
    """Go on where what is printed can no longer be written: Ctrl-C also ends the `tee` of `llavolta run SPEC | tee`, a
    terminal may be closed, and what trains has to stop at a checkpoint.
    """
    global _document_stream
    sys.stdout, sys.stderr = cast(TextIO, _Unread(sys.stdout)), cast(TextIO, _Unread(sys.stderr))
    _document_stream = None if _document_stream is None else cast(TextIO, _Unread(_document_stream))


def print_json(document: Any) -> None:
    """Print one JSON document to standard output, on one line; what JSON has no number for (NaN, infinity) is null.

    Indented, 10,000 cells take Python's own encoder, and with it twice as long to plan.
    """
    try:
        text = json.dumps(document, default=str, allow_nan=False)
    except ValueError:
        from orchestrator.report.documents import finite

        text = json.dumps(finite(document), default=str)
    print_document(text)


def show_document(document: Document | Documents, as_json: bool) -> None:
    """Print a document as JSON, or as people read it."""
    if as_json:
        print_json(document)
    else:
        document.print(terminal())


def print_document(text: str) -> None:
    """Write a document to standard output, past whatever prints there."""
    print(text, file=_document_stream or sys.stdout, flush=True)


def write_document(text: str, file: Path | None) -> None:
    """Write a document, which ends in a line end, to a file or to standard output."""
    if file is None:
        print(text, end="", flush=True)
    else:
        file.write_text(text, encoding="utf-8")


def terminal(*, error: bool = False) -> Console:
    """Return standard output for people; where it is no terminal, as wide as $COLUMNS says, else 200.

    Args:
        error: Return standard error instead, where standard output is kept for a JSON document.
    """
    from rich.console import Console

    if error:
        return Console(stderr=True)
    has_width = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(soft_wrap=not has_width, width=None if has_width else 200)


def warn_unsent(cells: Sequence[str], problem: str | None, notes: Sequence[str] = ()) -> None:
    """Say on standard error which cells MLflow has not recorded, and why; nothing where there is no problem."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if problem:
        print(
            f"MLflow has not recorded {', '.join(cells)}: {problem}\n"
            "nothing is lost: run the same command when the server is up",
            file=sys.stderr,
        )


def main() -> None:
    """Run the command line; every error is one block and an exit code."""
    _open_closed_streams()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    as_json = "--json" in arguments and not {"-h", "--help"} & set(arguments)
    if as_json:
        keep_output_for_json()
    if arguments[:1] in (["run"], ["evaluate"], ["search"]):
        keep_working_unread()
    try:
        with ended_by_signals():
            code = app(arguments, standalone_mode=False)
    except LlavoltaError as error:
        code, details = error.exit_code, error.errors if isinstance(error, SpecError) else ()
        heading = f"{len(details)} error{'s' if len(details) != 1 else ''}:\n" if details else "error: "
        _print_error(str(error), f"{heading}{error}", as_json, details)
        _print_traceback(debug)
    except KeyboardInterrupt:
        code, text = 130, "stopped now; finished work is kept, run the same command to resume"
        _print_error(text, text, as_json)
    except BrokenPipeError:
        code = 0
    except OSError as error:
        code, where = 1, shorten(redacted(str(error.filename or "the storage or the output")), 300)
        text = f"{where}: {error.strerror or error}"
        _print_error(text, f"error: {text}", as_json)
        _print_traceback(debug)
    except typer.Abort:
        code = 130
    except Exception as error:
        # click's own errors (a missing argument, an unknown option) know how to show themselves.
        if hasattr(error, "show"):
            code, shown = getattr(error, "exit_code", 2), io.StringIO()
            error.show(shown)
            text = error.format_message() if hasattr(error, "format_message") else str(error)
            _print_error(text, shown.getvalue().removesuffix("\n"), as_json)
            _print_traceback(debug)
        else:
            code = 1
            if as_json:
                _print_error(f"{type(error).__name__}: {error}", "", as_json)
            _print_traceback(True)
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _open_closed_streams() -> None:
    """Open what the caller has closed of the standard streams (`>&-`): else a file of the storage takes its number, and
    libraries print into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")


def _print_traceback(debug: bool) -> None:
    """Print the traceback of the current error; what libraries quote in it (addresses, headers) without its secrets."""
    if debug:
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)


def _print_error(text: str, shown: str, as_json: bool, details: Sequence[ErrorDetail] = ()) -> None:
    """Print an error: its text as the JSON document, or what people read of it on standard error."""
    if as_json:
        print_json({"error": redacted(text), "faults": [vars(each) for each in details]})
    else:
        print(redacted(shown), file=sys.stderr)
