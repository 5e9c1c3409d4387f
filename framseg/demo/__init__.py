"""The embedded demo: a synthetic video set in QVHighlights' format and a small base model that can read it."""
