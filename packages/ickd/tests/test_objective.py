"""The objective: its terms by hand, unlabelled and dense batches, and the epochs of preparation."""

import copy
import itertools
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor

from ickd.data import ImageData
from ickd.module import Distiller
from ickd.module.checks import check_strategy
from ickd.module.objective import LossChoice, Objective, Pair, parse_losses, usual_ce_weight
from tenfold.comparing import differences
from tenfold.distillation import Taps, available_losses, loss_class
from tenfold.errors import UserError
from tenfold.runs import make_trainer
from tenfold.testing import SendSignal
from tenfold.training import LAST, Interrupted

BATCH, CLASSES = 4, 5
LABELS = torch.tensor([0, 3, 4, 3])


def taps(seed: int, channels: tuple[int, ...] = (4, 6, 8), classes: int = CLASSES) -> Taps:
    """Random taps of a small network: maps of 8, 8 and 4 pixels a side."""
    generator = torch.Generator().manual_seed(seed)
    sides = (8, 8, 4)
    preacts = tuple(
        torch.randn(BATCH, c, side, side, generator=generator, dtype=torch.float64)
        for c, side in zip(channels, sides, strict=True)
    )
    maps = tuple(preact.relu() for preact in preacts)
    logits = 2 * torch.randn(BATCH, classes, generator=generator, dtype=torch.float64)
    return Taps(maps, maps[-1].mean((2, 3)), logits, preacts)


def made(
    losses: str | dict[str, object], student: Taps, teacher: Taps | None, *options: object, **more
) -> Objective:
    torch.manual_seed(0)
    return Objective(parse_losses(losses), student, teacher, *options, **more).double().eval()


def facts(label: Tensor = LABELS) -> dict[str, Tensor]:
    return {"label": label, "index": torch.arange(len(label))}


# ---- the same numbers by hand


def log_softmax(z: np.ndarray) -> np.ndarray:
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def ce_by_hand(logits: Tensor, label: Tensor) -> float:
    rows = zip(log_softmax(logits.numpy()), label.tolist(), strict=True)
    picked = [-row[k] for row, k in rows if k >= 0]
    return sum(picked) / len(picked)


def kd_by_hand(student: np.ndarray, teacher: np.ndarray, temperature: float = 4.0) -> float:
    log_s, log_t = (log_softmax(z / temperature) for z in (student, teacher))
    return temperature**2 * float((np.exp(log_t) * (log_t - log_s)).sum(-1).mean())


def icc_by_hand(student: Tensor, teacher: Tensor) -> float:
    """Section 3.1, entry by entry."""
    total = 0.0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        for i in range(len(t)):
            rows = [np.array([float((f[i] * f[j]).sum()) for j in range(len(f))]) for f in (s, t)]
            ours, theirs = (row / np.linalg.norm(row) for row in rows)
            total += float(((ours - theirs) ** 2).sum()) / len(t)
    return total / len(student)


# ---- what is asked for


@pytest.mark.parametrize("name", available_losses())
def test_names_alone_have_the_losses_default_weights(name):
    [choice] = parse_losses(name)
    loss = loss_class(name)
    weight = 1.0 if loss.stage == "init" else loss.default_weight  # that acts alone, unweighted
    assert (choice.name, choice.weight, choice.warmup) == (name, weight, None)


@pytest.mark.parametrize(
    ("losses", "ce_weight"),
    [
        (None, 1.0),
        ("none", 1.0),
        ("kd", 0.1),  # section 4.5
        ("kd_mixed", 0.0),  # has a cross-entropy of its own
        ("ickd", 1.0),
        ("kd+ickd", 1.0),
        ({"kd": None}, 0.1),
        ({"kd": 1.0}, 1.0),
        ({"kd": {"temperature": 2.0}}, 0.1),
        ("kd_mixed+ickd", 0.0),
        ("none + kd_mixed", 0.0),
        ({"kd_mixed": 0.5}, 0.0),
    ],
)
def test_the_cross_entropy_has_the_factor_that_goes_with_the_loss(losses, ce_weight):
    assert usual_ce_weight(losses) == ce_weight


