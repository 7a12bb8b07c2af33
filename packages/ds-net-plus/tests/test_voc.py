"""PASCAL VOC on disk, generated scenes, their datamodule, and the precision of detections."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_net_plus.data import VOC_CLASSES, DetectionBatch, VOCData, read_voc, write_voc
from ds_net_plus.data.detection import box_transform
from ds_net_plus.data.voc import read_annotation, whole_pixels
from ds_net_plus.metrics import (
    Truth,
    VOCMeanAP,
    average_precision_11,
    coco_ap50,
    match_detections,
)
from ds_net_plus.scenes import SCENE_CLASSES, glyph_scene
from tenfold.errors import UserError

NAMES = list(SCENE_CLASSES)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Seven training and three test scenes in VOC's layout."""
    root = tmp_path_factory.mktemp("voc")
    write_voc(root, train=7, test=3, size=64)
    return root


def on_disk(root: Path, **options) -> VOCData:
    arguments = {"class_names": NAMES, "image_size": 64, "batch_size": 2, **options}
    return VOCData(source="voc", root=str(root), **arguments)


def annotation(folder: Path, *objects: str) -> Path:
    path = folder / "one.xml"
    path.write_text(f"<annotation>{''.join(objects)}</annotation>")
    return path


def one(name: str = "dog", box: str = "1 1 10 20", difficult: str = "0") -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, box.split(), strict=True))
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<bndbox>{corners}</bndbox></object>"
    )


# --------------------------------------------------------------------------------------- scenes


def test_scenes_depend_on_seed_and_index_alone():
    first, again = glyph_scene(5, seed=3, size=64), glyph_scene(5, seed=3, size=64)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.image, glyph_scene(6, seed=3, size=64).image)
    assert not torch.equal(first.image, glyph_scene(5, seed=4, size=64).image)


def test_boxes_hold_their_glyphs_and_stay_inside():
    scenes = [glyph_scene(index, size=96) for index in range(60)]
    for scene in scenes:
        assert 1 <= len(scene.boxes) <= 4
        assert float(scene.boxes.min()) >= 0
        assert float(scene.boxes.max()) <= 96
        assert bool((scene.boxes[:, 2:] - scene.boxes[:, :2] > 5).all())
    assert {int(k) for s in scenes for k in s.labels} == set(range(10))
    assert 0.02 < np.mean([d for s in scenes for d in s.difficult.tolist()]) < 0.25


def test_ink_reaches_the_edges_of_a_box_and_not_beyond():
    # a lone bright glyph on its ground: what differs most from the ground lies in its box
    for index in range(40):
        scene = glyph_scene(index, seed=1, size=128)
        if len(scene.boxes) != 1 or scene.difficult[0]:
            continue
        bright = scene.image.float().amax(0) > scene.image.float().amax(0).quantile(0.98)
        x0, y0, x1, y1 = scene.boxes[0].tolist()
        rows, columns = bright.nonzero().T
        inside = (columns + 1 >= x0) & (columns <= x1) & (rows + 1 >= y0) & (rows <= y1)
        assert float(inside.float().mean()) > 0.7


def test_small_scenes_are_refused():
    with pytest.raises(ValueError, match="at least 32"):
        glyph_scene(0, size=16)


# --------------------------------------------------------------------------------------- reader


def test_voc_has_twenty_classes_in_alphabetical_order():
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)


def test_written_scenes_are_read_back(tree):
    entries = read_voc(tree, ["2007_trainval", "2012_trainval"])
    assert len(entries) == 7
    assert [entry.image.name for entry in entries[:2]] == ["000001.jpg", "000002.jpg"]
    assert entries[-1].image.name == "2012_000003.jpg"
    for index, entry in enumerate(entries):
        scene = glyph_scene(index, seed=0, size=64)
        truth = read_annotation(entry.annotation, NAMES, (64, 64))
        assert torch.equal(truth.labels, scene.labels)
        assert torch.equal(truth.difficult, scene.difficult)
        assert float((truth.boxes - scene.boxes).abs().max()) <= 0.5
    test = read_voc(tree / "VOCdevkit", ["2007_test"])
    assert [entry.image.name for entry in test] == ["000005.jpg", "000006.jpg", "000007.jpg"]


