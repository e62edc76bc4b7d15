"""The panels: what is drawn for a state, what controls and clicks change, hostile texts, and all of it in a kernel."""

import base64
import io
import itertools
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import torch
from PIL import Image
from seen import Reader

from upcycling.core.config import ModelConfig, MoEConfig
from upcycling.core.model import DecoderLM
from upcycling.routing import typed_text
from upcycling.routing.metrics import router_saturation
from upcycling.routing.snapshots import RoutingSnapshots
from upcycling.routing.trace import RoutingTrace
from upcycling.show import explorer, panel, what_if
from upcycling.show.explorer import CompareRouting, TokenExplorer, TrainingPlayback
from upcycling.show.style import expert_colour, visible
from upcycling.show.what_if import WhatIf
from upcycling.text.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[3]
STORIES = ROOT.parent / "shared/data/stories260K"
TEXT = "the cat sat on a mat and the cat ran"
HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "a 😀 b 👩‍👩‍👧",
    "שלום עולם \u202eevil\u202c مرحبا",
    "NUL \0 and \x1b[31m",
    r"$\frac{1}{0}$ {x} \u{41}",
    "\"}; quote' & <b>",
    "\n\n\t ",
]


def make_model(seed=0, experts=4, layers=(0, 2), seq_len=64):
    torch.manual_seed(seed)
    moe = MoEConfig(num_experts=experts, top_k=2, layers=layers, router_std=1.0)
    sizes = dict(vocab_size=300, d_model=16, n_layers=3, n_heads=2, d_ff=16, seq_len=seq_len)
    return DecoderLM(ModelConfig.smol(**sizes, init_std=0.3, moe=moe)).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT, "once upon a time a cat saw a mat"] * 20, 275)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def snapshots():
    made = RoutingSnapshots(torch.arange(3, 203).view(4, 50), labels=["code", "code", "prose", "prose"])
    for step in (0, 10, 20):
        made(step, make_model(step))
    return made


def make_probe():
    windows = torch.arange(3, 3 + 2 * 31).view(2, 1, 31)
    return {name: (window[:, :-1], window[:, 1:]) for name, window in zip(("code", "prose"), windows)}


def routed(model, tokenizer, text=TEXT):
    return typed_text.route_text(model, tokenizer, text)


# ------------------------------------------------------------------------------------------------- render functions


def test_route_text_is_the_models_own_routing(model, tokenizer):
    trace, texts = routed(model, tokenizer)
    out = model(trace.tokens[None])
    assert torch.equal(trace.expert_ids, torch.stack([routing.expert_ids_NK for routing in out.routings]))
    assert "".join(texts) == "<|im_start|>" + TEXT and texts[2].startswith(" ") == (TEXT[3] == " ")
    assert model.training is False


def test_training_mode_comes_back(tokenizer):
    model = make_model().train()
    routed(model, tokenizer)
    what_if.measure(model, tokenizer, TEXT, make_probe(), 2)
    assert model.training


def test_strip_shows_the_heaviest_expert(model, tokenizer):
    trace, texts = routed(model, tokenizer)
    # a router may leave its choices in any order: turn them around, nothing may change
    turned = RoutingTrace(
        layers=trace.layers, logits=trace.logits, probabilities=trace.probabilities, tokens=trace.tokens,
        expert_ids=trace.expert_ids.flip(-1), weights=trace.weights.flip(-1), sequence=trace.sequence,
        position=trace.position,
    )  # fmt: skip
    expected = [int(e) for e in trace.probabilities[1].argmax(-1)]
    for shown in (trace, turned):
        strip = explorer.strip_of(shown, texts, 2)
        assert strip.notes == [str(e) for e in expected]
        assert strip.colours == [expert_colour(e) for e in expected]
        assert "layer 2" in strip.legend


