"""Moment and highlight detection by frame segmentation with a multimodal LLM."""