def test_boxes_are_counted_from_zero_and_half_open(tmp_path):
    path = annotation(tmp_path, one(box="1 3 10 20"), one("cat", "4.5 5 6 7", difficult="1"))
    truth = read_annotation(path, VOC_CLASSES, (30, 30))
    assert truth.boxes.tolist() == [[0, 2, 10, 20], [3.5, 4, 6, 7]]
    assert truth.labels.tolist() == [VOC_CLASSES.index("dog"), VOC_CLASSES.index("cat")]
    assert truth.difficult.tolist() == [False, True]
    assert whole_pixels(truth.boxes[:1]) == [[1, 3, 10, 20]]


def test_parts_of_a_person_are_no_objects(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
    path = annotation(tmp_path, one("person").replace("</object>", part))
    assert len(read_annotation(path, VOC_CLASSES, (30, 30)).boxes) == 1


def test_a_box_may_stick_out_by_a_pixel_and_is_clipped(tmp_path):
    truth = read_annotation(annotation(tmp_path, one(box="0 1 31 20")), VOC_CLASSES, (30, 30))
    assert truth.boxes.tolist() == [[0, 0, 30, 20]]


def test_an_image_without_objects_has_none(tmp_path):
    truth = read_annotation(annotation(tmp_path), VOC_CLASSES, (30, 30))
    assert truth.boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", "damaged"),
        ("<annotation>" + one("unicorn") + "</annotation>", "unknown class 'unicorn'"),
        ("<annotation>" + one(box="5 5 4 9") + "</annotation>", "is empty"),
        ("<annotation>" + one(box="5 5 40 9") + "</annotation>", "outside the image of 30 x 30"),
        ("<annotation>" + one(box="5 nan 9 9") + "</annotation>", "is empty"),
        ("<annotation>" + one(box="5 x 9 9") + "</annotation>", "no box of four numbers"),
        ("<annotation><object><name>dog</name></object></annotation>", "no box of four numbers"),
    ],
)
def test_bad_annotations_name_their_file(tmp_path, text, message):
    path = tmp_path / "bad.xml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_annotation(path, VOC_CLASSES, (30, 30))
    assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        read_annotation(path, VOC_CLASSES, (30, 30))


def test_a_missing_root_tells_the_tree_and_where_to_get_it(tmp_path):
    with pytest.raises(UserError) as caught:
        on_disk(tmp_path / "nowhere").setup("fit")
    told = str(caught.value)
    assert "no VOC2007/ImageSets/Main/trainval.txt" in told
    assert "VOC2012/{JPEGImages,Annotations,ImageSets/Main}" in told
    assert "VOCtrainval_06-Nov-2007.tar" in told


def test_half_unpacked_roots_are_told(tmp_path):
    write_voc(tmp_path, train=4, test=2, size=32)
    (tmp_path / "VOCdevkit/VOC2012/Annotations/2012_000002.xml").unlink()
    with pytest.raises(UserError, match=r"VOC2012/Annotations lacks 1 of the 2 files.*000002\.xml"):
        on_disk(tmp_path).setup("fit")
    on_disk(tmp_path).setup("test")  # which needs no training set
    listing = tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/test.txt"
    listing.write_text("\n")
    with pytest.raises(UserError, match="names no image"):
        on_disk(tmp_path).setup("test")
    listing.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="not a list"):
        on_disk(tmp_path).setup("test")
    with pytest.raises(UserError, match="'2007' is not a year and a split"):
        read_voc(tmp_path, ["2007"])


# ----------------------------------------------------------------------------------- datamodule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "coco"}, "generated, voc"),
        ({"source": "voc"}, "--data.root"),
        ({"augment": "mixup"}, "none, light, ssd"),
        ({"image_size": 16}, "at least 32"),
        ({"train_size": 0}, "at least 1"),
        ({"val_split": 1.0}, "val_split"),
    ],
)
def test_options_that_do_not_exist(options, message):
    with pytest.raises(UserError, match=message):
        VOCData(**options)


def test_batches_of_scenes():
    data = VOCData(train_size=6, batch_size=4, image_size=64)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (4, 3, 64, 64)
    assert batch.size.tolist() == [[64, 64]] * 4
    assert [len(b) for b in batch.boxes] == [len(v) for v in batch.labels]
    assert not any(bool(d.any()) for d in batch.difficult)  # no difficult object in training
    scenes = [glyph_scene(n, 0, 64) for n in batch.index.tolist()]
    for boxes, scene in zip(batch.boxes, scenes, strict=True):
        assert torch.equal(boxes, scene.boxes[~scene.difficult])


