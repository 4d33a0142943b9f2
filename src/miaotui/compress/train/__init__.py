"""Training: a student learns from a text, and from a teacher that reads it too (`miaotui distill`).

- `network.py`: the one decoder over windows, from tensors by place. `student.py`: the tensors that are trained.
- `losses.py`: pure functions. `objective.py`: what they add up to, and its gradient, in chunks of rows.
- `corpus.py`, `loader.py`: texts as windows of tokens, drawn in an order that a seed decides.
- `settings.py`, `schedule.py`, `state.py`, `group.py`, `journal.py`, `privacy.py`, `pupil.py`: what the loop needs.
- `loop.py`: the trainer.
"""
