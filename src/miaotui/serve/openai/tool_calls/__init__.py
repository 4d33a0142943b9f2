"""Calls of tools in what a model writes: told apart from text as it comes, and enforced where they are required."""