def test_disk_and_generator_agree(tree):
    drawn, read = VOCData(test_size=3, image_size=64), on_disk(tree)
    for data in (drawn, read):
        data.setup("test")
    one, other = (next(iter(data.test_dataloader())) for data in (drawn, read))
    assert torch.equal(torch.cat(one.labels)[:1], torch.cat(other.labels)[:1])
    assert float((one.image[0] - other.image[0]).abs().mean()) < 0.25  # JPEG
    assert float((one.boxes[0] - other.boxes[0]).abs().max()) <= 0.5


def test_boxes_follow_the_resize_and_find_back(tree):
    data = on_disk(tree, image_size=96)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    for boxes, truth in zip(batch.boxes, batch.truths(), strict=True):
        torch.testing.assert_close(boxes / 1.5, truth.boxes)
    entry = read_voc(tree, ["2007_test"])[0]
    truth = read_annotation(entry.annotation, NAMES, (64, 64))
    torch.testing.assert_close(batch.truths()[0].boxes, truth.boxes)
    torch.testing.assert_close(batch.truths(original=False)[0].boxes, batch.boxes[0])


@pytest.mark.parametrize("augment", ["light", "ssd"])
def test_augmentation_is_a_function_of_seed_epoch_and_index(tree, augment):
    def batches(workers: int) -> list[DetectionBatch]:
        data = on_disk(tree, augment=augment, workers=workers)
        data.setup("fit")
        return list(data.train_dataloader())

    for one, other in zip(batches(0), batches(2), strict=True):
        assert torch.equal(one.image, other.image)
        assert all(torch.equal(a, b) for a, b in zip(one.boxes, other.boxes, strict=True))


def test_ssd_augmentation_keeps_boxes_inside_and_together_with_labels():
    data = VOCData(train_size=40, batch_size=40, image_size=64, augment="ssd")
    data.setup("fit")
    [batch] = data.train_dataloader()
    for boxes, labels, difficult in zip(batch.boxes, batch.labels, batch.difficult, strict=True):
        assert len(boxes) == len(labels) == len(difficult)
        assert bool((boxes[:, 2:] > boxes[:, :2]).all())
        assert bool(((boxes > -1e-3) & (boxes < 64 + 1e-3)).all())


def test_a_flip_mirrors_the_boxes():
    data = VOCData(train_size=30, batch_size=30, image_size=64, augment="light")
    data.setup("fit")
    [batch] = data.train_dataloader()
    flipped = 0
    for n, index in enumerate(batch.index.tolist()):
        scene = glyph_scene(index, 0, 64)
        plain = scene.boxes[~scene.difficult]
        mirrored = torch.stack([64 - plain[:, 2], plain[:, 1], 64 - plain[:, 0], plain[:, 3]], 1)
        is_flipped = not torch.allclose(batch.boxes[n], plain, atol=1e-3)
        flipped += is_flipped
        torch.testing.assert_close(batch.boxes[n], mirrored if is_flipped else plain)
    assert 5 < flipped < 25


def test_bad_items_stop_or_are_skipped(tmp_path):
    write_voc(tmp_path, train=4, test=3, size=32)
    folder = tmp_path / "VOCdevkit/VOC2007"
    (folder / "Annotations/000003.xml").write_text("<annotation>")
    (folder / "JPEGImages/000004.jpg").write_bytes(b"")
    data = on_disk(tmp_path)
    data.setup("test")
    with pytest.raises(UserError, match=r"000003\.xml"):
        list(data.test_dataloader())
    data = on_disk(tmp_path, on_bad_item="skip")
    data.setup("test")
    assert [index for batch in data.test_dataloader() for index in batch.index.tolist()] == [2]
    assert set(data.bad_items["test"].reasons) == {0, 1}


def test_validation_images_can_be_kept_apart(tree):
    data = on_disk(tree, val_split=0.3)
    data.setup("fit")
    train, val = data.train_dataset(), data.val_dataset()
    assert (len(train), len(val)) == (5, 2)
    assert not set(train.indices) & set(val.indices)
    plain = on_disk(tree)
    plain.setup("fit")
    assert len(plain.val_dataset()) == 3  # the test images


def test_images_of_a_folder_have_no_objects(tree):
    folder = tree / "VOCdevkit/VOC2007/JPEGImages"
    data = VOCData(predict_root=str(folder), image_size=64)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert len(batch.image) == len(data.predict_files) == 7
    assert all(len(boxes) == 0 for boxes in batch.boxes)
    with pytest.raises(UserError, match="no image in the folder"):
        VOCData(predict_root=str(tree / "VOCdevkit/VOC2007/Annotations")).predict_dataset()


