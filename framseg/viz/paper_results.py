"""Numbers that papers report on the real QVHighlights, in percent, under the official metric names. None was measured
by this code; what the paper leaves open is absent."""

TABLE_I_COLUMNS = (
    "MR-full-R1@0.5",
    "MR-full-R1@0.7",
    "MR-full-mAP",
    "MR-full-mAP@0.5",
    "MR-full-mAP@0.75",
    "HL-min-VeryGood-mAP",
    "HL-min-VeryGood-Hit1",
)


def _row(*values: float | None) -> dict[str, float]:
    return {name: value for name, value in zip(TABLE_I_COLUMNS, values, strict=True) if value is not None}


# Table I: test split.
TEST = {
    "the paper": _row(60.77, 37.42, 35.28, 56.26, 35.80, 34.48, 56.74),
    "Moment-DETR": _row(52.89, 33.02, 30.73, 54.82, 29.40, 35.69, 55.60),
    "Chrono": _row(74.77, 60.51, 51.37, 68.12, 53.38, None, None),
    "LLaVA-MR": _row(76.59, 61.48, None, 69.41, 54.40, None, None),
    "SMART": _row(78.15, 63.16, None, 70.76, 55.54, None, None),
    "Tempo-R0": _row(78.52, 65.23, None, None, 54.50, None, None),
    "VTG-LLM": _row(None, None, None, None, None, 16.50, 33.50),
    "VideoChat-T": _row(None, None, None, None, None, 27.00, 55.30),
    "TempSamp-R1": _row(None, None, None, None, None, 30.00, 57.60),
}

# The paper's own system. What models the others in Table I are made of is not known here.
SYSTEM_COLUMNS = ("base model", "size", "trained parameters", "frames", "kind of method")
SYSTEM = ("BLIP-3", "4.36 B", 135_067_392, 25, "frame segmentation")

# Val split, as the authors report it: the masks after epoch 11, and the final predictions' windows without padding.
VAL = {
    "masks of epoch 11": _row(64.66, 43.73, 35.01, 55.77, 35.90, None, None),
    "final predictions": _row(64.84, 43.74, 35.46, 56.35, 35.81, 34.64, 58.52),
}

# Table IV: the paper's model on the val split after each of the epochs 1 to 11.
BY_EPOCH_COLUMNS = ("MR-full-R1@0.7", "MR-full-mAP", "MR-full-mAP@0.75")
_BY_EPOCH = (
    (2.22, 13.28, 11.80, 17.78, 30.14, 35.61, 37.86, 36.62, 43.15, 42.70, 43.74),
    (2.50, 7.61, 10.87, 15.65, 24.53, 29.41, 30.71, 29.96, 33.99, 33.72, 35.01),
    (1.89, 6.98, 9.41, 14.04, 24.03, 29.49, 30.65, 29.96, 35.09, 34.06, 35.90),
)
BY_EPOCH = tuple(dict(zip(BY_EPOCH_COLUMNS, values, strict=True)) for values in zip(*_BY_EPOCH, strict=True))

# Class balance of the training frames: background frames per foreground frame, and the background's share.
CLASS_RATIO = 2.3378
BACKGROUND_SHARE = 0.7004
