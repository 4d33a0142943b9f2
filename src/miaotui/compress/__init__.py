"""Compression: calibrate once, then try every scheme on each layer. Needs PyTorch (the extra `compress`)."""