def test_strip_of_one_experts_probability(model, tokenizer):
    trace, texts = routed(model, tokenizer)
    strip = explorer.strip_of(trace, texts, 0, expert=3)
    assert strip.notes == [f"{100 * p:.0f}" for p in trace.probabilities[0, :, 3].tolist()]
    lightest, darkest = (strip.colours[int(f(trace.probabilities[0, :, 3]))] for f in (torch.argmin, torch.argmax))
    assert sum(bytes.fromhex(lightest[1:])) > sum(bytes.fromhex(darkest[1:]))


def test_cards_show_all_probabilities_and_mark_the_chosen(model, tokenizer):
    trace, texts = routed(model, tokenizer)
    strip = explorer.strip_of(trace, texts, 0)
    for i, (probabilities, chosen) in enumerate(zip(trace.probabilities[0].tolist(), trace.expert_ids[0].tolist())):
        head, numbers, shares = panel.card_text(strip, i).split("\n")
        assert head.startswith(f"token {i}:")
        assert numbers.split() == [f"[{e}]" if e in chosen else str(e) for e in range(4)]
        assert shares.split() == [f"{100 * p:.0f}" for p in probabilities]
        assert panel.card_sizes(probabilities).split(",")[2] == f"{4 * probabilities[2]:.2f}ch 8px"


def test_many_experts_make_several_rows():
    shares = [i / 40 for i in range(40)]
    strip = panel.Strip("", "", ["a"], ["#000000"], ["0"], [shares], [[20]])
    lines = panel.card_text(strip, 0).split("\n")
    assert [len(line.split()) for line in lines[1::3]] == [len(line.split()) for line in lines[2::3]] == [16, 16, 8]
    assert "[20]" in lines[4] and lines[5].split()[4] == "50"
    for row in lines[1::3]:  # each number is in the middle of its bar's place
        for match in re.finditer(r"\S+", row):
            assert match.start() // 5 == (match.end() - 1) // 5


def test_style_sheet_colours_every_token_and_holds_no_text(model, tokenizer):
    trace, texts = routed(model, tokenizer, "</style><b>x")
    strip = explorer.strip_of(trace, texts, 0)
    style = panel.strip_style(strip, "scope")
    rules = style.removeprefix("<style>").split("}")
    for i, (colour, note) in enumerate(zip(strip.colours, strip.notes), 1):
        rule = next(rule for rule in rules if rule.startswith(f".scope button:nth-child({i})"))
        assert f"background:{colour}" in rule and f'--note:"{note}"' in rule and f"token {i - 1}:" in rule
    assert style.count("<") == 2  # its own tags


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\nb", "a↵b"),
        ("  ", "␣␣"),
        (" cat", " cat"),
        ("\0", r"\u{0}"),
        ("\u202e", r"\u{202E}"),
        ("😀", "😀"),
        ("", ""),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown


def test_tokens_view_names_what_the_trace_says(model, tokenizer):
    trace, texts = routed(model, tokenizer)
    view = explorer.render_tokens([trace], texts, 2, 3)
    for layer, ids_K, weights_K in zip(trace.layers, trace.expert_ids[:, 3], trace.weights[:, 3]):
        way = ", ".join(f"{int(e)} ({100 * float(w):.0f} %)" for e, w in zip(ids_K, weights_K))
        assert f"layer {layer}: experts {way}" in view.sentence
    assert view.followed == 3 and len(view.strips) == 1
    written = [string for artist in view.figure.axes[0].collections for string in getattr(artist, "strings", ())]
    assert written[:4] == [f"{100 * p:.0f}" for p in trace.probabilities[0, 3].tolist()]


def test_two_traces_are_compared(model, tokenizer):
    traces = [routed(each, tokenizer)[0] for each in (model, make_model(1, experts=6))]
    texts = routed(model, tokenizer)[1]
    view = explorer.render_tokens(traces, texts, 0, 1, names=("old", "new"))
    same = (traces[0].expert_ids[0, :, 0] == traces[1].expert_ids[0, :, 0]).float().mean()
    assert f"for {100 * same:.0f} % of the tokens" in view.sentence
    assert [strip.title for strip in view.strips] == ["old", "new"]
    assert [len(strip.probabilities[0]) for strip in view.strips] == [4, 6]
    rows = [label.get_text() for label in view.figure.axes[0].get_yticklabels()]
    assert rows == ["old layer 0", "new layer 0", "old layer 2", "new layer 2"]


