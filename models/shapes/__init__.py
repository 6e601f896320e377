"""The embedded world: scenes as data, captions, a renderer, an exact verifier, and the training of its models."""
