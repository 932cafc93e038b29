"""`llavolta`: the verbs, their errors as one block, their exit codes. Heavy imports stay inside the verbs that work."""

from __future__ import annotations

import io
import sys
import traceback

import typer

from orchestrator.dispatch.stop import ended_by_signals
from orchestrator.errors import LlavoltaError, SpecError
from orchestrator.redaction import redacted
from orchestrator.verbs import ledger, look, search, spec, work
from orchestrator.verbs.options import print_json

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
    spec.validate, look.plan, work.run, search.search, look.status, look.table, look.logs, look.path, work.bench,
    spec.compressors, spec.schema, spec.show,
):  # fmt: skip
    app.command()(verb)
app.add_typer(ledger.app, name="ledger")


def main() -> None:
    """Entry point: tells every error as one block and turns it into the exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        with ended_by_signals():
            code = app(arguments, standalone_mode=False)
    except LlavoltaError as error:
        code = error.exit_code
        if debug:
            _tell_all()
        else:
            _tell(error, as_json="--json" in arguments)
    except KeyboardInterrupt:
        code = 130
        print("stopped now; finished work is kept, run the same command to go on", file=sys.stderr)
    except BrokenPipeError:
        code = 0
    except OSError as error:
        code = 1
        if debug:
            _tell_all()
        else:
            text = f"error: {error.filename or 'the storage'}: {error.strerror or error}"
            print(redacted(text), file=sys.stderr)
    except typer.Abort:
        code = 130
    except Exception as error:
        # click's own errors (a missing argument, an unknown option) know how to show themselves.
        if debug or not hasattr(error, "show"):
            _tell_all()
            code = 1
        else:
            shown = io.StringIO()
            error.show(shown)
            print(redacted(shown.getvalue()), end="", file=sys.stderr)
            code = getattr(error, "exit_code", 2)
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _tell_all() -> None:
    """The traceback of the error at hand; what libraries quote in it (addresses, headers) without its secrets."""
    print(redacted(traceback.format_exc()), end="", file=sys.stderr)


def _tell(error: LlavoltaError, *, as_json: bool) -> None:
    faults = error.faults if isinstance(error, SpecError) else ()
    if as_json:
        print_json({"error": str(error), "faults": [vars(fault) for fault in faults]})
    elif faults:
        print(f"{len(faults)} fault{'s' if len(faults) != 1 else ''}:\n{error}", file=sys.stderr)
    else:
        print(f"error: {error}", file=sys.stderr)
