"""Check every image-text-to-text type of transformers on a tiny random model, and write the table of docs.

    python tests/model_types.py [TYPE ...] [--again] [--seconds 240]

Types with an adapter are proven by the contract kit (`tests/compression`); every other one goes through the self-check
of `attach`, in a process of its own with a time limit. Results are kept in `docs/reference/model_types.json`, so that
an interrupted run goes on; `--again` checks anew what is there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "models.md"
RESULTS = PAGE.with_name("model_types.json")

# What the defaults of a config class leave out or get wrong, and every published config says.
AXES = {name: [8, 12, 12] for name in ("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga")}
AXES["paddleocr_vl"] = [16, 24, 24]
SIZES = {"aya_vision": 364, "qianfan_ocr": 448}


def types() -> list[str]:
    """The types that `AutoModelForImageTextToText` knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def built(model_type: str):
    """A model of a type's default config, on the meta device; a small one where the default cannot be built."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from orchestrator.compression.shrink_config import shrunk_config

    config = AutoConfig.for_model(model_type)
    if model_type in AXES:
        text = config.get_text_config()
        text.rope_parameters = {**(text.rope_parameters or {}), "mrope_section": AXES[model_type]}
    if model_type in SIZES:
        config.vision_config.image_size = SIZES[model_type]
    with torch.device("meta"):
        try:
            return AutoModelForImageTextToText.from_config(config)
        except Exception:
            return AutoModelForImageTextToText.from_config(shrunk_config(config, 4))


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def check(model_type: str) -> dict[str, str]:
    """What a type shows: `adapter`, or each check of the self-check, or `refused` with the reason."""
    import torch

    from orchestrator.compression.families import FAMILIES, family_of
    from orchestrator.compression.testing.self_check import REQUIRED, self_check
    from orchestrator.errors import UsageError

    if model_type in FAMILIES:
        return {"adapter": FAMILIES[model_type].partition(":")[2]}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        model = built(model_type)
    except Exception as error:
        return {"not_built": said(error)}
    try:
        family = family_of(model)
    except UsageError as error:
        return {"refused": str(error).removeprefix("attach: ")}
    if family.proven:
        return {"adapter": type(family).__name__}
    found = self_check(model)
    failed = [name for name in REQUIRED if found[name] != "proven"]
    return found | ({"refused": f"{failed[0]}: {found[failed[0]]}"} if failed else {})


def _into(model_type: str, sender) -> None:
    try:
        sender.send(check(model_type))
    except BaseException as error:
        sender.send({"not_built": said(error)})


def check_apart(model_type: str, seconds: float) -> dict[str, str]:
    """The same in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_into, args=(model_type, sender))
    process.start()
    sender.close()
    try:
        found = (
            receiver.recv() if receiver.poll(seconds) else {"not_built": f"the check took more than {seconds:.0f} s"}
        )
    except EOFError:
        process.join()
        found = {"not_built": f"the process ended with {process.exitcode}"}
    process.kill()
    process.join()
    return found


COLUMNS = ("identity", "boundaries", "reference", "generation", "selection", "video")
BEGIN, END = "<!-- types -->", "<!-- end of types -->"


def table(known: dict[str, dict[str, str]]) -> str:
    """The results in Markdown, the reasons below."""
    lines = ["| `model_type` | " + " | ".join(COLUMNS) + " | |", "|---" * (len(COLUMNS) + 2) + "|"]
    reasons: dict[str, int] = {}

    def number(reason: str) -> str:
        return f"({reasons.setdefault(reason.replace('|', '/').replace('<', '‹'), len(reasons) + 1)})"

    for name, found in known.items():
        if "adapter" in found:
            cells = ["✓"] * 5 + [" ", f"adapter `{found['adapter']}`, proven by the contract kit"]
        elif "not_built" in found:
            cells = [" "] * 6 + [f"not tried {number(found['not_built'])}"]
        elif "refused" in found:
            cells = [" "] * 6 + [f"refused at `attach` {number(found['refused'])}"]
        else:
            cells = ["✓" if found[one] == "proven" else f"– {number(found[one])}" for one in COLUMNS] + ["proven"]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{place}. {reason}" for reason, place in reasons.items())])


def write_table(known: dict[str, dict[str, str]]) -> None:
    """Put the table between its marks in docs/reference/models.md."""
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{before}\n{table(known)}\n{after}")


def main() -> None:
    """Run the checks that are missing."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--seconds", type=float, default=240)
    asked = parser.parse_args()
    import orchestrator.compression.testing.self_check  # noqa: F401  # imported once, for all forks

    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for model_type in asked.types or types():
        if model_type in known and not asked.again:
            continue
        known[model_type] = check_apart(model_type, asked.seconds)
        short = known[model_type].get("refused") or known[model_type].get("not_built") or known[model_type]
        print(model_type, short, flush=True)
        part = RESULTS.with_suffix(".part")
        part.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        part.replace(RESULTS)
    write_table(known)


if __name__ == "__main__":
    main()
