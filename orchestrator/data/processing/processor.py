"""A model's own tokenizer and processor behind one interface: text to ids, images and videos to pixels and counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.processing.images import Placeholders, RowImages
from orchestrator.data.processing.templates import ChatFormat, suffix_format, takes_suffix
from orchestrator.data.processing.video_processors import without_torchvision
from orchestrator.errors import DataError, UsageError
from orchestrator.spec.model import ModelSpec

_VIDEO = "video_processor"


def load_processor(model: ModelSpec, config_of: str | None = None) -> VisionTextProcessor:
    """Return the tokenizer and image processor of a model.

    Args:
        model: Where they are.
        config_of: Folder or hub id of the model's config, where it is not with them (an adapter's folder).

    Raises:
        UsageError: the folder or hub entry has none, the tokenizer is too old, or a package is missing.
    """
    from transformers import AutoConfig

    where = model.model_name_or_path
    config = None
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(config_of or where, **options)
        processor = _load(where, config, options)
    except ImportError as error:
        raise UsageError(
            f"model: the processor of {getattr(config, 'model_type', where)} needs a package that is not installed: "
            f"{' '.join(str(error).split())}"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UsageError(
            f"model: no processor in {where}: {reason}; "
            "it needs config.json, tokenizer.json and a processor or preprocessor config"
        ) from error
    return VisionTextProcessor(processor, config)


def _load(where: str | Path, config: Any, options: dict[str, Any]) -> Any:
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    known = PROCESSOR_MAPPING.get(type(config), None)
    if known is None or _VIDEO not in known.get_attributes() or is_torchvision_available():
        return AutoProcessor.from_pretrained(where, **options)
    return _without_torchvision(known, config.model_type, where, options)


def _without_torchvision(known: Any, model_type: str, where: str | Path, options: dict[str, Any]) -> Any:
    """Return a processor of this class whose video processor needs no torchvision, or which has none where the model
    type's is not known to do the same without.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    class Own(known):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == _VIDEO:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    Own.__name__ = known.__name__
    loaders = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    parts: dict[str, Any] = {
        name: loaders[name].from_pretrained(where, **options) for name in known.get_attributes() if name in loaders
    }
    parts[_VIDEO] = None
    if (videos := without_torchvision(model_type)) is not None:
        with suppress(OSError):  # a folder without its settings reads images alone
            parts[_VIDEO] = videos.from_pretrained(where, **options)
    settings, _ = known.get_processor_dict(where, **options)
    plain = {name: value for name, value in settings.items() if name not in (*parts, "processor_class", "auto_map")}
    return Own(**parts, **plain)


_MARKS_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class TokenizedText:
    """Ids of a text and the characters `[first, last)` of each; (0, 0) for a token that the tokenizer added."""

    ids: np.ndarray
    offsets: np.ndarray


