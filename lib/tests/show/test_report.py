"""The HTML report holds the trace, works in a real browser, and no text in it can do harm."""

import base64
import hashlib
import json
import os
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from real_models import TINY_LLAMA
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from upcycling.routing.metrics import domain_specialization
from upcycling.routing.trace import RoutingTrace
from upcycling.routing.typed_text import token_texts
from upcycling.show.report import save_report

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=http://127.0.0.1:9/x onerror=alert(1)>",
    "<!--<script>",
    "]]>",
    "&lt;b&gt;",
    "😀",
    "👨‍👩‍👧",
    "שלום",
    "\u202eevil\u202c",
    "a" * 10_000,
    "\x00",
    "\x1b[31m",
    "\u2028\u2029",
    "\n",
    "\t",
    "  ",
    "",
    "\\u003c/script>",
    "${alert(1)}",
    "@DATA@@SCRIPT@",
    "\ufffd",
    "é́́́",
]


def trace_of(n=40, layers=(1, 4), experts=6, top_k=2, seed=0, **changes):
    """A trace of `n` tokens in sequences of ten, whose ids run through the hostile texts."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(layers), n, experts, generator=generator)
    probabilities = logits.softmax(-1)
    weights, ids = probabilities.topk(top_k)
    fields = dict(
        layers=layers,
        logits=logits,
        probabilities=probabilities,
        expert_ids=ids,
        weights=weights / weights.sum(-1, keepdim=True),
        tokens=torch.arange(n) % len(HOSTILE),
        sequence=torch.arange(n) // 10,
        position=torch.arange(n) % 10,
    )
    return RoutingTrace(**fields | changes)


class Hostile:
    """A tokenizer whose tokens are the hostile texts."""

    def id_to_token(self, token):
        return HOSTILE[token] if token < len(HOSTILE) else None

    def decode(self, ids, skip_special_tokens):
        return "".join(HOSTILE[token] for token in ids)


class Page(HTMLParser):
    """Elements with their attributes, and the text of each script, style and of the rest, as a browser parses them."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.inside, self.scripts, self.text = [], None, [], ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "report.html"


def test_the_data_are_the_trace(path):
    trace = trace_of()
    labels = ["code" if i < 20 else "stories" for i in range(40)]
    assert save_report(trace, str(path), labels=labels, title="A title") == path
    data = Page(path).data
    assert (data["title"], data["layers"], data["experts"], data["top_k"], data["total"]) == (
        "A title",
        [1, 4],
        6,
        2,
        40,
    )
    assert data["ids"] == trace.tokens.tolist() and data["texts"] == [str(token) for token in data["ids"]]
    assert data["sequence"] == trace.sequence.tolist() and data["position"] == trace.position.tolist()
    assert data["chosen"] == trace.expert_ids.tolist()
    assert np.abs(np.array(data["weights"]) / 1000 - trace.weights.numpy()).max() <= 0.0005001
    assert np.abs(np.array(data["probabilities"]) / 1000 - trace.probabilities.numpy()).max() <= 0.0005001
    counts = [torch.bincount(ids.flatten(), minlength=6) / 80 for ids in trace.expert_ids]
    assert np.allclose(data["loads"], torch.stack(counts))
    assert [data["labels"][i] for i in data["label"]] == labels
    numbers = torch.tensor([data["labels"].index(label) for label in labels])
    shares = [domain_specialization(ids, numbers, 6) for ids in trace.expert_ids]
    assert np.abs(np.array(data["shares"]) / 1000 - torch.stack(shares).numpy()).max() <= 0.0005001
    assert data["alarm"] is None and data["collapsed"] == []


def test_a_collapsed_layer_raises_the_alarm(path):
    ids = trace_of(400, experts=16).expert_ids
    ids[1] = torch.tensor([3, 5])
    save_report(trace_of(400, experts=16, expert_ids=ids), path)
    data = Page(path).data
    assert data["collapsed"] == [4] and "layer 4" in data["alarm"]


def test_a_long_trace_is_cut_but_counted_whole(path):
    save_report(trace_of(5000), path, labels=["a"] * 2500 + ["b"] * 2500)
    data = Page(path).data
    assert len(data["ids"]) == len(data["chosen"][0]) == len(data["label"]) == 2000 and data["total"] == 5000
    assert data["labels"] == ["a", "b"] and np.sum(data["shares"][0][1]) > 1900, "the table counts the tokens left out"
    save_report(trace_of(50), path, max_tokens=7)
    assert len(Page(path).data["ids"]) == 7


