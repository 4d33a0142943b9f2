"""The methods, as pure functions over torch tensors: weights and statistics of their inputs in, codes or folds out.

- `grid.py`: scales and zero points, fitted to a weight; codes for them. `rtn.py`, `gptq.py`, `hqq.py`, `fp8.py` give
  a `Quantised` weight each.
- `awq.py`, `smooth.py`, `rotate.py` give equivalent weights that are easier to quantise, folded into neighbours.
- `qat.py` trains one decoder layer against the original's outputs.
"""
