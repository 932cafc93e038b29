"""`llavolta`: the verbs, their errors as one block, their exit codes. Heavy imports stay inside the verbs that work."""

from __future__ import annotations

import io
import sys
import traceback

import typer

from orchestrator.dispatch.signals import ended_by_signals
from orchestrator.errors import LlavoltaError, SpecError, shorten
from orchestrator.redaction import redacted
from orchestrator.verbs import components, data, init, inspect, ledger, results, run, spec
from orchestrator.verbs.options import keep_output_for_json, print_json

app = typer.Typer(
    name="llavolta",
    help="Experiments on stage-wise visual-token compression: a YAML file in, an efficiency-accuracy grid out.",
    epilog="Every verb takes --debug, which shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    init.init, spec.validate, inspect.plan, run.run, run.search, inspect.status, inspect.table, inspect.logs,
    inspect.path, results.export, results.predictions, run.bench, spec.compressors, spec.schema, spec.show,
    components.components, components.check,
):  # fmt: skip
    app.command()(verb)
app.add_typer(data.app, name="data")
app.add_typer(ledger.app, name="ledger")


def main() -> None:
    """Run the command line; every error is one block and an exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    as_json = "--json" in arguments and not {"-h", "--help"} & set(arguments)
    if as_json:
        keep_output_for_json()
    try:
        with ended_by_signals():
            code = app(arguments, standalone_mode=False)
    except LlavoltaError as error:
        code = error.exit_code
        _tell(error, as_json=as_json)
        _trace(debug)
    except KeyboardInterrupt:
        code = 130
        _say("stopped now; finished work is kept, run the same command to resume", as_json=as_json)
    except BrokenPipeError:
        code = 0
    except OSError as error:
        code = 1
        where = shorten(redacted(str(error.filename or "the storage")), 300)
        _say(f"error: {where}: {error.strerror or error}", as_json=as_json)
        _trace(debug)
    except typer.Abort:
        code = 130
    except Exception as error:
        # click's own errors (a missing argument, an unknown option) know how to show themselves.
        if not hasattr(error, "show"):
            if as_json:
                print_json({"error": redacted(f"{type(error).__name__}: {error}"), "faults": []})
            _trace(True)
            code = 1
        else:
            shown = io.StringIO()
            error.show(shown)
            if as_json:
                text = error.format_message() if hasattr(error, "format_message") else str(error)
                print_json({"error": redacted(text), "faults": []})
            print(redacted(shown.getvalue()), end="", file=sys.stderr)
            _trace(debug)
            code = getattr(error, "exit_code", 2)
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _trace(debug: bool) -> None:
    """Print the traceback of the current error; what libraries quote in it (addresses, headers) without its secrets."""
    if debug:
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)


def _say(text: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"error": redacted(text.removeprefix("error: ")), "faults": []})
    else:
        print(redacted(text), file=sys.stderr)


def _tell(error: LlavoltaError, *, as_json: bool) -> None:
    errors = error.errors if isinstance(error, SpecError) else ()
    if as_json:
        print_json({"error": str(error), "faults": [vars(each) for each in errors]})
    elif errors:
        print(f"{len(errors)} error{'s' if len(errors) != 1 else ''}:\n{error}", file=sys.stderr)
    else:
        print(f"error: {error}", file=sys.stderr)
