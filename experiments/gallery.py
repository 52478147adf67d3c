"""Takes the README's pictures: every explorer's page, as a browser without a network shows it.

    python experiments/gallery.py [--model smollm2-135m-instruct] [--out notebooks/gallery]

Needs playwright and Chromium or Chrome (both come with `make setup` and `.ci/run`).
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

import llama_probe as lp

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
NAMES = "Mary John Tom Anna Mary John Tom Anna Mary John"
PROMPTS = {
    "capital": ["The capital of France is", "The capital of Spain is", "The capital of Italy is",
                "The capital of Japan is", "The capital of Egypt is", "The capital of Norway is"],
    "sum": ["2 + 3 =", "4 + 1 =", "5 + 2 =", "6 + 3 =", "1 + 7 =", "3 + 4 ="],
    "story": ["Once upon a time there was", "The old man walked to", "She opened the door and",
              "In the garden there stood", "They sat by the fire and", "The boy looked up at"],
}  # fmt: skip
WIDTH = 1160


def explorers(model: lp.Llama) -> Iterator[tuple[str, lp.AttentionExplorer]]:
    """Each explorer, with the name of its picture."""
    yield "attention", lp.AttentionExplorer(model, NAMES)
    rope = lp.RopeExplorer(model, CLEAN)
    rope.select(query=len(model.to_str_tokens(CLEAN)) - 1, key=1, pair=2)
    yield "rope", rope
    yield "lens", lp.LogitLensExplorer(model, CLEAN, watch=[" Mary", " John"])
    yield (
        "patching",
        lp.PatchingExplorer(model, CLEAN, CORRUPTED, metric=lp.logit_diff(" Mary", " John")),
    )
    texts = [text for group in PROMPTS.values() for text in group]
    labels = [label for label, group in PROMPTS.items() for _ in group]
    yield "activations", lp.ActivationScatter(model, texts, labels=labels)


def picture(browser: Browser, page_path: Path, path: Path) -> None:
    """What the page shows, without its title."""
    page = browser.new_context(offline=True).new_page()
    page.set_viewport_size({"width": WIDTH, "height": 900})
    page.goto(page_path.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    page.locator(".linked").screenshot(path=path)
    page.close()


def main() -> None:
    """Take all of them."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default="smollm2-135m-instruct")
    options.add_argument("--out", type=Path, default=Path("notebooks/gallery"))
    chosen = options.parse_args()
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        sys.exit("no Chromium or Chrome: install Debian's package chromium")
    model = lp.load(chosen.model)
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for name, explorer in explorers(model):
            page = explorer.to_html(Path(folder) / f"{name}.html")
            picture(browser, page, chosen.out / f"{name}.png")
            print(f"{chosen.out / name}.png")
        browser.close()


if __name__ == "__main__":
    main()
