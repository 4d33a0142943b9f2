"""Calibration text that the model writes itself, through the engine: for `compress.data.windows(write=…)`.

Sampled from the model's own distribution (temperature 1), as data-free methods do: Liu et al. 2023, LLM-QAT, §3.1;
Williams, Chrysostomou and Aletras 2024, Self-calibration for Language Model Quantization and Pruning. Each run begins
after BOS (after an end of text, where the model has no BOS) and goes on past the ends of texts, as the packed windows
do that models are trained on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaotui.errors import UsageError

if TYPE_CHECKING:
    from miaotui.compress.text.packing import Ids, Write
    from miaotui.engine.llm import LLM

VERSION = 1
"""Changes when the same arguments would give other ids."""

log = logging.getLogger(__name__)


def self_text(model: str, *, shown: bool = False, tell: Callable[[str], None] = log.info, **options: Any) -> Write:
    """A callable that loads `model` (with `options` of LLM), lets it write, and closes it.

    What was written is kept in the cache folder, by the model's fingerprint, and not written again. `tell` hears a
    line when it is; `shown` puts a bar on stderr. Calling it raises UsageError for a model with neither BOS nor an
    end of text, and what loading raises.
    """

    def write(count: int, length: int, seed: int) -> Ids:
        file = _file(model, (count, length, seed), options)
        found = _read(file, (count, length))
        if found is None:
            tell(f"The model writes {count} × {length} tokens to be calibrated with.")
            found = _written(model, (count, length), seed, shown, options)
            _keep(file, found)
        return found

    return write


def _written(model: str, shape: tuple[int, int], seed: int, shown: bool, options: dict[str, Any]) -> Ids:
    import numpy as np

    from miaotui.engine.llm import LLM
    from miaotui.engine.params import SamplingParams

    count, length = shape
    with LLM(model, max_model_len=length + 1, **options) as llm:
        first, allowed = _first(llm), _allowed(llm)
        params = [
            SamplingParams(max_tokens=length, seed=_seed(seed, run), ignore_eos=True, allowed_token_ids=allowed)
            for run in range(count)
        ]
        outputs = llm.generate([[first]] * count, params, use_tqdm=shown)
    return np.array([output.outputs[0].token_ids for output in outputs], np.int32)


def _first(llm: LLM) -> int:
    """What a text begins after."""
    tokenizer = llm.tokenizer
    first = tokenizer.bos_id if tokenizer.bos_id is not None else next(iter(tokenizer.eos_ids), None)
    if first is None:
        raise UsageError(f"{llm.model} has no token that a text begins after.", "Give the calibration a file.")
    return first


def _allowed(llm: LLM) -> list[int] | None:
    """The tokens that the tokenizer has, where the model's table was filled up beyond them; None for all."""
    known = set(llm.tokenizer.backend.get_vocab().values())
    return None if len(known) >= llm.spec.vocab_size else sorted(known)


def _seed(seed: int, run: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {run}".encode(), digest_size=7).digest())


# -- kept --------------------------------------------------------------------------------------------------
def _file(model: str, arguments: tuple[int, int, int], options: dict[str, Any]) -> Path:
    """Where what the model writes with these arguments is kept."""
    from miaotui.checkpoint import open_checkpoint, resolve
    from miaotui.checkpoint.demo import cache_folder

    key = (VERSION, open_checkpoint(resolve(model)).fingerprint(), arguments, sorted(options.items()))
    return (
        cache_folder() / "calibration" / f"self-{hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()}.npy"
    )


def _read(file: Path, shape: tuple[int, int]) -> Ids | None:
    """What is kept there; None where nothing is, or something else."""
    import numpy as np

    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if isinstance(found, np.ndarray) and (found.shape, found.dtype) == (shape, np.int32) else None


def _keep(file: Path, ids: Ids) -> None:
    """Write them; a folder that cannot be written costs the next run its time, and nothing else."""
    import numpy as np

    from miaotui.checkpoint.write import atomic_file

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as content:
            np.save(content, ids, allow_pickle=False)
    except OSError as error:
        log.warning("%s cannot be written (%s): the model will write its text again.", file, error)