def test_losses_are_read_in_three_ways():
    assert parse_losses(None) == parse_losses("none") == parse_losses({}) == []
    assert [c.name for c in parse_losses("kd + ickd")] == ["kd", "ickd"]
    assert parse_losses({"ickd": 2.5, "kd": None}) == [
        LossChoice("ickd", 2.5),
        LossChoice("kd", 1.0),  # beside another loss (section 4.5)
    ]
    [dkd] = parse_losses({"dkd": {"weight": 2, "warmup": 20, "beta": 6}})
    assert dkd == LossChoice("dkd", 2.0, 20, {"beta": 6})


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ("ikcd", "did you mean 'ickd'"),
        ({"kd": -1}, "the weight of kd must be 0 or more, got -1"),
        ({"kd": "much"}, "got 'much'"),
        ({"kd": float("nan")}, "got nan"),
        ({"kd": {"warmup": -2}}, "the warmup of kd must be 0 or more"),
        ({"kd": {"warmup": 0.5}}, "the warmup of kd is a number of epochs, got 0.5"),
        ({"kd": True}, "the weight of kd must be 0 or more, got True"),
    ],
)
def test_what_is_no_loss_is_told(losses, message):
    with pytest.raises(UserError, match=message):
        parse_losses(losses)


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        (
            {"kd": {"temperature": -1}},
            {},
            "cannot build the loss kd: temperature must be a positive number",
        ),
        ({"ickd": {"grids": 2}}, {}, "cannot build the loss ickd.*grids"),
        ({"ickd": {"embed": False}}, {}, "student's 8 channels.*teacher's 9"),
        ("ab", {}, "init_epochs"),
        ("crd", {}, "n_data"),
        ("kd", {"ce_weight": -1.0}, "ce_weight must be 0 or more"),
        ("ab", {"init_epochs": -1}, "init_epochs must be 0 or more"),
    ],
)
def test_what_cannot_be_built_is_told(losses, options, message):
    with pytest.raises(UserError, match=message):
        made(losses, taps(0), taps(1, (4, 9, 9)), **options)


def test_losses_without_a_teacher_are_refused():
    with pytest.raises(UserError, match="kd, ickd need a teacher"):
        made("kd+ickd", taps(0), None)


# ---- the sum


def test_weighted_terms_by_hand():
    student, teacher = taps(0), taps(1)
    objective = made({"ickd": {"weight": 3.0, "embed": False}, "kd": 2.0}, student, teacher, 0.5)
    terms = objective(student, teacher, facts())
    wanted = {
        "ce": 0.5 * ce_by_hand(student.logits, LABELS),
        "ickd": 3.0 * icc_by_hand(student.maps[-1], teacher.maps[-1]),
        "kd": 2.0 * kd_by_hand(student.logits.numpy(), teacher.logits.numpy()),
    }
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-10), name


def test_without_losses_the_teacher_is_not_asked():
    student = taps(0)
    objective = made(None, student, None)
    assert not objective.needs_taps
    terms = objective(student, None, facts())
    assert list(terms) == ["ce"]
    assert float(terms["ce"]) == pytest.approx(ce_by_hand(student.logits, LABELS), rel=1e-12)


def test_a_weight_of_the_labels_of_zero_leaves_them_out():
    student, teacher = taps(0), taps(1)
    terms = made("kd", student, teacher, 0.0)(student, teacher, facts(torch.full((4,), -1)))
    assert list(terms) == ["kd"]


@pytest.mark.parametrize(("losses", "needed"), [("kd+dkd", False), ("kd+rkd", True)])
def test_features_are_taken_only_where_a_loss_compares_them(losses, needed):
    assert made(losses, taps(0), taps(1)).needs_taps is needed


def test_warm_up_grows_as_mdistiller_has_it():
    """min(epoch / warmup, 1) with the first epoch called 1; the other terms are whole at once."""
    student, teacher = taps(0), taps(1)
    objective = made({"dkd": {"warmup": 4}, "kd": 1.0}, student, teacher)
    at_once = made({"dkd": {"warmup": 0}}, student, teacher)
    full = float(at_once(student, teacher, facts())["dkd"])
    for epoch in range(7):
        terms = objective(student, teacher, facts(), epoch)
        assert float(terms["dkd"]) == pytest.approx(min((epoch + 1) / 4, 1) * full, rel=1e-12)
        assert float(terms["kd"]) == pytest.approx(
            kd_by_hand(student.logits.numpy(), teacher.logits.numpy()), rel=1e-10
        )


