"""`image_aspect_ratio: pad`: whole pictures reach the model as in LLaVA-1.5, set by set, and lengths are theirs."""

import numpy as np
import pytest
import torch
from conversations import say
from family_folders import write_folder
from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor

from orchestrator.data.processing.processor import VisionTextProcessor, load_processor
from orchestrator.data.rows import ImageReading, ImageRef
from orchestrator.data.train_data import build_train_data
from orchestrator.errors import UsageError
from orchestrator.spec.model import ModelSpec


@pytest.fixture(scope="module")
def cropping(processor):
    """The tiny model's processor with the image side of llava-hf/llava-1.5-7b-hf: shortest edge, centre crop."""
    own = processor.processor
    images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    settings = {name: getattr(own, name) for name in ("patch_size", "num_additional_image_tokens")}
    strategy = own.vision_feature_select_strategy
    return VisionTextProcessor(
        LlavaProcessor(images, own.tokenizer, vision_feature_select_strategy=strategy, **settings)
    )


def written(folder, size=(200, 50)):
    """A grey picture with a red edge on its left."""
    image = Image.new("RGB", size, (90, 90, 90))
    image.paste((250, 0, 0), (0, 0, 12, size[1]))
    image.save(folder / "edge.png")
    return image


def sets(path, *ways):
    spec = {"kind": "llava_json", "data_path": path}
    return [{"name": f"s{n}", "share": 1.0, "spec": spec | way} for n, way in enumerate(ways)]


def padded_by_hand(image, mean):
    side, (width, height) = max(image.size), image.size
    canvas = np.full((side, side, 3), [int(value * 255) for value in mean], dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(image)
    return Image.fromarray(canvas)


def test_two_sets_of_one_phase_may_differ_in_it(cropping, tmp_path, conversation_file):
    image = written(tmp_path)
    path = conversation_file([{"image": "edge.png", "conversations": say("<image>", "a")}])
    data = build_train_data(sets(path, {}, {"image_aspect_ratio": "pad"}, {}), cropping, 2048)
    found = data.collate([0, 1, 2])["pixel_values"]
    images = cropping.processor.image_processor
    wanted = images([image, padded_by_hand(image, images.image_mean), image], return_tensors="pt")["pixel_values"]
    assert torch.equal(found, wanted)
    # Without padding the object at the edge is cut away: nothing is left but grey.
    assert found[0].flatten(1).std(1).max() < 1e-6 < 0.1 < found[1].flatten(1).std(1).max()
    # Each is kept under its own name.
    assert torch.equal(data.collate([1])["pixel_values"][0], wanted[1])
    assert torch.equal(data.collate([2])["pixel_values"][0], wanted[0])


@pytest.mark.parametrize(("family", "size"), [("qwen2_vl", (24, 8)), ("llava_next", (60, 20)), ("idefics3", (60, 20))])
def test_lengths_are_those_of_the_padded_picture(family, size, tmp_path, conversation_file):
    """Where a length follows from a picture's size; one that tiles by itself gets a square to tile."""
    served = load_processor(ModelSpec(model_name_or_path=str(write_folder(family, tmp_path / "model"))))
    image = written(tmp_path, size)
    padded_by_hand(image, served.processor.image_processor.image_mean).save(tmp_path / "square.png")
    records = [{"image": name, "conversations": say("<image>", "a")} for name in ("edge.png", "square.png")]
    data = build_train_data(sets(conversation_file(records), {}, {"image_aspect_ratio": "pad"}), served, 4096)
    plain, square, padded, _ = (data.sample(index) for index in range(4))
    assert padded.num_visual_tokens == square.num_visual_tokens != plain.num_visual_tokens
    assert (padded.input_ids == square.input_ids).all()
    for name, value in data.collate([2]).items():
        assert torch.equal(value, data.collate([1])[name])
    # As long whether the pixels or only the size have been seen.
    fresh = load_processor(ModelSpec(model_name_or_path=str(tmp_path / "model"))).images
    way = ImageReading(pad=True)
    first = fresh.texts([ImageRef(str(tmp_path / "edge.png"), way)])
    assert (
        fresh.texts([ImageRef(str(tmp_path / "edge.png"), way)])
        == first
        != fresh.texts([ImageRef(str(tmp_path / "edge.png"))])
    )


def test_the_choice_for_ambiguous_images_reaches_the_pixels(processor, tmp_path, conversation_file):
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    path = conversation_file([{"image": "clear.png", "conversations": say("<image>", "a")}])
    ways = ({"ambiguous_images": "viewer"}, {"ambiguous_images": "load_image"})
    white, black = build_train_data(sets(path, *ways), processor, 2048).collate([0, 1])["pixel_values"]
    assert (white == 1).all() and (black == -1).all()


def test_a_processor_without_a_mean_colour_cannot_pad(processor, tmp_path, monkeypatch):
    written(tmp_path)
    monkeypatch.setattr(processor.processor.image_processor, "image_mean", None)
    images = VisionTextProcessor(processor.processor).images
    with pytest.raises(UsageError, match="image_aspect_ratio: pad needs the processor's mean colour"):
        images.tensors([[ImageRef(str(tmp_path / "edge.png"), ImageReading(pad=True))]])
