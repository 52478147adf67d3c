"""The demo: one indirect-object prompt pair, looked into from prediction to circuit.

The sentence (Wang et al. 2022, arXiv 2211.00593) ends where the model has to name the person who
has not been named twice. The corrupted one swaps who acts, and with it the right answer.
"""

from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from llama_probe import plots
from llama_probe.checkpoints.load import load
from llama_probe.hooks import act_name
from llama_probe.lens import direct_logit_attribution, logit_lens
from llama_probe.model.llama import Llama
from llama_probe.page.report import Report
from llama_probe.patching import logit_diff, patch
from llama_probe.widgets import PatchingExplorer

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
ANSWER, FOIL = " Mary", " John"
_N_HEADS = 3


def run_demo(model_name: str, out_path: Path) -> Path:
    """Look into the prompt pair and write an offline HTML report about it.

    Args:
        model_name: What `lp.load` takes.
        out_path: The HTML file.

    Returns:
        The file's path.

    Raises:
        LlamaProbeError: The model cannot be had or loaded, or the names are not single tokens of
            its vocabulary.
    """
    model = load(model_name)
    report = Report(f"Inside {model.cfg.model_name}")
    with tqdm(_SECTIONS.items(), bar_format="{desc} [{n}/{total}] {elapsed}") as sections:
        for title, section in sections:
            sections.set_description(title)
            section(report, model)
    return report.write(out_path)


def _predictions(report: Report, model: Llama) -> None:
    cfg = model.cfg
    report.text(
        f"{cfg.n_layers} layers, {cfg.n_heads} heads ({cfg.n_key_value_heads} for keys and "
        f"values), {cfg.d_model} wide, {sum(p.numel() for p in model.parameters()):,} parameters."
    )
    report.heading("What does it predict?")
    report.tokens(model.to_str_tokens(CLEAN), caption="The prompt, token by token:")
    metric = logit_diff(ANSWER, FOIL).on(model)
    rows = []
    for name, prompt in (("clean", CLEAN), ("corrupted", CORRUPTED)):
        logits = model(prompt, logits_at=-1)[:, -1]
        top = logits[0].softmax(-1).topk(3)
        rows.append(
            {
                "prompt": f"{name}: {prompt} …",
                "likeliest next tokens": ", ".join(
                    f"{token!r} {prob:.0%}"
                    for token, prob in zip(
                        model.to_str_tokens(top.indices), top.values.tolist(), strict=True
                    )
                ),
                f"logit of {ANSWER!r} − {FOIL!r}": round(float(metric(logits)), 2),
            }
        )
    report.table(pd.DataFrame(rows))


def _lens(report: Report, model: Llama) -> None:
    report.heading("What would each layer predict?")
    report.text(
        "The logit lens passes the residual stream, as it stands before each layer, through the "
        "last norm and the unembedding. The bottom row is the embedding, the top row the output."
    )
    frame = logit_lens(model, CLEAN)
    report.figure(
        plots.logit_lens(frame),
        "The likeliest next token at every layer and position, coloured by its probability",
        table=frame.query("rank == 0"),
    )


def _heads(report: Report, model: Llama) -> None:
    report.heading("Which parts write the answer?")
    report.text(
        "Direct logit attribution splits the final residual stream into what each head and each "
        f"feed-forward added, and takes each part's share of logit({ANSWER}) − logit({FOIL}). "
        "The last norm's scale is held fixed, so the parts sum to the whole."
    )
    frame = direct_logit_attribution(model, CLEAN, ANSWER, FOIL)
    report.figure(
        plots.direct_logit_attribution(frame),
        f"Share of each head and feed-forward in the logit difference of {frame.value.sum():.2f}",
        table=frame.sort_values("value", key=abs, ascending=False),
    )
    best = frame.query("kind == 'head'").sort_values("value", ascending=False).head(_N_HEADS)
    heads = list(zip(best.component, best.layer, best["head"], best.value, strict=True))
    names = [act_name("pattern", int(layer)) for _, layer, _, _ in heads]
    _, cache = model.run_with_cache(CLEAN, names_filter=names)
    tokens = model.to_str_tokens(CLEAN)
    for name, layer, head, value in heads:
        pattern = cache["pattern", int(layer)][0, int(head)].float().numpy(force=True)
        report.figure(
            plots.attention(pattern, tokens, title=f"Attention of {name}"),
            f"Where {name} looks; it adds {value:+.2f} to the logit difference",
        )


def _patching(report: Report, model: Llama) -> None:
    report.heading("Where is the name carried?")
    report.text(
        "Activation patching runs the corrupted prompt with one activation of the clean run put "
        "in. 1 means that this alone restores the clean prediction, 0 that it changes nothing."
    )
    metric = logit_diff(ANSWER, FOIL)
    stream = patch(model, CLEAN, CORRUPTED, metric=metric, progress=True)
    report.figure(
        plots.patch(stream),
        "Effect of patching the residual stream before each layer, at each position",
        table=stream,
    )
    heads = patch(model, CLEAN, CORRUPTED, metric=metric, at="z", progress=True)
    report.figure(
        plots.patch(heads),
        "Effect of patching the output of each head, at all positions",
        table=heads.sort_values("effect", key=abs, ascending=False),
    )


def _explore(report: Report, model: Llama) -> None:
    report.heading("Explore it")
    report.text(
        "A click on a cell of the map shows the sites and heads at that place, and where the head "
        "looks. Tab and arrow keys move, Enter selects."
    )
    explorer = PatchingExplorer(model, CLEAN, CORRUPTED, metric=logit_diff(ANSWER, FOIL))
    report.linked(explorer.linked())
    explorer.close()


_SECTIONS = {
    "what it predicts": _predictions,
    "what each layer would predict": _lens,
    "which parts write the answer": _heads,
    "where the name is carried": _patching,
    "views to click": _explore,
}