@pytest.mark.parametrize(
    ("losses", "epochs", "share"),
    [
        ("dkd", 240, [1 / 20, 2 / 20, 19 / 20, 1, 1]),  # section 4.5: linear, 20 epochs
        ({"dkd": {"weight": 1.0, "beta": 8.0}}, 40, [1 / 20, 2 / 20, 19 / 20, 1, 1]),
        ("dkd", 24, [1 / 12, 2 / 12, 1, 1, 1]),  # the second half of a short run is at full weight
        ({"dkd": {"warmup": 20}}, 24, [1 / 20, 2 / 20, 19 / 20, 1, 1]),  # as it was asked for
        ("dkd", 1, [1, 1, 1, 1, 1]),
        ("kd", 240, [1, 1, 1, 1, 1]),
    ],
)
def test_dkd_warms_up_unless_told_otherwise(losses, epochs, share):
    student, teacher = taps(0), taps(1)
    objective = made(losses, student, teacher, 0.0)
    objective.task_epochs = epochs
    [name] = objective.losses
    full = float(objective(student, teacher, facts(), 1000)[name])
    found = [float(objective(student, teacher, facts(), n)[name]) for n in (0, 1, 18, 19, 50)]
    assert found == pytest.approx([full * part for part in share], rel=1e-12)


# ---- pairs


def test_pairs_have_weights_and_adaptors_of_their_own():
    student, teacher = taps(0), taps(1, (5, 6, 7))
    pairs = [Pair("a", "x", 0.5), Pair("b", "y", 2.0), Pair("c", "z", 1.0)]
    objective = made({"ickd": 3.0, "kd": 1.0}, student, teacher, 1.0, pairs)
    assert list(objective.losses) == ["ickd", "ickd_1", "ickd_2", "kd"]
    embeddings = [objective.losses[key].embed_s for key in list(objective.losses)[:3]]
    sizes = [tuple(e.conv2d.weight.shape[:2]) for e in embeddings]
    assert sizes == [(5, 4), (6, 6), (7, 8)]
    assert len({id(p) for e in embeddings for p in e.parameters()}) == 9
    with torch.no_grad():
        terms = objective(student, teacher, facts())
        for key, pair, embedding, ours, theirs in zip(
            objective.losses, pairs, embeddings, student.maps, teacher.maps, strict=False
        ):
            wanted = 3.0 * pair.weight * icc_by_hand(embedding(ours), theirs)
            assert float(terms[key]) == pytest.approx(wanted, rel=1e-10), key
    assert list(terms) == ["ce", "ickd", "ickd_1", "ickd_2", "kd"]


def test_a_loss_on_stages_takes_all_pairs_at_once():
    """Named taps have no stem in front that could be left out."""
    module = Distiller(
        "embedded:gratings-student",
        "embedded:gratings-teacher",
        pairs=[("stages.2", "stages.2", 1.0), ("stages.3", "stages.3", 1.0)],
        losses="at",
    )
    batch = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        student, teacher = (net.eval().taps(batch) for net in (module.student, module.teacher))
        terms = module.objective(student, teacher, facts(torch.tensor([0, 1, 2, 0])))
    total = 0.0
    for ours, theirs in zip(student.maps, teacher.maps, strict=True):
        maps = [m.double().square().mean(1).flatten(1) for m in (ours, theirs)]
        s, t = (m / m.norm(dim=1, keepdim=True) for m in maps)
        total += float((s - t).square().mean())
    assert float(terms["at"]) == pytest.approx(loss_class("at").default_weight * total, rel=1e-5)


# ---- labels


def test_images_without_a_label_count_for_the_other_terms_alone():
    student, teacher = taps(0), taps(1)
    some = torch.tensor([0, -1, 4, -1])
    terms = made("kd", student, teacher)(student, teacher, facts(some))
    assert float(terms["ce"]) == pytest.approx(ce_by_hand(student.logits, some), rel=1e-12)
    everywhere = 0.9 * kd_by_hand(student.logits.numpy(), teacher.logits.numpy())
    assert float(terms["kd"]) == pytest.approx(everywhere, rel=1e-10)