def test_playback_view_is_of_its_moment(snapshots, tokenizer):
    texts = typed_text.token_texts(tokenizer, snapshots.probe_BT[2].tolist())
    views = [explorer.render_playback(snapshots, texts, i, 2, 2, 4) for i in range(3)]
    for i, view in enumerate(views):
        saturation = float(router_saturation(snapshots.expert_ids[i, 1], snapshots.expert_ids[-1, 1]))
        assert f"After {10 * i} updates layer 2 makes {100 * saturation:.0f} %" in view.sentence
        assert view.strips[0].chosen == snapshots.expert_ids[i, 1, 100:150].tolist()
        assert view.figure.axes[0].get_title(loc="left") == f"layer 2 after {10 * i} updates"
        assert [label.get_text() for label in view.figure.axes[0].get_yticklabels()] == ["code", "prose"]
    scales = {view.figure.axes[0].images[0].get_clim() for view in views}
    assert len(scales) == 1  # colours can be compared from moment to moment
    assert "makes 100 %" in views[-1].sentence


def test_what_if_view_shows_what_changed():
    losses = {"code": torch.tensor([[1.0, 3.0]]), "prose": torch.tensor([[2.0, 2.0]])}
    trained = what_if.Outcome(losses, " cat <b>")
    now = what_if.Outcome({"code": losses["code"] + 1, "prose": losses["prose"] - 0.5}, " cat <i>")
    view = what_if.render_what_if("Top-1", "a & b", trained, now, "prose", [" x", " y"])
    assert view.sentence == "Top-1: 2.250 nats per token, as trained 2.000 (+0.250); code changes most (+1.000)."
    assert "<td>2.000</td><td>3.000</td><td>+1.000</td>" in view.words
    assert "a &amp; b<u> cat &lt;</u><mark>b&gt;</mark>" in view.words
    assert "a &amp; b<u> cat &lt;</u><mark>i&gt;</mark>" in view.words
    assert view.lines[-1] == "now: a & b cat <i>"
    notes = [string for artist in view.figure.axes[0].collections for string in getattr(artist, "strings", ())]
    assert "-0.50" in notes and "+1.00" not in notes  # the chosen window's


# ---------------------------------------------------------------------------------------------- controls and clicks


def test_click_slider_and_layer_change_text_and_picture(model, tokenizer):
    made = TokenExplorer(model, tokenizer, TEXT)
    seen = [(Reader(made).picture, Reader(made).alternative)]
    made.strips[0].buttons.value = 4  # what a click does
    assert made.token.value == 4 and "Token 4 " in Reader(made).sentence
    assert Reader(made).cards[0].startswith("token 4:")
    seen.append((Reader(made).picture, Reader(made).alternative))
    made.token.value = 2
    assert made.strips[0].buttons.value == 2 and "Token 2 " in Reader(made).sentence
    seen.append((Reader(made).picture, Reader(made).alternative))
    assert all(a != b for (a, _), (b, _) in itertools.combinations(seen, 2))
    assert len({alternative for _, alternative in seen}) == 3
    before = Reader(made).sheets[0].value
    made.layer.value = 2
    assert Reader(made).sheets[0].value != before and "layer 2" in Reader(made).legends[0]
    made.colour.value = 1
    assert "probability of expert 1" in Reader(made).legends[0]


def test_a_click_sends_no_style_sheet_again(model, tokenizer):
    made = TokenExplorer(model, tokenizer, TEXT)
    sent = []
    Reader(made).sheets[0].observe(sent.append, "value")
    made.strips[0].buttons.observe(sent.append, "options")
    made.token.value = 3
    assert sent == []


