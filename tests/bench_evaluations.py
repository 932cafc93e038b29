"""Measures what evaluations of one state save by sharing the features of its vision tower.

    python tests/bench_evaluations.py --rows 256 --variants 9

Tests one untrained tiny LLaVA on easy-VQA's test questions under a sweep of variants, each with features that earlier
variants computed and without, in turn within one run. Told are processor seconds of both arms and their ratio, the
share of the unshared arm that tower and projector take (all that sharing can save), and what that leaves. The answers
of both arms are compared one by one.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "experiments" / "models" / "tiny-llava"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--variants", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    import torch

    from orchestrator.compression.features import SharedFeatures
    from orchestrator.evaluation.evaluate import evaluation_data, load_model, run_under
    from orchestrator.evaluation.protocol import Workers
    from orchestrator.models.build import WEIGHTS_FILE
    from orchestrator.models.initial_weights import write_initial_weights
    from orchestrator.plan.jobs import EvaluationJob, RootJob

    torch.set_num_threads(options.threads)
    settings = {"model_name_or_path": str(MODEL), "weights": "random", "dtype": "float32"}
    strides = [2, 4, 8]
    points = [[], *([{"kind": "average_pool", "layer": layer, "stride": s}] for layer in (1, 2, 3) for s in strides)]
    with tempfile.TemporaryDirectory() as folder:
        write_initial_weights(RootJob("root", settings, seed=0), Path(folder))
        jobs = [
            EvaluationJob(
                id=str(number), state="root", name="vqa", under=str(number), points=tuple(one), model=settings,
                spec={"kind": "exact_match", "data": "test", "max_new_tokens": 4},
                data={"kind": "easy_vqa", "split": "test", "max_samples": options.rows},
            )
            for number, one in enumerate(points[: options.variants])
        ]  # fmt: skip
        weights, workers = Path(folder) / WEIGHTS_FILE, Workers()
        model = load_model(jobs[0], weights, torch.device("cpu"))
        features, seconds, tower = SharedFeatures(), {"shared": 0.0, "alone": 0.0}, 0.0
        run_under(jobs[0], model, evaluation_data(jobs[0]), workers, weights)  # what only a first pass pays
        inner = model.model
        plain = type(inner).get_image_features
        for number, job in enumerate(jobs):
            found = {}
            for arm in ("shared", "alone") if number % 2 else ("alone", "shared"):
                data = evaluation_data(job)
                inside = 0.0

                @functools.wraps(plain)  # generate() reads the signature
                def timed(self, *args, **kwargs):
                    nonlocal inside
                    begin = time.process_time()
                    try:
                        return plain(self, *args, **kwargs)
                    finally:
                        inside += time.process_time() - begin

                type(inner).get_image_features = timed
                begin = time.process_time()
                found[arm] = run_under(job, model, data, workers, weights, features if arm == "shared" else None)
                seconds[arm] += time.process_time() - begin
                type(inner).get_image_features = plain
                tower += inside if arm == "alone" else 0.0
            assert found["shared"].predictions == found["alone"].predictions, "the answers are the same"
    print(json.dumps({
        "rows": options.rows, "variants": len(jobs), "threads": options.threads,
        "alone_cpu_s": round(seconds["alone"], 2), "shared_cpu_s": round(seconds["shared"], 2),
        "ratio": round(seconds["shared"] / seconds["alone"], 3), "tower_share": round(tower / seconds["alone"], 3),
        "remains": round(1 - tower / seconds["alone"], 3), "batches_found": features.found, "made": features.made,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
