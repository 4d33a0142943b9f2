"""Training: a student learns from a text, and from a teacher that reads it too (`miaotui distill`).

- `network.py`: the one decoder over windows, from tensors by place. `teacher.py`, `student.py`: whose tensors they are;
  `coded.py`: students in integer codes; `folder.py`: a trained model as a folder.
- `losses.py`: pure functions. `objective.py`: what they add up to, and its gradient, in chunks of rows.
- `corpus.py`, `loader.py`: texts as windows of tokens, drawn in an order that a seed decides; `on_policy.py`: windows
  that the student wrote; `batches.py`: both, step by step. `judging.py`: on windows that are held out.
- `settings.py`, `schedule.py`, `state.py`, `group.py`, `journal.py`, `privacy.py`: what the loop needs. `loop.py`: the
  trainer. `distil.py`: all of it put together.
"""
