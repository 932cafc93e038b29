"""Loads a model's processor; without torchvision too, which only its videos need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.data.processor import VisionTextProcessor
from orchestrator.errors import UsageError
from orchestrator.spec.model import ModelSpec

_VIDEO = "video_processor"


def load_processor(model: ModelSpec) -> VisionTextProcessor:
    """Return the tokenizer and image processor of a model.

    Raises:
        UsageError: the folder or hub entry has none, the tokenizer is too old, or a package is missing.
    """
    from transformers import AutoConfig

    where = model.model_name_or_path
    config = None
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(where, **options)
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
    return _without_videos(known, where, options)


def _without_videos(known: Any, where: str | Path, options: dict[str, Any]) -> Any:
    """Return a processor of this class that has no video processor: in transformers that one needs torchvision."""
    from transformers import AutoImageProcessor, AutoTokenizer

    class ImagesOnly(known):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == _VIDEO and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    ImagesOnly.__name__ = known.__name__
    loaders = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    parts = {
        name: None if name == _VIDEO else loaders[name].from_pretrained(where, **options)
        for name in known.get_attributes()
    }
    settings, _ = known.get_processor_dict(where, **options)
    plain = {name: value for name, value in settings.items() if name not in (*parts, "processor_class", "auto_map")}
    return ImagesOnly(**parts, **plain)
