import math

import pytest
import torch

from bert_oversmoothing.analysis import ContractionBound, block_weights, model_norms, model_trials
from bert_oversmoothing.analysis.bound import head_norms
from bert_oversmoothing.families import FAMILIES, read_encoder
from bert_oversmoothing.theorem import BlockNorms, block_norms, v_paper, v_tight
from tenfold.errors import UserError

BOUNDED = [family for family in FAMILIES if family != "modernbert"]
VARIANTS = ["albert-groups", "beit-plain", "deberta-v2-conv", "bert-decoder"]


@pytest.mark.parametrize("family", [*BOUNDED, *VARIANTS])
def test_no_block_of_any_family_breaks_the_theorem(tiny, family):
    blocks = model_trials(tiny(family)[0], count=6)
    # The first block of the wide DeBERTa has a convolution behind it, and no bound.
    assert [len(block) for block in blocks] == [
        0 if family == "deberta-v2-conv" and index == 0 else 6 for index in range(len(blocks))
    ]
    for trial in (trial for block in blocks for trial in block):
        assert not trial.violation
        assert 0 < trial.ratio < trial.v_tight
        assert trial.design.width == 32


@pytest.mark.parametrize("scale", [0.01, 0.3])
def test_the_bound_is_near_the_truth_where_blocks_do_little(tiny, scale):
    """With all matrices small a pre-norm block is nearly the identity, and v is nearly 1."""
    model, _ = tiny("vit")
    with torch.no_grad():
        for block in model.layers:
            for name, parameter in block.named_parameters():
                if parameter.ndim > 1 and "q_proj" not in name:
                    parameter *= scale
    trials = [t for block in model_trials(model, count=4) for t in block]
    assert all(t.ratio <= t.v_tight for t in trials)
    assert all(t.v_tight >= 1 for t in trials)
    if scale == 0.01:
        assert all(t.v_tight - t.ratio < 0.01 for t in trials)


def test_weights_are_read_head_by_head(tiny):
    """Against the products of the model's own matrices, d x d."""
    model, _ = tiny("albert")
    encoder = read_encoder(model)
    weights = block_weights(encoder, 0)
    assert weights is not None
    attention = encoder.blocks[0].module.attention
    norms = block_norms(weights)
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)
        product = attention.dense.weight[:, rows].double() @ attention.value.weight[rows].double()
        wanted = torch.linalg.matrix_norm(product, ord=2).item()
        assert norms.vo_h[head].item() == pytest.approx(wanted, rel=1e-9)
        assert head_norms(encoder)[0][head].item() == pytest.approx(wanted, rel=1e-9)
    ffn = encoder.blocks[0].module.ffn.weight
    assert norms.w1 == pytest.approx(torch.linalg.svdvals(ffn.double())[0].item(), rel=1e-9)
    assert norms.gain2 == encoder.blocks[0].norms[1].module.weight.abs().max().item()


def test_blocks_that_share_modules_are_read_once(tiny, monkeypatch):
    from bert_oversmoothing.analysis import bound

    calls = []

    def counted(weights):
        calls.append(weights)
        return block_norms(weights)

    monkeypatch.setattr(bound, "block_norms", counted)
    norms = model_norms(read_encoder(tiny("albert")[0]))
    assert len(calls) == 1
    assert norms[0] is norms[1] is norms[2]
    assert len(model_norms(read_encoder(tiny("bert")[0]))) == 3
    assert len(calls) == 4


def test_missing_gains_are_one_and_layer_scale_is_read(tiny):
    model, _ = tiny("dinov2")
    encoder = read_encoder(model)
    with torch.no_grad():
        encoder.blocks[1].module.layer_scale1.lambda1[3] = -7.0
        encoder.blocks[1].norms[0].module.weight = None
    norms = model_norms(encoder)
    assert norms[1].scale1 == 7.0
    assert norms[1].gain1 == 1.0
    assert norms[0].gain1 != 1.0


def test_gated_and_unknown_models_have_no_bound(tiny):
    import transformers as hf

    encoder = read_encoder(tiny("modernbert")[0])
    assert model_norms(encoder) == [None] * 3
    assert all(norms.shape == (4,) for norms in head_norms(encoder))
    with pytest.raises(UserError, match="gated feed-forward"):
        model_trials(tiny("modernbert")[0])
    gpt2 = hf.GPT2Model(hf.GPT2Config(vocab_size=9, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    assert head_norms(read_encoder(gpt2)) == [None]
    with pytest.raises(UserError, match="no bound: unknown family"):
        model_trials(gpt2)


def norms_of(order="post", lip=1.0):
    vo = torch.tensor([0.5, 0.25], dtype=torch.float64)
    return BlockNorms(vo, 0.3, 0.2, 1.0, 1.0, 1.0, 1.0, lip, order)


def test_the_metric_takes_medians_over_all_batches():
    """By hand, for three texts in two batches, two blocks of which one has no bound."""
    metric = ContractionBound([norms_of(), None])
    lam = torch.tensor([[1.0, 0.25], [0.0, 0.0], [4.0, 1.0]])
    sigma1, sigma2 = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 1.5, 2.0])
    distance = torch.tensor([[2.0, 1.0, 4.0], [1.0, 0.5, 1.0], [0.5, 0.5, 3.0]])
    for part in (slice(0, 2), slice(2, 3)):
        nothing = [sigma1[part], None], [sigma2[part], None]
        metric.update(distance[:, part], [lam[part]] * 2, *nothing)
    found = metric.compute()
    tight = [1.06 * (1 + a) / s for a, s in ((0.625, 1.0), (0.0, 3.0), (1.25, 1.0))]
    assert found.v_tight[0] == pytest.approx(sorted(tight)[1])
    assert found.vacuous_share[0] == pytest.approx(2 / 3)
    assert found.contraction == pytest.approx([0.5, 1.0])
    ratios = (0.5, 0.5, 0.25)
    assert found.tightness[0] == pytest.approx(
        max(r / t for r, t in zip(ratios, tight, strict=True))
    )
    assert found.texts == [3, 0]
    assert math.isnan(found.v_tight[1])
    assert math.isnan(found.tightness[1])
    wanted = v_paper(norms_of(), lam, sigma1, sigma2).median().item()
    assert found.v_paper[0] == pytest.approx(wanted)


def test_a_text_without_distance_does_not_count():
    metric = ContractionBound([norms_of("pre")])
    one = torch.ones(2)
    metric.update(torch.tensor([[0.0, 1.0], [0.0, 2.0]]), [torch.ones(2, 2)], [one], [one])
    found = metric.compute()
    assert found.texts == [1]
    assert found.contraction == [2.0]
    assert found.v_tight == v_tight(norms_of("pre"), torch.ones(1, 2), one[:1], one[:1]).tolist()


def test_without_a_text_all_is_missing():
    metric = ContractionBound([norms_of()])
    with pytest.warns(UserWarning, match="before the ``update``"):
        found = metric.compute()
    assert found.texts == [0]
    assert all(math.isnan(value[0]) for value in found[:5])


def test_two_processes_join_their_texts():
    """As torchmetrics joins states: concatenated along the texts."""
    whole, half, other = (ContractionBound([norms_of()]) for _ in range(3))
    one = torch.ones(1)
    for metric, d in ((half, 1.0), (other, 3.0)):
        given = torch.tensor([[2.0], [d]]), [torch.full((1, 2), d)], [one], [one]
        metric.update(*given)
        whole.update(*given)
    half.values = torch.cat([half.per_text(), other.per_text()])
    assert half.compute() == whole.compute()