def test_nothing_labelled_is_no_nan():
    student, teacher = taps(0), taps(1)
    logits = student.logits.clone().requires_grad_()
    student = Taps(student.maps, student.pooled, logits)
    terms = made("kd", student, teacher)(student, teacher, facts(torch.full((4,), -1)))
    assert terms["ce"].item() == 0
    [gradient] = torch.autograd.grad(terms["ce"], logits)
    assert torch.equal(gradient, torch.zeros_like(logits))


# ---- masks


def dense(seed: int, side: int = 3) -> Taps:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((BATCH, 6, 4, 4), (BATCH, CLASSES, side, side))
    one, logits = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return Taps((one,), None, logits, (one,), last=one)


def test_masks_pixel_by_pixel():
    student, teacher = dense(0), dense(1)
    label = torch.randint(0, CLASSES, (BATCH, 3, 3), generator=torch.Generator().manual_seed(2))
    label[0, 1] = 255
    terms = made("kd+kd_mixed", student, teacher)(student, teacher, facts(label))
    cross, kept, divergence, pixels = 0.0, 0, 0.0, 0
    for image, row, column in itertools.product(range(BATCH), range(3), range(3)):
        s, t = (x.logits[image, :, row, column].numpy() for x in (student, teacher))
        divergence, pixels = divergence + kd_by_hand(s, t), pixels + 1
        if (k := int(label[image, row, column])) != 255:
            cross, kept = cross - float(log_softmax(s)[k]), kept + 1
    assert float(terms["ce"]) == pytest.approx(cross / kept, rel=1e-10)
    assert float(terms["kd"]) == pytest.approx(divergence / pixels, rel=1e-10)
    mixed = 0.1 * cross / kept + 0.9 * divergence / pixels
    assert float(terms["kd_mixed"]) == pytest.approx(mixed, rel=1e-10)


def test_a_mask_of_boundaries_alone_is_no_nan():
    student = dense(0)
    terms = made(None, student, None)(student, None, facts(torch.full((BATCH, 3, 3), 255)))
    assert float(terms["ce"]) == 0


# ---- size of a batch


@pytest.mark.parametrize("name", ["kd", "ickd", "fitnet", "at", "vid", "nst", "dkd", "mse", "ofd"])
def test_a_batch_twice_is_the_same_loss(name):
    """So gradients averaged over processes are those of one process (section 11)."""
    student, teacher = taps(0), taps(1)
    objective = made(name, student, teacher)
    once = objective(student, teacher, facts())

    def twice(x: Taps) -> Taps:
        double = [tuple(torch.cat([m, m]) for m in maps) for maps in (x.maps, x.preacts)]
        pooled, logits = (torch.cat([v, v]) for v in (x.pooled, x.logits))
        return Taps(double[0], pooled, logits, double[1])

    both = objective(twice(student), twice(teacher), facts(torch.cat([LABELS, LABELS])))
    for key, value in once.items():
        assert both[key].item() == pytest.approx(value.item(), rel=1e-10), key


# ---- preparation: which terms, in which epoch


@pytest.mark.parametrize(("name", "reads"), [("ab", True), ("fsp", True), ("ft", False)])
def test_preparation_acts_alone(name, reads):
    student, teacher = taps(0), taps(1)
    objective = made({name: 2.0, "kd": 1.0}, student, teacher, init_epochs=2)
    loss = objective.losses[name]
    if name == "ft":
        paraphrase = loss.paraphraser(teacher.maps[-1])
        wanted = float((paraphrase - teacher.maps[-1]).square().mean())
    else:
        wanted = 2.0 * float(loss.terms(student, teacher, facts())[name])
    for epoch in (0, 1):
        terms = objective(student if reads else Taps(), teacher, facts(), epoch)
        assert list(terms) == [name]
        assert float(terms[name]) == pytest.approx(wanted, rel=1e-10)
        assert objective.reads_student(epoch) is reads
    after = objective(student, teacher, facts(), 2)
    assert list(after) == (["ce", "ft", "kd"] if name == "ft" else ["ce", "kd"])
    assert objective.reads_student(2)


def test_every_pairs_paraphraser_is_prepared():
    student, teacher = taps(0), taps(1)
    pairs = [Pair("a", "x"), Pair("b", "y")]
    objective = made("ft", student, teacher, 1.0, pairs, 1)
    sum(objective(Taps(), teacher, facts(), 0).values()).backward()
    for key in ("ft", "ft_1"):
        assert all(p.grad is not None for p in objective.losses[key].paraphraser.parameters()), key


