"""The card: what was measured, as one checked document, and everything that is made of it to look at."""
