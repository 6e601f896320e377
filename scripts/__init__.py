"""Command lines beside the main ones."""
