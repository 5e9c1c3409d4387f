import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framseg import config, losses

PAPER = config.load("paper")
L = PAPER.losses
SEGMENTATION = {
    "bce": lambda z, s: losses.bce(z, s, L.pos_weight),
    "tversky": lambda z, s: losses.tversky(z, s, L.tversky_alpha, L.tversky_beta, L.eps),
    "generalized_dice": lambda z, s: losses.generalized_dice(z, s, L.eps),
}


@pytest.fixture(scope="module")
def golden(shared):
    content = json.loads((shared / "golden/segmentation_losses.json").read_text())
    for key in ("logits", "soft_targets"):
        content[key] = torch.tensor(content[key], dtype=torch.float64)
    return content


@pytest.mark.parametrize("name", SEGMENTATION)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_values(golden, name, dtype):
    logits, soft = golden["logits"].to(dtype), golden["soft_targets"].to(dtype)
    assert SEGMENTATION[name](logits, soft).item() == pytest.approx(golden["expected"][name], abs=1e-6)
    hard = (soft >= 0.5).to(dtype)
    assert SEGMENTATION[name](logits, hard).item() == pytest.approx(golden["expected_hard"][name], abs=1e-6)


def test_tversky_is_the_formula_with_absolute_differences():
    z, s = torch.randn(3, 7, 2, dtype=torch.float64), torch.rand(3, 7, dtype=torch.float64)
    p, g = z.softmax(-1), torch.stack([1 - s, s], -1)
    tp = (p.sum(1) + g.sum(1) - (p - g).abs().sum(1)) / 2
    fp, fn = p.sum(1) - tp, g.sum(1) - tp
    expected = (1 - (tp + 1e-5) / (tp + 0.3 * fp + 0.7 * fn + 1e-5)).mean()
    torch.testing.assert_close(losses.tversky(z, s, 0.3, 0.7, 1e-5), expected)


@pytest.mark.parametrize("name", SEGMENTATION)
def test_gradients_against_finite_differences(name):
    torch.manual_seed(0)
    z = torch.randn(2, 6, 2, dtype=torch.float64, requires_grad=True)
    for s in (torch.rand(2, 6), torch.zeros(2, 6), torch.ones(2, 6)):
        assert torch.autograd.gradcheck(lambda z, s=s: SEGMENTATION[name](z, s.double()), z)


@pytest.mark.parametrize("name", SEGMENTATION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("level", [(1e4, -1e4), (-1e4, 1e4), (1e4, 1e4), (0.0, 0.0)])
def test_finite_at_extremes(name, dtype, target, level):
    z = torch.tensor(level, dtype=dtype).expand(2, 25, 2).clone().requires_grad_()
    loss = SEGMENTATION[name](z, torch.full((2, 25), target, dtype=dtype))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and z.grad.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-1e4, 1e4, width=32)] * 2, st.floats(0, 1, width=32)), min_size=1, max_size=30))
def test_finite_and_overlap_losses_between_0_and_1(frames):
    values = torch.tensor(frames)
    z, s = values[None, :, :2], values[None, :, 2]
    assert losses.bce(z, s, 2.3378).item() >= 0
    for name in ("tversky", "generalized_dice"):
        assert -1e-5 <= SEGMENTATION[name](z, s).item() <= 1 + 1e-5


def test_perfect_answer_costs_nothing_and_a_wrong_one_everything():
    s = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    right = torch.stack([1 - s, s], -1) * 100
    for name, loss in SEGMENTATION.items():
        assert loss(right, s).item() == pytest.approx(0, abs=1e-5), name
    assert losses.tversky(-right, s, 0.3, 0.7, 1e-5).item() == pytest.approx(1, abs=1e-4)
    assert losses.bce(-right, s, 2.0).item() == pytest.approx((2 * 2 + 2) / 4 * 100)


def test_lm_is_the_mean_over_all_answer_tokens():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 26, 40, dtype=torch.bfloat16), torch.randint(40, (2, 26))
    chosen = logits.float().log_softmax(-1).gather(-1, ids[..., None])
    loss = losses.lm(logits, ids)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, -chosen.mean())
    assert losses.lm(logits.double(), ids).dtype == torch.float64
    assert losses.lm(torch.full((1, 26, 40), -1e4).index_fill(-1, torch.tensor([3]), 1e4), ids[:1]).isfinite()


def test_linear_weights():
    assert losses.weights(1, L) == (1, 0, 0, 0)
    assert losses.weights(4, L) == pytest.approx((0.6, 0.13335, 0.13335, 0.13335))
    for epoch in (7, 8, 11, 100):
        assert losses.weights(epoch, L) == pytest.approx((0.2, 0.2667, 0.2667, 0.2667))
    with pytest.raises(ValueError, match="counted from 1"):
        losses.weights(0, L)


def test_table_weights():
    table = config.load("paper", {"losses.schedule": "table"}).losses
    fifteenths = [(15, 0, 0, 0), (12, 1, 1, 1), (9, 2, 2, 2), (6, 3, 3, 3), (3, 4, 4, 4), (3, 4, 4, 4)]
    for epoch, row in enumerate(fifteenths, start=1):
        assert losses.weights(epoch, table) == pytest.approx(tuple(x / 15 for x in row))
    assert losses.weights(11, table) == losses.weights(5, table)


def test_learning_rate_of_the_paper():
    def rate(step):
        return losses.learning_rate(step, PAPER.training)

    assert rate(0) == 0
    assert rate(141) == pytest.approx(1e-5)
    assert rate(282) == pytest.approx(2e-5)
    cosine = (1 + math.cos(math.pi * (618 - 282) / (1125 - 282))) / 2
    assert rate(618) == pytest.approx(2e-5 * (0.1 + 0.9 * cosine))
    assert rate(618) == pytest.approx(1.38194e-5, rel=1e-5)
    assert rate(1125) == pytest.approx(2e-6)
    assert rate(2000) == pytest.approx(2e-6)


def test_learning_rate_without_warm_up_starts_at_the_peak():
    training = config.load("paper", {"training.warmup_steps": 0}).training
    assert losses.learning_rate(0, training) == 2e-5
