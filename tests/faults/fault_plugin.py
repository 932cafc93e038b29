"""A plug-in that breaks something at an exact point of a training, once: what LLAVOLTA_FAULT says.

`ACTION POINT COUNT FOLDER`: at the COUNT-th time that a worker's process comes to POINT (`optimizer`: an update begins;
`checkpoint`: half of a checkpoint's file is written), ACTION happens (`kill` or `stop` of this worker, or
`kill:NAME` of the processes called so that were started by the same test). FOLDER remembers that it did.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import psutil

from orchestrator.spec.components import CompressorSpec


class UnusedSpec(CompressorSpec):
    """A plug-in must bring a component; nobody uses this one."""

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.average_pool:AveragePool"
    points: ClassVar[tuple[str, ...]] = ("decoder",)

    kind: Literal["fault_unused"] = "fault_unused"


def once(folder: str) -> bool:
    """True for the first caller, over all processes."""
    try:
        os.close(os.open(Path(folder) / "fault-happened", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def act(action: str) -> None:
    """Does the harm."""
    name = action.partition(":")[2]
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    for process in psutil.process_iter() if name else ():
        try:
            ours = process.environ().get("LLAVOLTA_TEST") == os.environ["LLAVOLTA_TEST"]
            if ours and (name in process.name() or name in " ".join(process.cmdline())):
                process.kill()
        except psutil.Error:
            continue


def inject(action: str, point: str, count: int, folder: str) -> None:
    """Puts the fault in its place in this process."""
    import torch

    calls = [0]

    def is_due() -> bool:
        calls[0] += 1
        return calls[0] == count and once(folder)

    if point == "optimizer":
        step = torch.optim.AdamW.step

        def broken_step(*arguments: Any, **options: Any) -> Any:
            if is_due():
                act(action)
            return step(*arguments, **options)

        torch.optim.AdamW.step = broken_step
    if point == "checkpoint":
        torch.save = _half(torch.save, is_due, action)


def _half(save: Callable[..., None], is_due: Callable[[], bool], action: str) -> Callable[..., None]:
    def broken_save(content: Any, file: Any, *arguments: Any, **options: Any) -> None:
        if not isinstance(file, io.IOBase) and is_due():
            whole = io.BytesIO()
            save(content, whole, *arguments, **options)
            Path(file).write_bytes(whole.getvalue()[: whole.tell() // 2])
            act(action)
        save(content, file, *arguments, **options)

    return broken_save


if "LLAVOLTA_FAULT" in os.environ:
    _action, _point, _count, _folder = os.environ["LLAVOLTA_FAULT"].split(" ", 3)
    inject(_action, _point, int(_count), _folder)
