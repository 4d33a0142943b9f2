"""Text to calibrate and to train on: from files of any kind to windows of tokens."""