def test_typing_and_choosing_an_example(model, tokenizer):
    made = TokenExplorer(model, tokenizer, examples={"one": TEXT, "two": "a cat"})
    assert made.example.label == "one" and made.text.value == TEXT
    made.token.value = 8
    made.example.value = "a cat"
    assert made.text.value == "a cat" and made.token.max == len(Reader(made).tokens) - 1
    assert Reader(made).tokens == [visible(text) for text in routed(model, tokenizer, "a cat")[1]]
    made.text.value = "a cat sat"
    assert made.example.value is None and Reader(made).tokens[-1].endswith("t")
    made.example.value = "a cat"
    assert made.text.value == "a cat"


def test_text_that_does_not_fit_is_one_sentence_and_the_rest_goes_on(model, tokenizer):
    made = TokenExplorer(model, tokenizer, TEXT, max_tokens=40)
    shown = Reader(made).tokens
    for text, said in [
        ("", "there is no text"),
        ("cat " * 2500, "tokens but the model's context is 64"),
        ("xyz" * 18, "this panel shows at most 40"),
        ("a \ud800 b", "surrogate"),
    ]:
        made.text.value = text
        assert said in Reader(made).problem
        assert Reader(made).tokens == shown
        made.layer.value = 2 if made.layer.value == 0 else 0
        assert f"layer {made.layer.value}" in Reader(made).legends[0] and said in Reader(made).problem
    made.text.value = "a cat"
    assert Reader(made).problem == "" and Reader(made).tokens != shown


def test_another_tokenizers_ids_are_a_sentence(tokenizer):
    small = DecoderLM(ModelConfig.smol(vocab_size=20, d_model=8, n_layers=1, n_heads=1, d_ff=8, seq_len=64,
                                       moe=MoEConfig(num_experts=2, top_k=1)))  # fmt: skip
    with pytest.raises(ValueError, match="outside the model's vocabulary of 20; is this its tokenizer"):
        TokenExplorer(small, tokenizer, TEXT)


def test_dense_model_is_refused(tokenizer):
    dense = DecoderLM(ModelConfig.smol(vocab_size=300, d_model=8, n_layers=1, n_heads=1, d_ff=8, seq_len=64))
    for kind in (TokenExplorer, WhatIf):
        with pytest.raises(ValueError, match="no MoE layer"):
            kind(dense, tokenizer, TEXT)


def test_comparison_follows_a_click_in_either(model, tokenizer):
    made = CompareRouting(model, make_model(3), tokenizer, TEXT, names=("old", "new"))
    made.strips[1].buttons.value = 5
    assert [strip.buttons.value for strip in made.strips] == [5, 5] and made.token.value == 5
    made.text.value = "a cat"
    assert len({len(strip.buttons.options) for strip in made.strips}) == 1


def test_comparison_refuses_models_without_a_common_layer(tokenizer):
    with pytest.raises(ValueError, match="no MoE layer in common"):
        CompareRouting(make_model(layers=(0,)), make_model(layers=(1,)), tokenizer, TEXT)


def test_playback_moves_through_moments_windows_and_layers(snapshots, tokenizer):
    made = TrainingPlayback(snapshots, tokenizer)
    first = Reader(made).picture
    made.moment.value = 20  # in updates
    assert "After 20 updates" in Reader(made).sentence and Reader(made).picture != first
    made.window.value = 3
    texts = typed_text.token_texts(tokenizer, snapshots.probe_BT[3].tolist())
    assert Reader(made).tokens == list(map(visible, texts))
    made.strips[0].buttons.value = 6
    assert made.token.value == 6
    made.layer.value = 2
    assert made.view().strips[0].chosen == snapshots.expert_ids[2, 1, 150:].tolist()


def test_playback_needs_snapshots(snapshots, tokenizer):
    with pytest.raises(ValueError, match="no snapshots yet"):
        TrainingPlayback(RoutingSnapshots(snapshots.probe_BT), tokenizer)


