"""The model's own tokenizer and image processor behind one small face: text to ids, images to pixels and counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from orchestrator.data.bounded_cache import BoundedCache
from orchestrator.data.rows import ImageRef
from orchestrator.data.templates import ChatFormat
from orchestrator.errors import DataError, UsageError
from orchestrator.spec.model import ModelSpec

PIXEL_CACHE_BYTES = 512 * 2**20
IMAGE_THREADS = 4
_MARKS_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Any two differ in every way an image processor may care about.
_PROBE_SIZES = ((336, 336), (100, 700), (1500, 1000))


@dataclass(frozen=True)
class TokenizedText:
    """Ids of a text and the characters `[first, last)` each came from; (0, 0) for a token that was added."""

    ids: np.ndarray
    offsets: np.ndarray


class VisionTextProcessor:
    """A Hugging Face processor of an image-text-to-text model.

    Args:
        processor: What `AutoProcessor` gives.
        config: The model's config; fills in what older processor folders leave out.
    """

    def __init__(self, processor: Any, config: Any = None) -> None:
        self.processor, self.tokenizer = processor, getattr(processor, "tokenizer", processor)
        if not getattr(self.tokenizer, "is_fast", False):
            raise UsageError(
                f"model: the tokenizer {type(self.tokenizer).__name__} tells no character positions, which the loss on "
                "answers needs; use a folder with a tokenizer.json"
            )
        self._config = config
        self._fill_in(config)
        self._pixels: BoundedCache[dict[str, torch.Tensor]] = BoundedCache(PIXEL_CACHE_BYTES)

    def _fill_in(self, config: Any) -> None:
        """Processor folders from before transformers 4.45 do not say the patch size."""
        if getattr(self.processor, "patch_size", 0) is None and config is not None:
            self.processor.patch_size = config.vision_config.patch_size
            self.processor.vision_feature_select_strategy = config.vision_feature_select_strategy
            self.processor.num_additional_image_tokens = 1

    @property
    def pad_token_id(self) -> int:
        """Padding's id; the end token's where the tokenizer has no padding (masked either way)."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @cached_property
    def image_token(self) -> str:
        """Placeholder of one image in a text."""
        return str(getattr(self.processor, "image_token", "<image>"))

    @cached_property
    def image_token_id(self) -> int:
        """Id that stands once for every visual token."""
        return int(self.tokenizer.convert_tokens_to_ids(self.image_token))

    @cached_property
    def chat(self) -> ChatFormat:
        """What templates need."""
        template = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        marked = isinstance(template, str) and _MARKS_GENERATION.search(template)

        def render(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
            if template is None:
                raise DataError("conversation_template: the model has no chat template; set it to vicuna_v1 or plain")
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )

        def render_marked(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
            from transformers.utils.chat_template_utils import render_jinja_template

            texts, ranges = render_jinja_template(
                conversations=[list(messages)],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
            return texts[0], [(int(first), int(last)) for first, last in ranges[0]]

        return ChatFormat(self.image_token, self.tokenizer.eos_token, render, render_marked if marked else None)

    def tokenize(self, text: str) -> TokenizedText:
        """Ids of a text, with the tokenizer's own first token unless the text brings it."""
        bos = self.tokenizer.bos_token
        encoded = self.tokenizer(
            text,
            add_special_tokens=not (bos and text.startswith(bos)),
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        ids = np.asarray(encoded["input_ids"], dtype=np.int64)
        # Some tokenizers add an end token too; an answer ends where its template says so.
        if ids.size and ids[-1] == self.tokenizer.eos_token_id and not offsets[-1].any():
            ids, offsets = ids[:-1], offsets[:-1]
        return TokenizedText(ids, offsets)

    @cached_property
    def fixed_image_tokens(self) -> int | None:
        """Visual tokens of any image, where all images give the same number; else None."""
        counts = {self._count(size) for size in _PROBE_SIZES}
        return counts.pop() if len(counts) == 1 else None

    def image_tokens(self, image: ImageRef) -> int:
        """Visual tokens of one image.

        Raises:
            DataError: the image cannot be opened.
        """
        if self.fixed_image_tokens is not None:
            return self.fixed_image_tokens
        try:
            with Image.open(image.path) as opened:
                return self._count((opened.height, opened.width))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{image.path} cannot be opened: {error}") from error

    def _count(self, size_hw: tuple[int, int]) -> int:
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if count is not None:
            return int(count([size_hw]).num_image_tokens[0])
        length = getattr(self.processor, "image_seq_length", None) or getattr(self._config, "image_seq_length", None)
        if length is None:
            raise UsageError(f"model: {type(self.processor).__name__} does not tell how many tokens an image takes")
        return int(length)

    def pixels(self, images: Sequence[ImageRef]) -> dict[str, torch.Tensor]:
        """The model's image inputs, images in order along the first axis; empty without images.

        Raises:
            DataError: an image cannot be read; it is never replaced by another.
        """
        if not images:
            return {}
        known: dict[str, dict[str, torch.Tensor]] = {}
        for path in dict.fromkeys(image.path for image in images):
            cached = self._pixels.get(path)
            if cached is not None:
                known[path] = cached
        missing = [path for path in dict.fromkeys(image.path for image in images) if path not in known]
        known.update(zip(missing, self._process(missing), strict=True))
        parts = [known[image.path] for image in images]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _process(self, paths: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        if not paths:
            return []
        if len(paths) == 1:
            return [self._process_one(paths[0])]
        # PIL and numpy let go of the interpreter's lock while they decode and scale.
        with ThreadPoolExecutor(max_workers=IMAGE_THREADS) as pool:
            return list(pool.map(self._process_one, paths))

    def _process_one(self, path: str) -> dict[str, torch.Tensor]:
        try:
            with Image.open(path) as opened:
                found = self.processor.image_processor(images=[opened.convert("RGB")], return_tensors="pt")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read: {error}; restore the file, or check the data set") from error
        tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        self._pixels.put(path, tensors, sum(value.nbytes for value in tensors.values()))
        return tensors

    def blank_image(self) -> dict[str, torch.Tensor]:
        """Image inputs of one grey image, for a rank that must run the vision tower without having an image."""
        grey = Image.new("RGB", (64, 64), (127, 127, 127))
        found = self.processor.image_processor(images=[grey], return_tensors="pt")
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def load_processor(model: ModelSpec) -> VisionTextProcessor:
    """Tokenizer and image processor of a model.

    Raises:
        UsageError: the folder or hub entry has none, or the tokenizer is too old.
    """
    from transformers import AutoConfig, AutoProcessor

    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        processor = AutoProcessor.from_pretrained(model.model_name_or_path, **options)
        config = AutoConfig.from_pretrained(model.model_name_or_path, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UsageError(
            f"model: no processor in {model.model_name_or_path}: {reason}; "
            "it needs config.json, tokenizer.json and a processor or preprocessor config"
        ) from error
    return VisionTextProcessor(processor, config)
