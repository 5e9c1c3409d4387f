"""The four training losses, their weights over the epochs, and the learning rate over the steps.

The segmentation losses read the logits of the two digits where the model predicts frame i: [B, f, 2] in the order
'0' (background), '1' (foreground), and the soft targets s [B, f] in [0, 1], the annotators' mean saliency / 4. All
losses are scalars, computed in float32 or better.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from framseg import config

NAMES = ("lm", "bce", "tversky", "dice")  # the order of the weights


def _exact(values: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _classes(logits: Tensor, soft_targets: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities p and targets g = (1 - s, s) of both classes, each [B, f, 2]."""
    logits = _exact(logits)
    target = soft_targets.to(logits)
    return logits.softmax(-1), torch.stack([1 - target, target], dim=-1)


def lm(answer_logits: Tensor, answer_ids: Tensor) -> Tensor:
    """Cross-entropy on the answer alone: f digits and the end token.

    answer_logits: [B, f + 1, ids], the logits that predict answer_ids: int64 [B, f + 1].
    """
    return F.cross_entropy(_exact(answer_logits).flatten(0, 1), answer_ids.flatten())


def bce(logits: Tensor, soft_targets: Tensor, pos_weight: float) -> Tensor:
    """Binary cross-entropy of the logit z1 - z0 with s, foreground weighted by `pos_weight`; mean over all frames."""
    logits = _exact(logits)
    z, weight = logits[..., 1] - logits[..., 0], logits.new_tensor(pos_weight)
    return F.binary_cross_entropy_with_logits(z, soft_targets.to(z), pos_weight=weight)


def tversky(logits: Tensor, soft_targets: Tensor, alpha: float, beta: float, eps: float) -> Tensor:
    """Tversky loss with soft counts per sample and class over the frames, mean over samples and classes.

    tp = (|p| + |g| - |p - g|) / 2, fp = |p| - tp, fn = |g| - tp (L1 norms);
    1 - (tp + eps) / (tp + alpha fp + beta fn + eps).
    """
    p, g = _classes(logits, soft_targets)
    # The same number as tp above, without the rounding errors of a small difference of large sums.
    tp = torch.minimum(p, g).sum(1)
    fp, fn = p.sum(1) - tp, g.sum(1) - tp
    return (1 - (tp + eps) / (tp + alpha * fp + beta * fn + eps)).mean()


def generalized_dice(logits: Tensor, soft_targets: Tensor, eps: float) -> Tensor:
    """Generalized Dice loss, classes weighted by w_c = 1 / ((sum g_c)^2 + eps) in each sample, mean over samples.

    1 - (2 sum_c w_c sum p g + eps) / (sum_c w_c sum(p + g) + eps).
    """
    p, g = _classes(logits, soft_targets)
    w = 1 / (g.sum(1) ** 2 + eps)
    overlap, size = (p * g).sum(1), (p + g).sum(1)
    return (1 - (2 * (w * overlap).sum(-1) + eps) / ((w * size).sum(-1) + eps)).mean()


def weights(epoch: int, section: config.Losses) -> tuple[float, ...]:
    """Weights of LM, BCE, Tversky and generalized Dice in an epoch, counted from 1.

    `linear` goes from `start` at epoch 1 to `end` at epoch warmup_epochs + 1 and stays (the paper); `table` has a row
    per epoch, the last one for all that follow (the released variant). Raises ValueError for epochs below 1.
    """
    if epoch < 1:
        raise ValueError(f"epochs are counted from 1, got {epoch}")
    if section.schedule == "table":
        return section.table[min(epoch, len(section.table)) - 1]
    way = min((epoch - 1) / section.warmup_epochs, 1.0)
    return tuple((1 - way) * start + way * end for start, end in zip(section.start, section.end, strict=True))


def learning_rate(step: int, section: config.Training) -> float:
    """Learning rate of an optimizer step, counted from 0.

    Linear from 0 to the peak at `warmup_steps`, then a cosine down to `floor` x peak at `planned_steps`, and stays.
    """
    if step < section.warmup_steps:
        return section.learning_rate * step / section.warmup_steps
    way = min((step - section.warmup_steps) / (section.planned_steps - section.warmup_steps), 1.0)
    share = section.floor + (1 - section.floor) * (1 + math.cos(math.pi * way)) / 2
    return section.learning_rate * share
