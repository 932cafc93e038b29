"""Definitions that the published package of lmms-eval 0.7.2 lacks, for the tasks of `llavolta13`.

On PyPI it has no file whose name does not end in `.yaml`: the `_default_template*_yaml` that 755 of its tasks include.
These stand in for seven of them. Data sets, functions and metrics are lmms-eval's; the questions are asked in LLaVA's
words (haotian-liu/LLaVA, its page on evaluation), answers are greedy, at most 128 tokens (`model_vqa_loader.py`), for
MMBench 1024 (`model_vqa_mmbench.py`). Where the installed package has the file, it is used.
"""

from __future__ import annotations

import json
from typing import Any

VERSION = 1
"""Raised when a definition changes; part of the record of what was evaluated by one."""

_SHORT = "\nAnswer the question using a single word or phrase."
_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
_LETTER = "Answer with the option's letter from the given choices directly."
_LETTER_CN = "请直接回答选项字母。"


def _definition(data: str, functions: str, prompt: str, target: str, max_new_tokens: int = 128, **more: Any) -> str:
    """Return a definition as YAML; JSON is YAML, but for the references to functions.

    Args:
        data: The data set's hub id.
        functions: What stands before the names of the functions: `MODULE.PREFIX`.
        prompt: What follows the question.
        target: Field with the right answer.
        max_new_tokens: Longest answer in tokens.
        more: Further keys.
    """
    generation = {"max_new_tokens": max_new_tokens, "do_sample": False, "temperature": 0, "num_beams": 1}
    keys = {
        "dataset_path": data, "output_type": "generate_until", "doc_to_target": target, "generation_kwargs": generation,
        "lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": prompt}}, **more,
    }  # fmt: skip
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]
    lines += [f"{key}: !function {functions}_{key}" for key in ("doc_to_visual", "doc_to_text", "process_results")]
    return "\n".join(lines) + "\n"


TEMPLATES = {
    "textvqa/_default_template_textvqa_yaml": _definition(
        "lmms-lab/textvqa", "utils.textvqa", _SHORT, "answers"
    ),
    "vqav2/_default_template_vqav2_yaml": _definition("lmms-lab/VQAv2", "utils.vqav2", _SHORT, "answers"),
    "vizwiz_vqa/_default_template_vqa_yaml": _definition(
        "lmms-lab/VizWiz-VQA", "utils.vizwiz_vqa", _UNANSWERABLE + _SHORT, "answers"
    ),
    "mmbench/_default_template_mmbench_en_yaml": _definition(
        "lmms-lab/MMBench", "en_utils.mmbench", _LETTER, "answer", 1024, dataset_name="en"
    ),
    "mmbench/_default_template_mmbench_cn_yaml": _definition(
        "lmms-lab/MMBench", "cn_utils.mmbench", _LETTER_CN, "answer", 1024, dataset_name="cn"
    ),
    "mmmu/_default_template_yaml": _definition(
        "lmms-lab/MMMU", "utils.mmmu", "", "answer", metadata={"version": 0.0, "interleaved_format": False}
    ),
}  # fmt: skip
"""File below lmms-eval's folder of tasks to its content."""
