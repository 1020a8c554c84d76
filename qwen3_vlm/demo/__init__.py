"""The embedded default: a small world of drawings, tiny bases, and the guided run on them."""
