"""Writes coco_numbers.json: the numbers of pycocotools that test_detection.py compares with.

    pip install pycocotools && python tests/coco_numbers.py

pycocotools is needed here only. The boxes follow from seeds, so the file holds numbers alone.
"""

import contextlib
import io
import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")
CLASSES = 4  # of which the last has no object
CASES = 6


def random_case(seed):
    """Truth and detections as COCO's entries: crowds, ties of scores, images without either.

    Case 5 has up to 130 detections of a class in an image, more than COCO counts.
    """
    random = np.random.default_rng(seed)
    truth, found = [], []
    for image in range(1, 13):
        for _ in range(random.integers(0, 7)):
            box = [*random.uniform(0, 60, 2).round(2), *random.uniform(4, 40, 2).round(2)]
            kind = int(random.integers(1, CLASSES))
            crowd = int(random.random() < 0.2)
            truth.append({"image_id": image, "category_id": kind, "bbox": box, "iscrowd": crowd,
                          "area": box[2] * box[3], "id": len(truth) + 1})  # fmt: skip
            for _ in range(random.integers(0, 40 if seed == CASES - 1 else 4)):
                moved = (np.array(box) + random.normal(0, 1.5, 4)).clip(1).round(2)
                kind = kind if random.random() < 0.9 else int(random.integers(1, CLASSES + 1))
                found.append({"image_id": image, "category_id": kind, "bbox": moved.tolist(),
                              "score": round(random.random(), 2 - (seed == 1))})  # fmt: skip
    return truth, found


def main():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    numbers = []
    for seed in range(CASES):
        truth, found = random_case(seed)
        coco = COCO()
        coco.dataset = {"images": [{"id": i} for i in range(1, 13)], "annotations": truth,
                        "categories": [{"id": k} for k in range(1, CLASSES + 1)]}  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
            evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        precision = evaluation.eval["precision"][:, :, :, 0, 2]  # (IoU, recall, class)
        numbers.append({"AP": evaluation.stats[0], "AP50": evaluation.stats[1],
                        "AP75": evaluation.stats[2],
                        "per_class": precision.mean((0, 1)).round(12).tolist()})  # fmt: skip
    FILE.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