class VisionTextProcessor:
    """A Hugging Face processor of an image-text-to-text model.

    Args:
        processor: The processor from `AutoProcessor`.
        config: The model's config; fills in what older processor folders lack.
    """

    def __init__(self, processor: Any, config: Any = None) -> None:
        self.processor, self.tokenizer = processor, getattr(processor, "tokenizer", processor)
        if not getattr(self.tokenizer, "is_fast", False):
            raise UsageError(
                f"model: the tokenizer {type(self.tokenizer).__name__} gives no character offsets, which the loss on "
                "answers needs; use a folder with a tokenizer.json"
            )
        if self.tokenizer.eos_token is None:
            raise UsageError(
                "model: the tokenizer names no eos_token, which ends every answer; its folder needs a "
                "tokenizer_config.json that does"
            )
        self._config = config
        self._fill_in(config)

    def _fill_in(self, config: Any) -> None:
        """Set the patch size, which processor folders from before transformers 4.45 lack."""
        if getattr(self.processor, "patch_size", 0) is None and config is not None:
            self.processor.patch_size = config.vision_config.patch_size
            self.processor.vision_feature_select_strategy = config.vision_feature_select_strategy
            self.processor.num_additional_image_tokens = 1

    @property
    def pad_token_id(self) -> int:
        """Id of the padding token, or of the end token if the tokenizer has none (masked either way)."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @cached_property
    def image_token(self) -> str:
        """Placeholder of one image in a text."""
        return str(getattr(self.processor, "image_token", "<image>"))

    @cached_property
    def image_token_id(self) -> int:
        """Id of a visual token's placeholder: the model's own, for which Gemma 3's processor has another name."""
        found = _token_id(self._config, "image")
        return int(self.tokenizer.convert_tokens_to_ids(self.image_token)) if found is None else found

    @cached_property
    def video_token(self) -> str | None:
        """Placeholder of one video in a text; None where the processor reads no videos, or has none of its own for
        them.
        """
        token = getattr(self.processor, "video_token", None)
        if getattr(self.processor, _VIDEO, None) is None or token in (None, self.image_token):
            return None
        return str(token)

    @property
    def placeholder_ids(self) -> list[int]:
        """Ids that the model takes for visual tokens, videos included; no answer may contain one."""
        return [self.image_token_id, *(id for id in [_token_id(self._config, "video")] if id is not None)]

    @cached_property
    def images(self) -> RowImages:
        """The image processor.

        Raises:
            UsageError: the processor reads no images, or the tokenizer does not know the model's placeholder id.
        """
        visual_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        if visual_token is None or not hasattr(self.processor, "image_processor"):
            raise UsageError(
                f"model: {type(self.processor).__name__} has no image processor, or no token for the model's "
                f"placeholder id {self.image_token_id}; use a folder with a processor or preprocessor config"
            )
        images, video_id = Placeholders(self.image_token, visual_token), _token_id(self._config, "video")
        if self.video_token is None or video_id is None:
            return RowImages(self.processor, images)
        written = self.tokenizer.convert_ids_to_tokens(video_id)
        return RowImages(self.processor, images, Placeholders(self.video_token, written))

    @cached_property
    def chat(self) -> ChatFormat:
        """The chat format for templates."""
        template = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        if template is None and takes_suffix(self.processor):
            return suffix_format(self.image_token, self.tokenizer.bos_token, self.tokenizer.eos_token)
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

        return ChatFormat(
            self.image_token, self.tokenizer.eos_token, render, render_marked if marked else None, self.video_token
        )

    def tokenize(self, text: str) -> TokenizedText:
        """Return the ids of a text, with the tokenizer's first token unless the text begins with it."""
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
        # Some tokenizers also add an end token; the template decides where an answer ends.
        if ids.size and ids[-1] == self.tokenizer.eos_token_id and not offsets[-1].any():
            ids, offsets = ids[:-1], offsets[:-1]
        return TokenizedText(ids, offsets)

    @property
    def fixed_image_tokens(self) -> int | None:
        """Number of visual tokens of an image, if it is the same for all images; else None."""
        text = self.images.fixed_text
        return None if text is None else text.num_visual_tokens

    def token_types(self, input_ids: np.ndarray, labels: np.ndarray) -> tuple[str, np.ndarray] | None:
        """Return the token types that a model takes beside the ids, with the argument's name; None if it takes none.

        Args:
            input_ids: (T,) ids of a row.
            labels: (T,) ids where the assistant speaks, -100 elsewhere.

        Returns:
            Name and (T,) types: 1 at visual tokens (Qwen, Gemma 3), or 1 from the first answer on for a model with
            prefix and suffix (PaliGemma).
        """
        name = self.images.token_type_name
        if name is None:
            return None
        if takes_suffix(self.processor):
            return name, np.maximum.accumulate(labels >= 0).astype(np.int64)
        types = self.processor.create_mm_token_type_ids([input_ids.tolist()])[0]
        return name, np.asarray(types, dtype=np.int64)


def _token_id(config: Any, kind: str) -> int | None:
    """Return the id of a model's image or video placeholder; configs have two names for it."""
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        found = getattr(config, name, None)
        if found is not None:
            return int(found)
    return None
