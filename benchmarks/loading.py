"""Loading a GGUF file: CPU time of the call alone, and peak memory."""

import subprocess
import sys

import torch

import llama_probe as lp
from benchmarks.measure import Row, fastest, peak_megabytes
from llama_probe.checkpoints import catalogue

NAME = "smollm2-135m-instruct"


def loading() -> list[Row]:
    """SmolLM2 from its GGUF file, in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    file = catalogue.pull(NAME)

    def theirs() -> object:
        return AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )

    def ours() -> object:
        return lp.load(file, device="cpu", progress=False)

    best = fastest({"ours": ours, "theirs": theirs, "again": theirs}, 2)
    what = "GGUF load, SmolLM2 Q4_1"
    return [
        Row(what, "transformers", best["ours"], best["theirs"], 10.0),
        Row(what, "transformers against itself", best["again"], best["theirs"], None),
        _memory(),
        _shipped(),
    ]


def _shipped() -> Row:
    """The model in the box, in a fresh interpreter, after imports."""
    program = (
        "import time, llama_probe as lp, llama_probe.checkpoints.load, tokenizers; lp.Llama\n"
        "begun = time.perf_counter(); lp.load('tiny-moe', progress=False)\n"
        "print(time.perf_counter() - begun)"
    )
    runs = (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        for _ in range(3)
    )
    seconds = min(float(run.stdout) for run in runs)
    return Row("load of tiny-moe, fresh process, after imports", "1 s", seconds, 1.0, 1.0, "s")


def _memory() -> Row:
    file = catalogue.pull(NAME)
    ours = f"import llama_probe as lp; m = lp.load({str(file)!r}, device='cpu', progress=False)"
    theirs = (
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(file.parent)!r}, "
        f"gguf_file={file.name!r}, dtype=torch.float32)"
    )
    what = "GGUF load, SmolLM2 Q4_1: peak memory, imports included"
    return Row(
        what, "transformers", peak_megabytes(ours), peak_megabytes(theirs), 1.0, "MiB resident"
    )


def attention_memory() -> list[Row]:
    """A long forward pass with nothing listened to, against all patterns kept."""
    program = (
        "import torch, llama_probe as lp\n"
        f"m = lp.load({NAME!r}, device='cpu', progress=False)\n"
        "tokens = torch.randint(3, 49000, (1, 2048))\n"
        "with torch.no_grad():\n    "
    )
    bare = peak_megabytes(program + "m(tokens)")
    eager = peak_megabytes(program + "kept = m.run_with_cache(tokens, names_filter='*pattern')")
    what = "forward, SmolLM2, 1 × 2048: peak memory, imports and weights included"
    return [Row(what, "all patterns kept", bare, eager, round(1 / 0.6, 2), "MiB resident")]