def test_what_if_changes_loss_and_text_and_leaves_the_model_alone(tokenizer):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = WhatIf(model, tokenizer, "the cat", make_probe(), new_tokens=8)
    trained = what_if.measure(model, tokenizer, "the cat", make_probe(), 8).mean()
    assert made.k.value == 2 and f"as trained {trained:.3f} (+0.000)" in Reader(made).sentence
    seen = {Reader(made).sentence}
    for control, value in [(made.k, 1), (made.temperature, 4.0), (made.without, "0, 3"), (made.layer, 2)]:
        control.value = value
        assert Reader(made).sentence not in seen, control.description
        assert Reader(made).alternative == Reader(made).sentence, "the picture is of the same view"
        seen.add(Reader(made).sentence)
    assert "Top-1, temperature 4, without experts 0, 3 in layer 2" in Reader(made).sentence
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [block.ffn.top_k for block in model.blocks if hasattr(block.ffn, "top_k")] == [2, 2]
    made.window.value = "prose"
    assert "first window of prose" in made.view().figure.axes[0].get_title(loc="left")


def test_what_if_knock_out_agrees_with_intervene(model, tokenizer):
    from upcycling.routing.intervention import intervene, token_losses

    probe = make_probe()
    made = WhatIf(model, tokenizer, "the cat", probe, new_tokens=4)
    made.without.value = "1"
    with intervene(model, remove=[1]):
        expected = torch.cat([token_losses(model, *windows).flatten() for windows in probe.values()]).mean()
    assert f"{float(expected):.3f} nats per token, as trained" in Reader(made).sentence
    assert f"as trained {float(expected):.3f}" not in Reader(made).sentence


def test_impossible_choice_and_text_are_sentences(model, tokenizer):
    made = WhatIf(model, tokenizer, "the cat", make_probe(), new_tokens=8)
    made.without.value = "0-2"
    assert "only 1 would remain" in Reader(made).problem
    made.k.value = 1
    assert Reader(made).problem == ""
    for wrong in ("4", "2-1", "x", "-1", "0-9999999999"):
        made.without.value = wrong
        assert "names no expert; write numbers from 0 to 3" in Reader(made).problem
    made.without.value = ""
    assert Reader(made).problem == ""
    made.text.value = "the cat " * 30
    assert "8 new ones are wanted" in Reader(made).problem
    made.text.value = "a"
    assert Reader(made).problem == "" and "<b>as trained</b>: a<" in Reader(made).markup


def test_changes_from_two_threads_both_count(model, tokenizer):
    """JupyterLab hands widgets' messages to threads of their own."""
    made = WhatIf(model, tokenizer, "the cat", make_probe(), new_tokens=2)
    inside, go_on, view = threading.Event(), threading.Event(), made.view

    def slow_view():
        inside.set()
        assert go_on.wait(30)
        return view()

    made.view = slow_view
    first = threading.Thread(target=lambda: setattr(made.k, "value", 1))
    first.start()
    assert inside.wait(30)
    second = threading.Thread(target=lambda: setattr(made.text, "value", "a mat"))
    second.start()
    go_on.set()
    first.join(30), second.join(30)
    assert "Top-1" in Reader(made).sentence and "<b>now</b>: a mat<" in Reader(made).markup


def test_the_users_model_is_never_changed_not_even_meanwhile(tokenizer, monkeypatch):
    model = make_model().train()
    seen, real = [], what_if.token_losses

    def look(*arguments):
        seen.append((model.training, model.blocks[0].ffn.top_k, len(model.blocks[0].ffn.router._forward_hooks)))
        return real(*arguments)

    monkeypatch.setattr(what_if, "token_losses", look)
    made = WhatIf(model, tokenizer, "the cat", make_probe(), new_tokens=2)
    made.k.value = 1
    made.without.value = "0"
    assert len(seen) >= 3 and set(seen) == {(True, 2, 0)}
    with torch.no_grad():
        before = Reader(made).sentence
        for parameter in model.parameters():  # the weights are shared: training goes on in the panel, too
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    made.without.value = "1"
    made.without.value = "0"
    assert Reader(made).sentence != before


