"""The op contract in eager PyTorch: correct, plain, on any device. The slow twin of every fast op.

Needs PyTorch; importing `backend` raises ImportError where it is absent.
"""