def test_init_epochs_wait_for_a_loss_that_prepares():
    student, teacher = taps(0), taps(1)
    assert made("ickd", student, teacher, init_epochs=5).init_epochs == 0
    assert made("ab+ickd", student, teacher, init_epochs=5).init_epochs == 5


# ---- preparation: a whole run


class Record(Callback):
    """Learning rates, terms and the optimiser's state before every step; weights after epochs."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.terms: list[list[str]] = []
        self.states: list[int] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_fit_start(self, trainer, pl_module):
        pl_module.objective.register_forward_hook(lambda _, __, out: self.terms.append(sorted(out)))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.states.append(len(trainer.optimizers[0].state))

    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append({k: v.clone() for k, v in pl_module.state_dict().items()})


def data() -> ImageData:
    return ImageData(batch_size=16, train_size=64, val_size=8, test_size=8)


def distiller(name: str, **options: object) -> Distiller:
    torch.manual_seed(0)
    given = {
        "losses": {name: loss_class(name).default_weight},
        "init_epochs": 1,
        "lr": 0.02,
        "init_lr": 0.005,
        "schedule": "multistep",
        "milestones": [1],
        "num_classes": 3,
        **options,
    }
    return Distiller("embedded:gratings-student", "embedded:gratings-teacher", **given)


def run(module: Distiller, folder: Path, *callbacks: Callback, resume: bool = False, **options):
    trainer = make_trainer(
        folder,
        epochs=3,
        accelerator="cpu",
        progress=False,
        callbacks=callbacks,
        limit_val_batches=0,
        **{"logger": False, **options},
    )
    trainer.fit(module, datamodule=data(), ckpt_path=folder / LAST if resume else None)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, tuple[Record, dict[str, Tensor]]]:
    """An uninterrupted run of each loss: one epoch of preparation, two of the task."""
    found = {}
    for name in ("ab", "fsp", "ft"):
        module, record = distiller(name), Record()
        run(module, tmp_path_factory.mktemp(name), record)
        found[name] = record, {k: v.clone() for k, v in module.state_dict().items()}
    return found


@pytest.mark.parametrize("name", ["ab", "fsp", "ft"])
def test_rates_and_terms_of_both_phases(whole, name):
    record, _ = whole[name]
    assert record.rates == pytest.approx([0.005] * 4 + [0.02] * 4 + [0.002] * 4)
    task = ["ce", "ft"] if name == "ft" else ["ce"]
    assert record.terms == [[name]] * 4 + [task] * 8


@pytest.mark.parametrize("name", ["ab", "fsp", "ft"])
def test_the_optimiser_begins_anew_with_the_task(whole, name):
    record, _ = whole[name]
    assert record.states[0] == 0
    assert min(record.states[1:4]) > 0
    assert record.states[4] == 0
    assert min(record.states[5:]) > 0


def moved(before: dict[str, Tensor], after: dict[str, Tensor], part: str) -> set[str]:
    return {k for k, v in after.items() if k.startswith(part) and not torch.equal(before[k], v)}


def test_activation_boundaries_leave_the_classifier_until_the_task(whole):
    record, _ = whole["ab"]
    fresh = distiller("ab").state_dict()
    first = moved(fresh, record.weights[0], "student.")
    assert not any("fc" in key for key in first)
    assert {"student.net.stages.1.body.0.weight", "student.net.stages.3.body.0.weight"} <= first
    task = moved(record.weights[0], record.weights[1], "student.")
    assert "student.net.fc.weight" in task


def test_the_flow_prepares_the_trunk(whole):
    record, _ = whole["fsp"]
    first = moved(distiller("fsp").state_dict(), record.weights[0], "student.")
    assert {f"student.net.stages.{n}.body.0.weight" for n in range(4)} <= first
    assert not any("fc" in key for key in first)


def test_the_paraphraser_learns_alone_and_then_no_more(whole):
    record, _ = whole["ft"]
    fresh = distiller("ft").state_dict()
    first = moved(fresh, record.weights[0], "")
    assert {k for k in first if "paraphraser" not in k} == set()  # not even batch norm statistics
    assert "objective.losses.ft.paraphraser.encoder.0.weight" in first
    later = moved(record.weights[0], record.weights[2], "")
    assert not any("paraphraser" in key for key in later)
    assert "objective.losses.ft.translator.encoder.0.weight" in later
    assert "student.net.fc.weight" in later


@pytest.mark.parametrize(
    ("name", "cut"),
    [("ft", (0, 3)), ("ft", (1, 0)), ("ft", (1, 2)), ("ab", (0, 1)), ("ab", (1, 0))],
)
def test_a_run_resumed_around_the_boundary_gives_the_same_bits(whole, tmp_path, name, cut):
    with pytest.raises(Interrupted):
        run(distiller(name), tmp_path, SendSignal(signal.SIGINT, *cut))
    module = distiller(name)
    run(module, tmp_path, resume=True)
    assert differences(module.state_dict(), whole[name][1]) == ""


def test_a_frozen_paraphraser_stays_frozen_when_its_epoch_is_resumed(tmp_path):
    with pytest.raises(Interrupted):
        run(distiller("ft"), tmp_path, SendSignal(signal.SIGINT, 1, 1))
    module = distiller("ft")
    run(module, tmp_path, resume=True)
    assert not any(p.requires_grad for p in module.objective.losses["ft"].paraphraser.parameters())


def gloo(**options: object) -> dict[str, object]:
    strategy = DDPStrategy(process_group_backend="gloo", **options)
    return {"strategy": strategy, "plugins": [LightningEnvironment()]}


def test_ddp_trains_through_the_boundary_if_told_that_weights_wait(whole, tmp_path):
    module = distiller("ft")
    run(module, tmp_path, **gloo(find_unused_parameters=True))
    # buckets give gradients another layout in memory, and sums another order
    assert differences(module.state_dict(), whole["ft"][1], 1e-5) == ""


def test_plain_ddp_is_refused_where_weights_wait(tmp_path):
    with pytest.raises(UserError, match="ddp_find_unused_parameters_true"):
        run(distiller("ab"), tmp_path, **gloo())


def test_weights_that_are_parted_among_processes_are_refused():
    objective = made("kd", taps(1), taps(2))
    with pytest.raises(UserError, match=r"fsdp parts.*strategy ddp"):
        check_strategy(objective, FSDPStrategy())


# ---- what cannot be compared is told before anything is trained


@pytest.mark.parametrize(
    ("student", "losses", "message"),
    [
        ("zoo:vgg8", "at", "stages"),
        ("zoo:resnet8x4", "fsp", "channels"),
        ("zoo:resnet20", {"ickd_grid": {"grid": [16, 16], "embed": True}}, "grid of 16x16"),
    ],
)
def test_networks_are_tried_before_a_teacher_is_trained(tmp_path, student, losses, message):
    module = Distiller(
        student,
        "zoo:resnet8",
        losses=losses,
        num_classes=3,
        teacher_recipe="a recipe that is never read",
        init_epochs=1 if losses == "fsp" else 0,
    )
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, epochs=2, accelerator="cpu", progress=False).fit(module, data())
    assert not [*tmp_path.rglob("*.ckpt")]


def test_a_rehearsal_leaves_no_trace():
    torch.manual_seed(0)
    options = {"n_data": 12, "labels": [0, 1, 2] * 4, "negatives": 3, "dim": 4}
    objective = made({"ickd": 1.0, "crd": options, "vid": 1.0}, taps(1), taps(2)).train()
    before, state = torch.random.get_rng_state(), copy.deepcopy(objective.state_dict())
    objective.rehearse(taps(3), taps(4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert differences(objective.state_dict(), state) == ""
    assert all(module.training for module in objective.modules())


def test_weights_of_pairs_act_or_are_refused():
    pairs = [Pair("a", "b", 1.0), Pair("c", "d", 100.0)]
    with pytest.raises(UserError, match=r"at compares all pairs at once.*at 1"):
        made("at", taps(1), taps(2), 1.0, pairs)
    made("at", taps(1), taps(2), 1.0, [pair._replace(weight=1.0) for pair in pairs])
    for weight in (-1.0, float("nan")):
        with pytest.raises(UserError, match="weight of a pair"):
            made("ickd", taps(1), taps(2), 1.0, [Pair("a", "b", weight)])
