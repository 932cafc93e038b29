"""`python -m orchestrator.compression.testing KIND...` proves compressors; `--table FILE` renews the table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from orchestrator.compression.testing import check_compressor
from orchestrator.compression.testing.families import TINY
from orchestrator.compression.testing.table import all_cells, write
from orchestrator.errors import UsageError


def main() -> int:
    """Exit status 0 where all holds, 1 where something does not, 2 for a wrong command."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.compression.testing", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="registered compressors")
    parser.add_argument("--families", nargs="+", choices=sorted(TINY), help="by default all")
    parser.add_argument("--table", type=Path, metavar="FILE", help="run all and write the table between its markers")
    arguments = parser.parse_args()
    if arguments.table is None and not arguments.kinds:
        parser.error("name a KIND, or --table FILE")
    failed = False
    for kind in arguments.kinds:
        try:
            print(f"{kind}\n  " + str(check_compressor({"kind": kind}, arguments.families)).replace("\n", "\n  "))
        except AssertionError as error:
            failed = True
            print(f"{kind}\n  {error}")
        except UsageError as error:
            parser.error(str(error))
    if arguments.table is not None:
        cells = all_cells(lambda line: print(line, flush=True))
        write(arguments.table, cells)
        failed = failed or any(result.startswith("failed") for row in cells.values() for result in row.values())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
