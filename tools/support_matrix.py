"""Write docs/support.md from the families' own tables and the golden tests: `python tools/support_matrix.py`.

A test compares the file with what this makes, so the page cannot say more than is tested.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "support.md"
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from miaotui.checkpoint.gguf import DENSE_TYPES  # noqa: E402
from miaotui.model import rope  # noqa: E402
from miaotui.model.build import CACHE_TYPES, COMPUTE_TYPES  # noqa: E402
from miaotui.model.families import FAMILIES, Family  # noqa: E402
from miaotui.quant.pack import KINDS  # noqa: E402
from tests.golden.models import CASES  # noqa: E402

HEAD = """\
# What runs

Written by `tools/support_matrix.py` from the code's own tables; do not edit.

## Families

**yes** means golden: the logits of tiny random models of that family, read from that format, prefilled in chunks and
decoded token by token through the paged cache, lie within 1e-4 (relative, float32) of transformers' whole forward
pass, in every test run. `cuda` runs the code of `reference` on a GPU; the test run has none, hence *untested*.
"""

RULES = """\
Frequencies equal transformers' in float32. Two kinds depend there on the length reached so far, which no cache of
turned keys can follow; here they are fixed by `--max-model-len`:

- `dynamic`: the base for a sequence exactly that long. By default that is the original context, unscaled; ask for up
  to `factor` times as much.
- `longrope`: the long factors when it exceeds the original context, else the short ones. By default it is the full
  context, so the long ones.
"""

REFUSED = """\
An architecture, a key of `config.json` or a GGUF key that is not understood and is not off is refused by name. So is a
tensor that is missing, left over or of another shape than the configuration says.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, *_table(("Family", "Architecture", "Format", "cpu", "reference", "cuda"), _family_rows())]
    parts += ["", "What each brings:", "", *(f"- {family.title}: {_traits(family)}." for family in FAMILIES)]
    parts += ["", "## Rotary scaling", "", _list(kind for kind in rope.PARAMETERS if kind != "divided"), "", RULES]
    parts += ["## Weights, compute, cache", "", *_table(("What", "Kinds"), _kinds()), "", "## Refused", "", REFUSED]
    return "\n".join(parts).rstrip() + "\n"


def _family_rows() -> Iterator[tuple[str, ...]]:
    for family in FAMILIES:
        files = {case.gguf for case in CASES if case.family == family.name}
        golden = "yes" if files else "no"
        yield (family.title, _list(family.architectures), "safetensors", golden, golden, "untested")
        name = family.gguf or ("llama" if True in files else None)
        if name is not None:
            golden = "yes" if True in files else "no"
            yield (family.title, f"`{name}`", "GGUF", golden, golden, "untested")


def _traits(family: Family) -> str:
    """A family's switches in words."""
    windows = {
        "none": "",
        "all": "a sliding window on all layers where the configuration has one",
        "late": "a sliding window on later layers where it is switched on",
        "pattern": f"a sliding window on all layers but one in {family.period}",
        "without_rope": "layers without rotary embedding",
    }
    traits = (
        (family.routed, "routed experts"),
        (True, windows[family.window]),
        ("attn_logit_softcapping" in family.keys, "capped scores and logits"),
        (family.sliding_rope_theta is not None, "a rotary embedding for each kind of layer"),
        (family.qk_norm, "normalised queries and keys"),
        (family.post_norm and family.pre_norm, "norms before and after each block"),
        (family.post_norm and not family.pre_norm, "norms after each block only"),
        (family.norm_kind == "layer", "LayerNorm"),
        (not family.gated_mlp, "a plain MLP"),
        (any(family.biases), "biases"),
        (len(family.hf_names.roles["qkv"]) == 1, "merged projections"),
        ("partial_rotary_factor" in family.keys, "partly turned heads"),
        ("residual_multiplier" in family.keys, "scaled embeddings, residuals, scores and logits"),
        (family.embedding_root, "scaled embeddings"),
    )
    return ", ".join(text for there, text in traits if there and text) or "the plain decoder"


def _kinds() -> Iterator[tuple[str, str]]:
    yield (
        "safetensors",
        "`F32` `F16` `BF16`; compressed-tensors (pack-, int- and float-quantized, sparse-bitmask), GPTQ, AWQ",
    )
    yield ("GGUF", _list((*DENSE_TYPES, *KINDS)))
    yield ("`--compute`", _list(COMPUTE_TYPES))
    yield ("`--kv-cache-dtype`", _list(CACHE_TYPES))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _list(names: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)
