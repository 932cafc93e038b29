"""The text of models that read a prefix both ways and write a suffix after it, and have no chat template: PaliGemma.

Source: `PaliGemmaProcessor.prepare_inputs_layout` and `__call__` in transformers; PaliGemma (arXiv 2407.07726),
section 3.2: images, begin token, prefix, a line end, suffix, end token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import DataError


def takes_suffix(processor: Any) -> bool:
    """Return whether a processor's call has a `suffix`."""
    return "suffix" in inspect.signature(type(processor).__call__).parameters


@dataclass(frozen=True)
class PrefixSuffix:
    """Stands in for a chat template.

    Attributes:
        image_token: Placeholder of one image.
        bos_token: Comes after the images.
        eos_token: Ends the suffix.
    """

    image_token: str
    bos_token: str
    eos_token: str

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """Return the text, up to where the suffix begins if there is no answer."""
        return self.render_marked(messages)[0]

    def render_marked(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text and where the answer is.

        Raises:
            DataError: it is more than one question and one answer.
        """
        roles = [message["role"] for message in messages]
        if roles not in (["user"], ["user", "assistant"]):
            raise DataError(
                f"this model reads one question and writes one answer, not {len(roles)} turns; take such rows out, or "
                "give its processor a chat template"
            )
        parts = messages[0]["content"]
        images = self.image_token * sum(part["type"] == "image" for part in parts)
        question = " ".join(part["text"] for part in parts if part["type"] == "text")
        text = f"{images}{self.bos_token}{question}\n"
        if len(messages) == 1:
            return text, []
        answer = "".join(part["text"] for part in messages[1]["content"])
        return f"{text}{answer}{self.eos_token}", [(len(text), len(text) + len(answer) + len(self.eos_token))]
