"""Artefacts on disk: folders and GGUF files, written, and read back to be verified."""
