"""The plain, obviously correct computation that the mechanism is held against: one row at a time, loops everywhere."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from orchestrator.compression.testing.families import tiny_llava

__all__ = ["tiny_llava"]

IMAGE, PAD, VOCABULARY, TOKENS = 63, 0, 64, 9


def make_batch(rows, padding="right", seed=0, answer=3):
    """Rows given as lists of a number of text tokens or "image"; labels on each row's last `answer` tokens."""
    generator = torch.Generator().manual_seed(seed)
    sequences, images = [], 0
    for row in rows:
        tokens = []
        for part in row:
            if part == "image":
                tokens += [IMAGE] * TOKENS
                images += 1
            else:
                tokens += torch.randint(1, IMAGE, (part,), generator=generator).tolist()
        sequences.append(tokens)
    length = max(len(tokens) for tokens in sequences)
    ids, mask, labels = [], [], []
    for tokens in sequences:
        gap = [0] * (length - len(tokens))
        label = [-100] * (len(tokens) - answer) + tokens[-answer:] if answer else [-100] * len(tokens)
        label = [-100 if token == IMAGE else token for token in label]
        left, right = (gap, []) if padding == "left" else ([], gap)
        ids.append(left + tokens + right)
        mask.append(left + [1] * len(tokens) + right)
        labels.append([-100] * len(left) + label + [-100] * len(right))
    batch = {name: torch.tensor(x) for name, x in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}
    if images:
        batch["pixel_values"] = torch.randn(images, 3, 24, 24, generator=generator)
    return batch


def windows_of(count, point):
    """Lists of token numbers, one for each window."""
    if "stride" in point:
        return [list(range(s, min(s + point["stride"], count))) for s in range(0, count, point["stride"])]
    n = point["keep_tokens"]
    return [list(range(j * count // n, (j + 1) * count // n)) for j in range(n)]


def pool(tokens, point):
    """Pools every image of one row; a token is (hidden, position id, image number or None, label, original column)."""
    result, i = [], 0
    while i < len(tokens):
        if tokens[i][2] is None:
            result.append(tokens[i])
            i += 1
            continue
        image = [t for t in tokens if t[2] == tokens[i][2]]
        for window in windows_of(len(image), point):
            members = [image[w] for w in window]
            hidden = sum(t[0] for t in members) / len(members)
            mean = sum(t[1] for t in members) // len(members)
            position = members[0][1] if point.get("positions") == "first" else mean
            result.append((hidden, position, members[0][2], -100, members[0][4]))
        i += len(image)
    if point.get("positions") == "renumber":
        result = [(h, result[0][1] + n, image, lab, col) for n, (h, _, image, lab, col) in enumerate(result)]
    return result


def run_row(model, tokens, points):
    """One row without padding through the decoder; returns the kept tokens with their final hidden states."""
    decoder = model.model.language_model
    for number, layer in enumerate(decoder.layers):
        for point in points:
            if point["layer"] == number:
                tokens = pool(tokens, point)
        hidden = torch.stack([t[0] for t in tokens]).unsqueeze(0)
        positions = torch.tensor([[t[1] for t in tokens]])
        n = len(tokens)
        causal = torch.ones(n, n).tril().bool()
        mask = torch.zeros(1, 1, n, n).masked_fill(~causal, torch.finfo(torch.float32).min)
        out = layer(
            hidden,
            attention_mask=mask,
            position_embeddings=decoder.rotary_emb(hidden, positions),
            position_ids=positions,
        )
        tokens = [(h, *t[1:]) for h, t in zip(out[0], tokens, strict=True)]
    return [(decoder.norm(t[0]), *t[1:]) for t in tokens]


def row_tokens(model, batch):
    """The rows of a batch as lists of tokens, padding left out."""
    features = iter(())
    if "pixel_values" in batch:
        features = iter(model.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    positions = batch.get("position_ids")
    rows, image = [], -1
    for r, ids in enumerate(batch["input_ids"].tolist()):
        tokens, left = [], 0
        for c, token in enumerate(ids):
            if not batch["attention_mask"][r, c]:
                continue
            position = c if positions is None else int(positions[r, c])
            label = int(batch["labels"][r, c]) if "labels" in batch else -100
            if token == IMAGE:
                if left == 0:
                    image, feature, left = image + 1, next(features), TOKENS
                tokens.append((feature[TOKENS - left], position, image, -100, c))
                left -= 1
            else:
                tokens.append((embeddings[r, c], position, None, label, c))
        rows.append(tokens)
    return rows


def reference_rows(model, batch, points):
    """For each row the kept tokens: (logits, original column, label)."""
    return [
        [(model.lm_head(t[0]), t[4], t[3]) for t in run_row(model, tokens, points)]
        for tokens in row_tokens(model, batch)
    ]


def reference_loss(model, batch, points, num_items=None):
    """Sum of the label tokens' cross-entropies over their number."""
    losses = []
    for row in reference_rows(model, batch, points):
        for (logits, _, _), (_, _, label) in itertools.pairwise(row):
            if label != -100:
                losses.append(F.cross_entropy(logits.float(), torch.tensor(label)))
    return sum(losses) / (num_items or len(losses))


def gradients(model, loss):
    """Gradients of all parameters by name."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected, tolerance=1e-5):
    """Every gradient equal to `tolerance` of the largest one."""
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3, "a test without gradients proves nothing"
    for name, wanted in expected.items():
        if name not in got:
            assert float(wanted.abs().max()) == 0, name
            continue
        assert float((got[name] - wanted).abs().max()) <= tolerance * max(1.0, scale), name
