"""llm-compressor's GPTQ, int4 symmetric in groups of 64, the head left alone. Run by its own environment's Python:

PYTHON benchmarks/quantise_peer.py MODEL WINDOWS.json OUT
"""

import json
import sys
from pathlib import Path


def main(model_path: str, windows: str, out: str) -> None:
    import datasets
    import llmcompressor
    import torch
    import transformers
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    rows = json.loads(Path(windows).read_text())
    data = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=512, num_calibration_samples=len(rows))
    model.save_pretrained(out, save_compressed=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (Path(model_path) / name).exists():
            (Path(out) / name).write_bytes((Path(model_path) / name).read_bytes())
    print(json.dumps({"llmcompressor": llmcompressor.__version__, "torch": str(torch.__version__)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