def test_windows_of_different_lengths_make_a_probe(model, tokenizer):
    from upcycling.routing.intervention import token_losses

    probe = make_probe()
    probe["prose"] = tuple(tensor[:, :11] for tensor in probe["prose"])
    outcome = what_if.measure(model, tokenizer, "a", probe, 2)
    for name, windows in probe.items():
        torch.testing.assert_close(outcome.losses[name], token_losses(model, *windows), rtol=1e-4, atol=1e-4)


def struck_out(made):
    """The selector of the buttons that are crossed out."""
    return re.search(r"([^}>]*)\{[^}]*line-through", Reader(made).markup)[1]


def test_clicks_take_experts_out_and_put_them_back(model, tokenizer):
    made = WhatIf(model, tokenizer, "the cat", make_probe(), new_tokens=2)
    for click, written in [(3, "3"), (1, "1, 3"), (3, "1"), (1, "")]:
        experts = Reader(made).buttons("upcycling-experts")
        experts.value = click
        assert made.without.value == written and experts.value is None
        assert Reader(made).sentence.count("without") == bool(written)
        assert re.findall(r"nth-child\((\d+)\)", struck_out(made)) == [
            str(int(e) + 1) for e in written.split(", ") if e
        ]


def test_layer_without_experts_is_a_sentence(model, tokenizer):
    made = TokenExplorer(model, tokenizer, TEXT)
    made.layer.value = 1
    assert "layer 1 has no experts; those with experts are 0, 2" in Reader(made).problem
    made.layer.value = 2
    assert Reader(made).problem == "" and "layer 2" in Reader(made).legends[0]


def test_text_alone_can_be_the_probe(model, tokenizer):
    made = WhatIf(model, tokenizer, TEXT, new_tokens=2)
    assert list(made.window.options) == ["the first text"]
    with pytest.raises(ValueError, match="no text"):
        WhatIf(model, tokenizer)


TAGS = set(re.findall(r"\w+", "b img mark p pre span style table tbody td th thead tr u"))
ATTRIBUTES = {"alt", "aria-live", "class", "decoding", "role", "scope", "src", "style"}


class Harmless(HTMLParser):
    """Fails on what a panel does not write itself."""

    def handle_starttag(self, tag, attributes):
        assert tag in TAGS, tag
        assert {name for name, _ in attributes} <= ATTRIBUTES
        assert dict(attributes).get("src", "data:image/png;base64,").startswith("data:image/png;base64,")

    def handle_data(self, data):
        assert not set(data) & set("\0\x1b\u202e\u202c")


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.filterwarnings("error")  # a glyph that the font lacks would be one
def test_hostile_text_is_shown_as_text(model, tokenizer, snapshots, text):
    hostile = RoutingSnapshots(snapshots.probe_BT, labels=[text, "b", text, "c"])
    hostile(0, model)
    made = [
        TokenExplorer(model, tokenizer, text),
        CompareRouting(model, model, tokenizer, text, names=(text, "b")),
        WhatIf(model, tokenizer, text, {text: make_probe()["code"]}, new_tokens=2),
        TrainingPlayback(hostile, tokenizer),
    ]
    for each in made:
        if "token" in each.controls:
            each.token.value = min(5, each.token.max)
        Harmless().feed(Reader(each).markup)
        assert each.still().data.startswith(b"\x89PNG")


