"""Moment and highlight detection by frame segmentation with a multimodal LLM."""


def __getattr__(name: str):
    # Looked up on first use: the pure modules (evaluate, moments, …) must not wait for torch.
    if name == "predict":
        from framseg.predictor import predict

        return predict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
