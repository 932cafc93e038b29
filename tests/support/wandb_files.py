"""Reads the files of offline runs of Weights & Biases, in the log format of LevelDB."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK = 7, 32768
_WHOLE, _LAST = 1, 4  # sorts of parts of a record


def records(file: Path) -> Iterator[Any]:
    """Yields the messages of a run, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, content = file.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(data):
        if (left := _BLOCK - at % _BLOCK) < _HEADER:
            at += left
            continue
        _, size, sort = struct.unpack("<IHB", data[at : at + _HEADER])
        content += data[at + _HEADER : at + _HEADER + size]
        at += _HEADER + size
        if sort in (_WHOLE, _LAST):
            yield Record.FromString(content)
            content = b""


def run_of(files: list[Path]) -> dict[str, Any]:
    """What the files of one run say together: id, name, config, rows of the history, summary, exit code."""
    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}}
    for record in (record for file in files for record in records(file)):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"id": record.run.run_id, "name": record.run.display_name, "project": record.run.project}
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            row = {_key(item): json.loads(item.value_json) for item in record.history.item}
            found["history"].append({key: value for key, value in row.items() if key not in ("_step", "_runtime")})
        elif kind == "summary":
            found["summary"] |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)