def test_still_twin_is_the_view_and_the_bundles_picture(model, tokenizer, snapshots):
    made = [
        TokenExplorer(model, tokenizer, TEXT),
        CompareRouting(model, make_model(1), tokenizer, TEXT),
        TrainingPlayback(snapshots, tokenizer),
        WhatIf(model, tokenizer, TEXT, new_tokens=2),
    ]
    for each in made:
        still = each.still()
        bundle, metadata = each._repr_mimebundle_()
        assert base64.b64decode(bundle["image/png"]) == still.data == each.still().data
        assert metadata["image/png"]["alt"] == still.alt == each.view().sentence
        assert bundle["text/plain"] == f"{type(each).__name__}({', '.join(each.controls)})"
        assert "0x" not in bundle["text/plain"]
        assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == each.box.model_id
        live = Image.open(io.BytesIO(Reader(each).picture))
        assert Image.open(io.BytesIO(still.data)).height > live.height
        if "token" in each.controls:
            each.token.value = 3
            assert each.still().data != still.data


def test_every_control_has_a_label(model, tokenizer, snapshots):
    for made in (
        TokenExplorer(model, tokenizer, TEXT, examples={"a": "b"}),
        TrainingPlayback(snapshots, tokenizer),
        WhatIf(model, tokenizer, TEXT),
    ):
        assert all(control.description for control in made.controls.values())
        assert Reader(made).sentence == Reader(made).alternative != ""


# ------------------------------------------------------------------------------------------------------ Hugging Face


def test_transformers_model_and_tokenizer():
    transformers = pytest.importorskip("transformers")
    inner = train_tokenizer([TEXT] * 20, 268)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    made = TokenExplorer(model, tokenizer, TEXT)
    assert "".join(Reader(made).tokens).replace("␣", " ") == TEXT
    made.strips[0].buttons.value = 3
    assert "Token 3 " in Reader(made).sentence
    panel_of = WhatIf(model, tokenizer, TEXT, new_tokens=3)
    before = Reader(panel_of).sentence
    panel_of.k.value = 1
    assert "Top-1" in Reader(panel_of).sentence and Reader(panel_of).sentence != before and not Reader(panel_of).problem


@pytest.mark.skipif(not STORIES.exists(), reason="shared/data is not there")
def test_sentencepiece_tokens_keep_their_spaces():
    from upcycling.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(STORIES)
    ids = tokenizer.encode("Once upon a time", add_special_tokens=False).ids
    assert "".join(typed_text.token_texts(tokenizer, ids)).strip() == "Once upon a time"


def test_id_that_the_tokenizer_lacks(tokenizer):
    assert typed_text.token_texts(tokenizer, [299]) == ["[299]"]


# ---------------------------------------------------------------------------------------------------------- a kernel


def test_panels_in_a_kernel_pass_strict_nbval(tmp_path):
    """Executed once, compared by nbval with a second execution; the cells themselves assert on what controls do."""
    from nbclient import NotebookClient

    folder = Path(__file__).parent
    here = f"import sys; sys.path[:0] = {[str(folder), str(folder.parent)]!r}\n"
    cells = [
        here + "from test_explorer import *\n"
        "tokenizer = train_tokenizer([TEXT, 'once upon a time a cat saw a mat'] * 20, 275)\n"
        "snapshots = RoutingSnapshots(torch.arange(3, 203).view(4, 50), labels=['code', 'code', 'prose', 'prose'])\n"
        "for step in (0, 10): snapshots(step, make_model(step))",
        "made = TokenExplorer(make_model(), tokenizer, TEXT)\nmade",
        "made.token.value = 3\nassert 'Token 3 ' in Reader(made).sentence\nmade.still()",
        "TrainingPlayback(snapshots, tokenizer)",
        "WhatIf(make_model(), tokenizer, TEXT, new_tokens=2)",
        "CompareRouting(make_model(), make_model(1), tokenizer, TEXT)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3", store_widget_state=False).execute()
    for cell in notebook.cells:
        assert not [output for output in cell.outputs if output.output_type in ("error", "stream")]
    for cell in notebook.cells[1:2] + notebook.cells[3:]:
        (output,) = cell.outputs
        assert {"image/png", "text/plain", "application/vnd.jupyter.widget-view+json"} <= set(output.data)
        assert output.metadata["image/png"]["alt"]
    nbformat.write(notebook, tmp_path / "panels.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env"]
    finished = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert "6 passed" in finished.stdout