def test_a_large_model_has_fewer_tokens(path, monkeypatch):
    monkeypatch.setattr("upcycling.show.report._MOST_VALUES", 2 * 6 * 15)
    save_report(trace_of(40), path)
    assert len(Page(path).data["ids"]) == 15


def test_sequences_recorded_by_turns_are_put_in_order(path):
    turns = dict(sequence=torch.arange(40) % 2, position=torch.arange(40) // 2, tokens=torch.arange(40))
    trace = trace_of(**turns)
    save_report(trace, path, labels=list(range(40)))
    data = Page(path).data
    assert data["ids"] == [*range(0, 40, 2), *range(1, 40, 2)]
    assert [data["labels"][i] for i in data["label"]] == [str(token) for token in data["ids"]]
    assert data["chosen"][1] == trace.expert_ids[1][data["ids"]].tolist()


def test_what_cannot_be_reported_is_refused(path):
    with pytest.raises(ValueError, match="40 tokens"):
        save_report(trace_of(), path, labels=["a"])
    with pytest.raises(ValueError, match="51 different labels"):
        save_report(trace_of(51), path, labels=list(range(51)))
    probabilities = trace_of().probabilities
    probabilities[0, 3, 2] = float("nan")
    with pytest.raises(ValueError, match="diverged"):
        save_report(trace_of(probabilities=probabilities), path)
    for few in (0, -1):
        with pytest.raises(ValueError, match=f"max_tokens={few} leaves nothing"):
            save_report(trace_of(), path, max_tokens=few)
    with pytest.raises(ValueError, match="empty"):
        save_report(RoutingTrace(**{
            "layers": [0], "logits": np.zeros((1, 0, 4)), "probabilities": np.zeros((1, 0, 4)),
            "expert_ids": np.zeros((1, 0, 2)), "weights": np.zeros((1, 0, 2)),
            "tokens": [], "sequence": [], "position": [],
        }), path)  # fmt: skip
    assert not path.exists()


def test_a_failed_write_leaves_the_former_file(path, monkeypatch):
    save_report(trace_of(), path, title="former")
    former = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_report(trace_of(), path, title="new")
    assert path.read_bytes() == former and [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_hostile_texts_stay_data(path):
    save_report(trace_of(), path, tokenizer=Hostile(), labels=HOSTILE[:20] * 2, title="".join(HOSTILE))
    raw = path.read_bytes()
    assert raw.decode("utf-8").count("<script") == 2 and b"\x00" not in raw
    page = Page(path)
    assert page.data["texts"] == [HOSTILE[i % len(HOSTILE)] for i in range(40)]
    assert page.data["title"] == "".join(HOSTILE)
    assert set(page.data["labels"]) == set(HOSTILE[:20])
    assert not any(character in page.scripts[0] for character in "<>&\u2028\u2029")
    assert "alert" not in page.text and [tag for tag, _ in page.elements].count("script") == 2


def test_the_page_refers_to_nothing_outside(path):
    save_report(trace_of(), path)
    page = Page(path)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    for tag in ("style", "script"):  # what the policy lets through is what stands between the tags
        text = path.read_text(encoding="utf-8").split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    for tag, attributes in page.elements:
        assert not {"src", "href", "style"} & set(attributes) and not any(name.startswith("on") for name in attributes)
        assert tag not in ("link", "img", "iframe", "object", "base")
    code = page.scripts[1]
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch(", "http"):
        assert word not in code


def test_every_control_has_a_name(path):
    save_report(trace_of(), path)
    elements = Page(path).elements
    ids = {a["id"] for _, a in elements if "id" in a}
    labelled = {a["for"] for tag, a in elements if tag == "label"}
    for tag, attributes in elements:
        if tag in ("select", "input"):
            assert attributes["id"] in labelled
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids


# --- tokenizers


def test_texts_of_a_byte_level_tokenizer():
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet | {"Ġa": 256}, merges=[("Ġ", "a")]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    ids = [256, alphabet["Ċ"], alphabet["Ã"], 257, 999, -1, 256]
    assert token_texts(tokenizer, torch.tensor(ids)) == [" a", "\n", "\ufffd", "<|end|>", "[999]", "[-1]", " a"]


@pytest.mark.parametrize("wrapped", [False, True], ids=["tokenizers", "transformers"])
def test_texts_of_a_real_tokenizer_join_to_the_text(wrapped):
    if wrapped:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
        ids = tokenizer("Once upon a time, Lily").input_ids
    else:
        tokenizer = Tokenizer.from_file(str(TINY_LLAMA / "tokenizer.json"))
        ids = tokenizer.encode("Once upon a time, Lily").ids
    texts = token_texts(tokenizer, ids)
    assert "".join(texts).removeprefix("<s>").strip() == "Once upon a time, Lily"
    assert token_texts(tokenizer, [10**6]) == ["[1000000]"]


# --- in a browser

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium; install one or set CHROMIUM to its path")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, path):
    """Opens the report; what it said, asked for or popped up must be nothing in the end."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    seen = []
    page.on("dialog", lambda dialog: (seen.append(("dialog", dialog.message)), dialog.dismiss()))
    page.on("console", lambda message: seen.append((message.type, message.text)))
    page.on("pageerror", lambda error: seen.append(("error", str(error))))
    page.on("request", lambda request: seen.append(("request", request.url)))

    def open_page():
        page.goto(path.as_uri())
        return page

    yield open_page
    page.wait_for_load_state("networkidle")
    assert seen == [("request", path.as_uri())]
    page.close()


@pytest.mark.browser
def test_hostile_texts_render_harmlessly(opened, path):
    title = "".join(HOSTILE)
    save_report(trace_of(), path, tokenizer=Hostile(), labels=HOSTILE[:20] * 2, title=title)
    page = opened()
    texts = page.locator(".token bdi").all_inner_texts()
    assert texts[0].startswith("</script><script>alert(1)")
    assert texts[9] == "a" * 40 + "…"
    assert texts[5:8] == ["😀", "👨‍👩‍👧", "שלום"]
    assert texts[8] == "\\u{202E}evil\\u{202C}"
    assert texts[10:17] == ["\\u{0}", "\\u{1B}[31m", "\\u{2028}\\u{2029}", "↵", "⇥", "␣␣", "∅"]
    assert page.evaluate("document.querySelectorAll('img, script:not(#data)').length") == 1
    for i in range(len(HOSTILE)):
        page.locator(".token").nth(i).click()
        assert page.locator("#way-title bdi").inner_text() == page.evaluate("i => visible(data.texts[i])", i)
    page.locator(".token").nth(9).click()
    assert "10,000 characters" in page.locator("#token-facts").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out of the page"


@pytest.mark.browser
def test_keyboard(opened, path):
    trace = trace_of(60)
    save_report(trace, path, labels=["code"] * 30 + ["stories"] * 30, title="Keys")
    page = opened()
    assert page.title() == page.locator("h1").inner_text() == "Keys"
    focused = page.locator(":focus")

    page.keyboard.press("Tab")
    assert focused.get_attribute("id") == "layer"
    page.keyboard.press("ArrowRight")
    assert page.locator("#layer-name").inner_text() == "layer 4"
    assert focused.get_attribute("aria-valuetext") == "layer 4"
    numbers = page.locator(".token span").all_inner_texts()
    assert numbers == [" ".join(map(str, row)) for row in trace.expert_ids[1].tolist()]
    assert "layer 4" in page.locator("#labels-title").inner_text()

    page.keyboard.press("Tab")
    assert focused.get_attribute("id") == "only"
    page.keyboard.press("3")
    assert page.locator(".token:not(.dim)").count() == int((trace.expert_ids[1] == 3).sum())

    page.keyboard.press("Tab")
    assert focused.get_attribute("data-index") == "0"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "focus is visible"
    page.keyboard.press("ArrowRight")
    assert focused.get_attribute("data-index") == "1"
    bars = page.locator(".bar i").all_inner_texts()
    assert bars == [f"{p / 10:.1f} %" for p in np.rint(trace.probabilities[1, 1].numpy() * 1000)]
    chosen = page.locator(".bar.chosen b").all_inner_texts()
    assert sorted(chosen) == sorted(f"●{e}" for e in trace.expert_ids[1, 1].tolist())
    page.keyboard.press("ArrowDown")
    top = page.locator(".token").nth(1).bounding_box()["y"]
    assert focused.bounding_box()["y"] > top, "the line below"
    page.keyboard.press("ArrowUp")
    assert focused.get_attribute("data-index") == "1"
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert focused.get_attribute("data-index") == "59"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert focused.get_attribute("data-index") == "0"

    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    assert page.locator(".token:focus").count() == 0, "one stop for all tokens"
    page.keyboard.press("Shift+Tab")
    assert focused.get_attribute("data-index") == "1", "which remembers the token"
    page.keyboard.press("Home")

    assert page.locator("#way").is_hidden()
    page.keyboard.press("Enter")
    assert focused.get_attribute("aria-selected") == "true"
    rows = page.locator("#way-table tbody tr").all_inner_texts()
    for row, layer, ids in zip(rows, trace.layers, trace.expert_ids[:, 0].tolist(), strict=True):
        assert f"layer {layer}" in row and all(f"{e} · " in row for e in ids)
    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    assert page.locator("[role=option][aria-selected=true]").get_attribute("data-index") == "1"
    assert page.locator("#way-status").inner_text() == "Following token 2 of 60."


@pytest.mark.browser
def test_mouse_and_tables(opened, path):
    trace = trace_of(400, experts=16)
    ids = trace.expert_ids
    ids[1] = torch.tensor([3, 5])
    labels = ["code"] * 200 + ["stories"] * 200
    trace = trace_of(400, experts=16, expert_ids=ids)
    save_report(trace, path, tokenizer=Hostile(), labels=labels, max_tokens=100)
    page = opened()
    assert "400 tokens (the first 100 can be explored) · 2 MoE layers · 16 experts, top-2" in page.inner_text(
        "#summary"
    )
    assert "layer 4" in page.inner_text("#alarm")
    loads = [row.split("\t") for row in page.inner_text("#load-table tbody").splitlines() if row.strip()]
    assert any("⚠ layer 4" in row[0] for row in loads)
    last = page.locator("#load-table tbody tr").last.locator("td").all_inner_texts()
    assert last[1:] == ["8.00", "3", "14"]
    page.locator(".token").nth(5).hover()
    assert page.locator("#token-title").inner_text() == "😀"
    page.mouse.move(5, 5)
    assert page.locator("#token-title").inner_text().startswith("</script>"), "back to the focused token"
    cells = page.locator("#labels-table tbody tr").first.locator("td").all_inner_texts()
    share = domain_specialization(trace.expert_ids[0], torch.arange(400) // 200, 16)[:, 0]
    everyone = float((trace.expert_ids[0] == 0).any(-1).float().mean())
    assert [float(cell.removesuffix(" %")) for cell in cells] == pytest.approx(
        [100 * everyone, *(100 * share).tolist()], abs=0.0501
    )
    groups = page.locator("#tokens [role=group]").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    assert groups == [f"sequence {i}, code" for i in range(10)]
    roles = page.locator("#tokens").aria_snapshot()
    assert roles.startswith('- listbox "Tokens"') and "option" in roles


@pytest.mark.browser
def test_the_policy_forbids_the_network_and_other_scripts(browser, path):
    save_report(trace_of(), path)
    page = browser.new_page()
    page.goto(path.as_uri())
    page.evaluate("""async () => {
        window.seen = [];
        document.addEventListener("securitypolicyviolation", event => seen.push(event.effectiveDirective));
        document.body.append(Object.assign(document.createElement("img"), {src: "http://127.0.0.1:9/x"}));
        document.body.append(Object.assign(document.createElement("script"), {textContent: "window.ran = true"}));
        await fetch("http://127.0.0.1:9/").catch(() => 0);
    }""")
    page.wait_for_function("seen.length === 3")
    assert page.evaluate("seen.sort()") == ["connect-src", "img-src", "script-src-elem"]
    assert page.evaluate("window.ran === undefined")
    page.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(browser, path, scheme):
    save_report(trace_of(), path, labels=["a", "b"] * 20)
    page = browser.new_page(color_scheme=scheme)
    page.goto(path.as_uri())
    worst = page.evaluate("""() => {
        const channels = colour => colour.match(/[\\d.]+/g).map(Number);
        const luminance = rgb => rgb.slice(0, 3).map(c => c / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const background = element => {
            if (!element) return [255, 255, 255];
            const [r, g, b, alpha = 1] = channels(getComputedStyle(element).backgroundColor);
            const below = alpha < 1 ? background(element.parentElement) : [0, 0, 0];
            return [r, g, b].map((c, i) => c * alpha + below[i] * (1 - alpha));
        };
        const contrast = element => {
            const pair = [luminance(channels(getComputedStyle(element).color)), luminance(background(element))];
            return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
        };
        const readable = document.querySelectorAll("h1, h2, h3, p, label, output, td, th, .bar b, .bar i, .token span");
        return Math.min(...[...readable].filter(e => e.offsetParent && e.textContent.trim()).map(contrast));
    }""")
    page.close()
    assert worst >= 4.5