def test_grey_images_become_colour(tmp_path):
    from PIL import Image

    Image.new("L", (50, 40)).save(tmp_path / "grey.png")
    data = VOCData(predict_root=str(tmp_path), image_size=32)
    batch = next(iter(data.predict_dataloader()))
    assert batch.image.shape == (1, 3, 32, 32)
    assert batch.size.tolist() == [[40, 50]]
    torch.testing.assert_close(batch.scales()[0], torch.tensor([50, 40, 50, 40]) / 32)


def test_box_transform_refuses_other_names():
    with pytest.raises(UserError, match="augment"):
        box_transform("imagenet", 300)


# -------------------------------------------------------------------------------------- metrics


def boxes(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def truth(rows: Tensor, labels: list[int], difficult: list[bool] | None = None) -> Truth:
    flags = [False] * len(labels) if difficult is None else difficult
    return Truth(rows, torch.tensor(labels).long(), torch.tensor(flags, dtype=torch.bool))


def found(rows: Tensor, labels: list[int], scores: list[float]) -> dict[str, Tensor]:
    return {"boxes": rows, "labels": torch.tensor(labels).long(), "scores": torch.tensor(scores)}


def test_ap_by_hand():
    # precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1: six points of 1, five of 2/3
    verdict, scores = torch.tensor([1, 0, 1]), torch.tensor([0.9, 0.8, 0.7])
    wanted = (6 * 1 + 5 * 2 / 3) / 11
    assert average_precision_11(scores, verdict, 2) == pytest.approx(wanted)
    assert average_precision_11(scores[:0], verdict[:0], 2) == 0
    assert math.isnan(average_precision_11(scores, verdict, 0))


def test_recalls_are_compared_without_rounding():
    # 3 of 10 found is recall 0.3 exactly, but 3 * 0.1 > 0.3 in floats
    verdict, scores = torch.ones(3).long(), torch.tensor([0.9, 0.8, 0.7])
    assert average_precision_11(scores, verdict, 10) == pytest.approx(4 / 11)


def test_duplicates_are_false():
    target = boxes((0, 0, 10, 10))
    verdict = match_detections(target.repeat(3, 1), target, torch.tensor([False]))
    assert verdict.tolist() == [1, 0, 0]


def test_difficult_objects_are_ignored_however_often():
    target = boxes((0, 0, 10, 10), (20, 20, 30, 30))
    verdict = match_detections(
        boxes((0, 0, 10, 10), (0, 0, 10, 9), (20, 20, 30, 30), (50, 50, 60, 60)),
        target,
        torch.tensor([True, False]),
    )
    assert verdict.tolist() == [-1, -1, 1, 0]


def test_a_detection_belongs_to_its_best_object_only():
    # the second overlaps both by half or more, best the first, which is taken: a duplicate
    target = boxes((0, 0, 10, 10), (4, 0, 14, 10))
    verdict = match_detections(
        boxes((0, 0, 10, 10), (1, 0, 11, 10)), target, torch.tensor([False, False])
    )
    assert verdict.tolist() == [1, 0]


def test_an_overlap_of_half_is_enough():
    target, half = boxes((0, 0, 10, 10)), boxes((0, 0, 10, 5))
    assert match_detections(half, target, torch.tensor([False])).tolist() == [1]
    less = boxes((0, 0, 10, 4.99))
    assert match_detections(less, target, torch.tensor([False])).tolist() == [0]


def test_map_is_the_mean_over_classes_that_can_be_found():
    metric = VOCMeanAP(num_classes=3)
    row = boxes((0, 0, 10, 10))
    metric.update([found(row, [0], [0.9])], [truth(row, [0])])
    metric.update([found(row, [1], [0.9])], [truth(boxes((50, 50, 60, 60)), [1])])
    # class 2 has a difficult object alone
    metric.update([found(row, [2], [0.9])], [truth(row, [2], [True])])
    per_class = metric.per_class().tolist()
    assert per_class[:2] == [1.0, 0.0]
    assert math.isnan(per_class[2])
    assert float(metric.compute()) == 0.5
    metric.reset()
    metric.update([found(boxes(), [], [])], [truth(boxes(), [])])
    assert math.isnan(float(metric.compute()))


def test_the_plus_one_of_the_devkit_is_in_the_convention():
    # devkit: xmin 1, xmax 10 is ten pixels wide; ours: 0 to 10
    a, b = boxes((0, 0, 10, 10))[0], boxes((5, 0, 15, 10))[0]
    ours = slow_iou(a.tolist(), b.tolist())
    kit_a, kit_b = (1, 1, 10, 10), (6, 1, 15, 10)
    overlap = min(kit_a[2], kit_b[2]) - max(kit_a[0], kit_b[0]) + 1
    area = overlap * 10
    assert ours == pytest.approx(area / (200 - area))


def slow_iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / area


def slow_ap(scene: list[tuple[Truth, dict[str, Tensor]]], label: int) -> float:
    """The development kit's loop, one detection after the other."""
    detections, positives = [], 0
    for image, (there, result) in enumerate(scene):
        for known, difficult in zip(there.labels.tolist(), there.difficult.tolist(), strict=True):
            positives += known == label and not difficult
        rows = zip(*(result[k].tolist() for k in ("labels", "scores", "boxes")), strict=True)
        detections += [(score, image, box) for known, score, box in rows if known == label]
    if not positives:
        return float("nan")
    detections.sort(key=lambda row: -row[0])
    used: set[tuple[int, int]] = set()
    tp = fp = 0
    curve = []
    for _, image, box in detections:
        there, best, which = scene[image][0], 0.0, -1
        for n, known in enumerate(there.labels.tolist()):
            overlap = slow_iou(box, there.boxes[n].tolist())
            if known == label and overlap > best:
                best, which = overlap, n
        if best >= 0.5 and bool(there.difficult[which]):
            continue
        if best >= 0.5 and (image, which) not in used:
            used.add((image, which))
            tp += 1
        else:
            fp += 1
        curve.append((tp, tp / (tp + fp)))
    points = [max([p for t, p in curve if 10 * t >= k * positives], default=0) for k in range(11)]
    return sum(points) / 11


@st.composite
def small_scenes(draw) -> list[tuple[Truth, dict[str, Tensor]]]:
    """Images with boxes on a coarse lattice, so that overlaps, ties and halves are common."""

    def box() -> tuple[int, int, int, int]:
        x, y = draw(st.integers(0, 4)), draw(st.integers(0, 4))
        return x, y, x + draw(st.integers(1, 4)), y + draw(st.integers(1, 4))

    scene, scores = [], iter(np.random.default_rng(draw(st.integers(0, 99))).permutation(100))
    for _ in range(draw(st.integers(1, 3))):
        objects, hits = draw(st.integers(0, 4)), draw(st.integers(0, 6))
        label = st.integers(0, 1)
        there = truth(
            boxes(*(box() for _ in range(objects))),
            [draw(label) for _ in range(objects)],
            [draw(st.booleans()) for _ in range(objects)],
        )
        rows = boxes(*(box() for _ in range(hits)))
        points = [float(next(scores)) / 100 for _ in range(hits)]
        scene.append((there, found(rows, [draw(label) for _ in range(hits)], points)))
    return scene


@settings(max_examples=150, deadline=None)
@given(small_scenes())
def test_map_is_that_of_a_slow_loop(scene):
    metric = VOCMeanAP(num_classes=2)
    for there, result in scene:
        metric.update([result], [there])
    for label, value in enumerate(metric.per_class().tolist()):
        assert value == pytest.approx(slow_ap(scene, label), nan_ok=True, abs=1e-12)


def test_order_of_images_and_ranks_does_not_matter():
    rows = boxes((0, 0, 10, 10), (20, 20, 30, 30))
    images = [
        (found(rows, [0, 0], [0.9, 0.2]), truth(rows[:1], [0])),
        (found(rows, [0, 0], [0.3, 0.8]), truth(rows[1:], [0])),
    ]
    values = []
    for order in ([0, 1], [1, 0]):
        metric = VOCMeanAP(num_classes=1)
        for n in order:
            metric.update([images[n][0]], [images[n][1]], index=[n])
        values.append(float(metric.compute()))
    assert values[0] == values[1] == 1.0


def test_coco_ap50_counts_or_says_what_it_needs():
    metric = coco_ap50()
    if isinstance(metric, str):
        assert "ds-net-plus[detection]" in metric
        return
    row = boxes((0, 0, 10, 10))
    metric.update(
        [found(row, [0], [0.9])],
        [{"boxes": row, "labels": torch.tensor([0]), "iscrowd": torch.tensor([0])}],
    )
    assert float(metric.compute()["map_50"]) == pytest.approx(1.0)
