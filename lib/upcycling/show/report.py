"""One HTML file with a token explorer: `save_report(trace, path)`, to send a routing result to a colleague.

The file needs no kernel and no network: style, script and data are in it, and its content security policy forbids
everything else. All text is data: it travels as JSON and reaches the page as text nodes, never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..files import write_text
from ..routing.load import load_report
from ..routing.metrics import domain_specialization
from ..routing.typed_text import token_texts
from .style import expert_colour, ink

_MOST_VALUES = 3_000_000  # probabilities in one file: some 10 MB
_MOST_LABELS = 50


def save_report(
    trace,
    path,
    *,
    tokenizer=None,
    labels: Sequence | None = None,
    title: str = "Routing report",
    max_tokens: int = 2000,
) -> Path:
    """Write an explorer of `trace` (a `RoutingTrace`) to `path` as one self-contained HTML file; returns the path.

    `tokenizer` (of tokenizers or transformers) turns ids into text, without it the ids are shown. `labels` has a name
    (a domain, a token class) for each of the trace's N tokens, for the table expert x label. The first `max_tokens`
    tokens, in the order of the sequences, can be explored (fewer where layers x experts x tokens would exceed three
    million, and the page says so); loads and table count all.
    Probabilities and weights are rounded to thousandths. The file is replaced atomically.
    Raises ValueError for an empty trace, one with not-a-numbers, labels that do not fit, or `max_tokens` below 1;
    OSError from writing.
    """
    if len(trace) == 0:
        raise ValueError("the trace is empty; run the model inside `with record_routing(model) as trace`")
    if labels is not None and len(labels) != len(trace):
        raise ValueError(f"{len(labels)} labels but the trace has {len(trace)} tokens; give one for each")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} leaves nothing to explore; choose at least 1")
    data = _report_data(trace, tokenizer, labels, str(title), max_tokens)
    write_text(path, _page(data))
    return Path(path)


def _report_data(trace, tokenizer, labels, title: str, max_tokens: int) -> dict:
    """What the page shows, as JSON can hold it; the first indices of the nested lists are layer and token."""
    report = load_report(trace)
    layers, experts, count = list(trace.layers), trace.num_experts, len(trace)
    room = max(1, min(max_tokens, _MOST_VALUES // (len(layers) * experts)))
    # decoding with a cache records its sequences a token at a time, by turns
    order_N = np.lexsort((trace.position, trace.sequence))[:room]
    shown = trace.select(torch.from_numpy(order_N))
    ids = shown.tokens.tolist()
    data = {
        "title": title,
        "layers": layers,
        "experts": experts,
        "top_k": trace.top_k,
        "total": count,
        "ids": ids,
        "texts": [str(token) for token in ids] if tokenizer is None else token_texts(tokenizer, ids),
        "sequence": shown.sequence.tolist(),
        "position": shown.position.tolist(),
        "chosen": shown.expert_ids.tolist(),
        "weights": _thousandths(shown.weights),
        "probabilities": _thousandths(shown.probabilities),
        "loads": report.load_LE.tolist(),
        "collapsed": list(report.collapsed_layers),
        "alarm": report.alarm,
        "colours": [[expert_colour(e), ink(expert_colour(e))] for e in range(experts)],
    }
    if labels is not None:
        data |= _label_data(trace, [str(label) for label in _plain(labels)], order_N)
    return data


def _label_data(trace, labels: list[str], order_N) -> dict:
    names = sorted(set(labels))
    if len(names) > _MOST_LABELS:
        raise ValueError(f"there are {len(names)} different labels; a table holds at most {_MOST_LABELS}")
    number = {name: i for i, name in enumerate(names)}
    numbers_N = torch.tensor([number[label] for label in labels])
    share_LCE = domain_specialization(trace.expert_ids, numbers_N, trace.num_experts, len(names))
    return {"labels": names, "label": numbers_N[order_N].tolist(), "shares": _thousandths(share_LCE)}


def _plain(labels):
    return labels.tolist() if hasattr(labels, "tolist") else labels


def _thousandths(values) -> list:
    return np.rint(np.asarray(values, dtype=np.float64) * 1000).astype(int).tolist()


def _page(data: dict) -> str:
    # in ASCII, so that U+2028 and lone surrogates are escaped; < > & as well, so that nothing ends the script element
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return (
        _FRAME.replace("@STYLE-HASH@", _hash(_STYLE))
        .replace("@SCRIPT-HASH@", _hash(_SCRIPT))
        .replace("@STYLE@", _STYLE)
        .replace("@SCRIPT@", _SCRIPT)
        .replace("@DATA@", text)  # last: nothing is replaced inside it
    )


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src @STYLE-HASH@; \
script-src @SCRIPT-HASH@; base-uri 'none'; form-action 'none'">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Routing report</title>
<style>@STYLE@</style>
</head>
<body>
<noscript><p>This report is drawn by the script that it contains; please allow scripts for this file.</p></noscript>
<header><h1 id="title"></h1><p id="summary"></p></header>
<p id="alarm" class="alarm" hidden></p>
<main>
<section aria-labelledby="tokens-title">
<h2 id="tokens-title">Tokens</h2>
<form id="controls">
<label for="layer">Layer</label> <input id="layer" type="range" min="0" step="1" value="0">
<output id="layer-name" for="layer"></output>
<label for="only">Show expert</label> <select id="only"></select>
</form>
<p class="hint">Each token has the colour of its first expert; the numbers are its experts, best first. Point at a
token for its probabilities; click it, or press Enter, to follow it through the layers. Arrow keys move from token to
token.</p>
<div id="tokens" role="listbox" aria-label="Tokens"></div>
</section>
<aside aria-labelledby="token-title">
<h2 id="token-title"></h2>
<p id="token-facts" class="hint"></p>
<p id="token-chosen"></p>
<p id="token-scale" class="hint"></p>
<div id="bars"></div>
</aside>
<section id="way" aria-labelledby="way-title" hidden>
<h2 id="way-title"></h2>
<p id="way-status" role="status" class="quiet"></p>
<div class="wide"><table id="way-table"></table></div>
</section>
<section aria-labelledby="load-title">
<h2 id="load-title">Load per layer</h2>
<p class="hint" id="load-hint"></p>
<div class="wide"><table id="load-table"></table></div>
</section>
<section id="labels" aria-labelledby="labels-title" hidden>
<h2 id="labels-title"></h2>
<p class="hint" id="labels-hint"></p>
<div class="wide"><table id="labels-table"></table></div>
</section>
</main>
<script type="application/json" id="data">@DATA@</script>
<script>@SCRIPT@</script>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1b1b; --soft: #5a5a5a; --line: #c9c9c9; --panel: #f5f5f7;
  --shade: 0, 114, 178; --focus: #d40078; --alarm: #a40000; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181c; --text: #ececec; --soft: #b0b0b0; --line: #4a4d54; --panel: #22252b; --shade: 86, 180, 233;
    --focus: #ff7ac6; --alarm: #ff9a8a; }
}
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0 auto;
  padding: 1rem 1.5rem 3rem; max-width: 90rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
header p, .hint, .quiet { color: var(--soft); margin: .2rem 0 .8rem; max-width: 60rem; }
.alarm { color: var(--alarm); border: 2px solid; border-radius: 6px; padding: .5rem .8rem; font-weight: 600; }
main { display: grid; grid-template-columns: minmax(0, 1fr) 22rem; gap: 1.5rem 2rem; align-items: start; }
main > section { grid-column: 1 / -1; min-width: 0; }
main > section:first-child { grid-column: 1; }
aside { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  position: sticky; top: 1rem; max-height: calc(100vh - 2rem); overflow: auto; }
#controls { display: flex; flex-wrap: wrap; gap: .4rem .8rem; align-items: center; margin-bottom: .6rem; }
#controls output { min-width: 6rem; font-weight: 600; }
select, input { font: inherit; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
#tokens { max-height: 70vh; overflow: auto; border: 1px solid var(--line); border-radius: 8px; padding: .6rem; }
#tokens h3 { font-size: .85rem; font-weight: 600; color: var(--soft); margin: .7rem 0 .2rem; overflow-wrap: anywhere; }
#tokens h3:first-child { margin-top: 0; }
.token { display: inline-flex; flex-direction: column; align-items: center; margin: 1px; padding: 1px 4px 2px;
  border-radius: 3px; cursor: pointer; vertical-align: top; min-width: 1.2em; max-width: 100%; line-height: 1.25;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.token bdi { font-family: ui-monospace, monospace; font-size: .88rem; white-space: pre; overflow: hidden;
  max-width: 100%; }
.token span { font-size: .66rem; font-variant-numeric: tabular-nums; }
.token.dim { opacity: .18; }
.token[aria-selected=true] { outline: 3px solid var(--text); outline-offset: 0; }
.token:focus-visible { outline: 3px solid var(--focus); outline-offset: 1px; }
#bars { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 2px .8rem; }
aside p { margin: 0 0 .5rem; }
.bar { display: grid; grid-template-columns: 2.4em 1fr 4.2em; gap: .3rem; align-items: center; font-size: .82rem;
  font-variant-numeric: tabular-nums; }
.bar b { text-align: right; font-weight: 400; }
.bar.chosen b, .bar.chosen i { font-weight: 700; }
.bar i { font-style: normal; text-align: right; }
.track { height: .75em; background: var(--line); border-radius: 2px; overflow: hidden; }
.fill { height: 100%; min-width: 1px; background: rgb(var(--shade)); print-color-adjust: exact; }
.wide { overflow: auto; max-height: 75vh; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; }
th, td { padding: .15rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
thead th { position: sticky; top: 0; background: var(--page); vertical-align: bottom; }
th[scope=row] { text-align: left; font-weight: 600; }
th bdi { display: inline-block; max-width: 14em; overflow: hidden; text-overflow: ellipsis; vertical-align: bottom; }
tr[aria-current=true] th[scope=row]::before { content: "▸ "; }
.chip { display: inline-block; padding: 0 .4em; margin-right: .3em; border-radius: 3px; print-color-adjust: exact; }
.strip { display: flex; gap: 1px; align-items: flex-end; height: 2.4em; }
.strip div { width: .7em; min-height: 1px; background: rgb(var(--shade)); print-color-adjust: exact; }
.strip div.top { background: var(--alarm); }
.cells { display: flex; gap: 1px; }
.cells div { width: 1.1em; height: 1.3em; border: 1px solid var(--line); print-color-adjust: exact; }
.cells div.chosen { border: 2px solid var(--text); }
@media (max-width: 60rem) {
  main { display: block; } main > * { margin-bottom: 1.5rem; } aside { position: static; max-height: none; }
  #tokens { max-height: 50vh; }
}
@media print {
  body { max-width: none; padding: 0; } main { display: block; } main > * { margin-bottom: 1rem; }
  #tokens, .wide, aside { max-height: none; overflow: visible; position: static; }
  #controls input, #controls select, label[for=only] { display: none; }
}
"""

_SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
let layer = 0, current = 0, followed = -1;

// --- text: nodes only, never markup

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value; else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const named = {"\n": "↵", "\r": "↤", "\t": "⇥"};
function escaped(character) {  // what cannot be seen, or turns the text around; but what joins emoji stays
  if (character === "\u200d" || !/[\p{Cc}\p{Cf}\p{Cn}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/u.test(character)) return character;
  return "\\u{" + character.codePointAt(0).toString(16).toUpperCase() + "}";
}
function visible(text, limit = 60) {
  const characters = Array.from(text.length > 4 * limit ? text.slice(0, 4 * limit) : text);
  const cut = characters.slice(0, limit).map(c => named[c] ?? escaped(c)).join("");
  const shown = cut.trim() ? cut : "␣".repeat(cut.length) || "∅";
  return characters.length > limit ? shown + "…" : shown;
}
const isolated = (text, limit) => make("bdi", {}, visible(text, limit));
const percent = thousandths => (thousandths / 10).toFixed(1) + " %";
const layerName = l => "layer " + data.layers[l];
const times = value => value.toFixed(2);

function table(element, head, rows) {
  const header = make("tr", {}, ...head.map(cell => make("th", {scope: "col"}, cell)));
  element.replaceChildren(make("thead", {}, header), make("tbody", {}, ...rows));
}

// --- the strip of tokens

const tokens = data.texts.map((text, i) => make("div", {className: "token", role: "option", tabIndex: i ? -1 : 0,
  "aria-selected": "false"}, isolated(text, 40), make("span")));

// the label of a whole sequence, or null where its tokens have several
function labelOf(sequence) {
  const numbers = new Set(data.label?.filter((_, i) => data.sequence[i] === sequence));
  return numbers.size === 1 ? data.labels[[...numbers][0]] : null;
}

function layOut() {
  let group = null;
  tokens.forEach((token, i) => {
    token.dataset.index = i;
    if (i === 0 || data.sequence[i] !== data.sequence[i - 1]) {
      const name = "sequence " + data.sequence[i], label = labelOf(data.sequence[i]);
      const heading = make("h3", {"aria-hidden": "true"}, name);
      if (label !== null) heading.append(" · ", isolated(label));
      group = make("div", {role: "group", "aria-label": label === null ? name : name + ", " + visible(label)}, heading);
      byId("tokens").append(group);
    }
    group.append(token);
    if (data.texts[i].includes("\n")) group.append(make("br"));
  });
}

function paint() {
  const only = Number(byId("only").value);
  tokens.forEach((token, i) => {
    const chosen = data.chosen[layer][i];
    [token.style.backgroundColor, token.style.color] = data.colours[chosen[0]];
    token.lastChild.textContent = chosen.join(" ");
    token.classList.toggle("dim", only >= 0 && !chosen.includes(only));
    token.setAttribute("aria-label", visible(data.texts[i]) + ", expert " + chosen.join(", "));
  });
}

function showToken(i) {
  const probabilities = data.probabilities[layer][i], chosen = data.chosen[layer][i], weights = data.weights[layer][i];
  byId("token-title").replaceChildren(isolated(data.texts[i], 200));
  const facts = ["id " + data.ids[i], "sequence " + data.sequence[i] + ", position " + data.position[i]];
  if (data.texts[i].length > 60) facts.push(data.texts[i].length.toLocaleString("en") + " characters");
  byId("token-facts").replaceChildren(facts.join(" · "));
  if (data.label) byId("token-facts").append(" · ", isolated(data.labels[data.label[i]]));
  byId("token-chosen").textContent = "Chosen in " + layerName(layer) + ": "
    + chosen.map((e, k) => e + " (weight " + percent(weights[k]) + ")").join(", ");
  const longest = Math.max(1, ...probabilities);
  byId("token-scale").textContent = "Probability of each expert; the longest bar is " + percent(longest) + ".";
  byId("bars").replaceChildren(...probabilities.map((p, e) => {
    const fill = make("div", {className: "fill"});
    fill.style.width = 100 * p / longest + "%";
    const isChosen = chosen.includes(e);
    return make("div", {className: isChosen ? "bar chosen" : "bar"}, make("b", {}, (isChosen ? "●" : "") + e),
      make("div", {className: "track", "aria-hidden": "true"}, fill), make("i", {}, percent(p)));
  }));
}

function focusOn(i) {
  tokens[current].tabIndex = -1;
  current = Math.min(Math.max(i, 0), tokens.length - 1);
  tokens[current].tabIndex = 0;
  tokens[current].focus();
}

function nextLine(i, step) {
  const from = tokens[i].getBoundingClientRect(), middle = box => (box.left + box.right) / 2;
  let best = i, distance = Infinity, line = null;
  for (let j = i + step; j >= 0 && j < tokens.length; j += step) {
    const box = tokens[j].getBoundingClientRect();
    if (Math.abs(box.top - from.top) < 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > 2) break;
    const away = Math.abs(middle(box) - middle(from));
    if (away < distance) [best, distance] = [j, away];
  }
  return best;
}

// --- a token's way through the layers

function follow(i) {
  if (followed >= 0) tokens[followed].setAttribute("aria-selected", "false");
  followed = i;
  tokens[i].setAttribute("aria-selected", "true");
  byId("way").hidden = false;
  byId("way-status").textContent = "Following token " + (i + 1) + " of " + tokens.length + ".";
  drawWay();
}

function drawWay() {
  if (followed < 0) return;
  const i = followed, most = Math.max(1, ...data.probabilities.map(rows => Math.max(...rows[i])));
  byId("way-title").replaceChildren("The way of ", isolated(data.texts[i]), " through the layers");
  const rows = data.layers.map((_, l) => {
    const chips = data.chosen[l][i].map((e, k) => {
      const chip = make("span", {className: "chip"}, e + " · " + percent(data.weights[l][i][k]));
      [chip.style.backgroundColor, chip.style.color] = data.colours[e];
      return chip;
    });
    const chosen = data.chosen[l][i], cells = data.probabilities[l][i].map((p, e) => {
      const cell = make("div", {title: "expert " + e + ": " + percent(p)});
      cell.classList.toggle("chosen", chosen.includes(e));
      cell.style.backgroundColor = "rgba(var(--shade), " + p / most + ")";
      return cell;
    });
    const row = make("tr", {}, make("th", {scope: "row"}, layerName(l)), make("td", {}, ...chips),
      make("td", {}, make("div", {className: "cells", "aria-hidden": "true"}, ...cells)));
    if (l === layer) row.setAttribute("aria-current", "true");
    return row;
  });
  const last = data.experts - 1;
  table(byId("way-table"), ["", "expert · combine weight", "probability, experts 0 to " + last + " (full colour: "
    + percent(most) + ")"], rows);
}

// --- load and labels

function drawLoads() {
  const pooled = data.loads[0].map((_, e) => data.loads.reduce((sum, row) => sum + row[e], 0) / data.loads.length);
  const named = [["all layers", pooled, false],
    ...data.loads.map((row, l) => [layerName(l), row, data.collapsed.includes(data.layers[l])])];
  const rows = named.map(([name, row, bad]) => {
    const most = Math.max(...row);
    const bars = row.map((share, e) => {
      const bar = make("div", {title: "expert " + e + ": " + times(share * data.experts), className: bad ? "top" : ""});
      bar.style.height = 100 * share / most + "%";
      return bar;
    });
    return make("tr", {}, make("th", {scope: "row"}, (bad ? "⚠ " : "") + name),
      make("td", {}, make("div", {className: "strip", "aria-hidden": "true"}, ...bars)),
      make("td", {}, times(most * data.experts)), make("td", {}, String(row.indexOf(most))),
      make("td", {}, String(row.filter(share => share === 0).length)));
  });
  table(byId("load-table"),
    ["", "experts 0 to " + (data.experts - 1), "largest / even", "busiest", "without a token"], rows);
  byId("load-hint").textContent = "Over all " + data.total.toLocaleString("en") + " tokens; 1 is the even share. Each "
    + "layer's bars are drawn to its own largest.";
}

function drawLabels() {
  if (!data.label) return;
  const even = 1000 * data.top_k / data.experts;
  byId("labels").hidden = false;
  byId("labels-title").textContent = "Experts and labels, " + layerName(layer);
  byId("labels-hint").textContent = "Share of a label's tokens that have the expert among their " + data.top_k
    + ", over all tokens. Even would be " + percent(even) + "; labels that mean nothing to the router would all look "
    + "like the column of all tokens.";
  const shares = data.shares[layer], most = Math.max(1, ...shares.flat());
  const rows = data.loads[layer].map((load, e) => make("tr", {}, make("th", {scope: "row"}, "expert " + e),
    make("td", {}, percent(1000 * load * data.top_k)), ...shares.map(row => {
      const cell = make("td", {}, percent(row[e]));
      cell.style.backgroundColor = "rgba(var(--shade), " + 0.45 * row[e] / most + ")";
      return cell;
    })));
  table(byId("labels-table"), ["", "all tokens", ...data.labels.map(name => isolated(name, 40))], rows);
}

// --- controls

function chooseLayer() {
  layer = Number(byId("layer").value);
  byId("layer-name").textContent = layerName(layer);
  byId("layer").setAttribute("aria-valuetext", layerName(layer));
  paint(); showToken(current); drawWay(); drawLabels();
}

function start() {
  document.title = visible(data.title, 200);
  byId("title").replaceChildren(isolated(data.title, 200));
  const number = value => value.toLocaleString("en");
  byId("summary").textContent = number(data.total) + " tokens"
    + (tokens.length < data.total ? " (the first " + number(tokens.length) + " can be explored)" : "")
    + " · " + data.layers.length + " MoE layer" + (data.layers.length > 1 ? "s" : "")
    + " · " + data.experts + " experts, top-" + data.top_k;
  if (data.alarm) { byId("alarm").textContent = "⚠ " + data.alarm; byId("alarm").hidden = false; }
  byId("layer").max = data.layers.length - 1;
  byId("layer").disabled = data.layers.length === 1;
  byId("only").append(make("option", {value: "-1"}, "all"),
    ...data.colours.map((_, e) => make("option", {value: String(e)}, String(e))));
  layOut(); drawLoads(); chooseLayer();

  byId("controls").addEventListener("submit", event => event.preventDefault());
  byId("layer").addEventListener("input", chooseLayer);
  byId("only").addEventListener("input", paint);
  const list = byId("tokens"), indexOf = event => Number(event.target.closest(".token")?.dataset.index ?? -1);
  list.addEventListener("mouseover", event => { if (indexOf(event) >= 0) showToken(indexOf(event)); });
  list.addEventListener("mouseleave", () => showToken(current));
  list.addEventListener("focusin", event => { if (indexOf(event) >= 0) showToken(indexOf(event)); });
  list.addEventListener("click", event => {
    if (indexOf(event) >= 0) { focusOn(indexOf(event)); follow(current); }
  });
  list.addEventListener("keydown", event => {
    const moves = {ArrowRight: () => current + 1, ArrowLeft: () => current - 1, Home: () => 0,
      End: () => tokens.length - 1, ArrowDown: () => nextLine(current, 1), ArrowUp: () => nextLine(current, -1)};
    if (event.key in moves) focusOn(moves[event.key]());
    else if (event.key === "Enter" || event.key === " ") follow(current);
    else return;
    event.preventDefault();
  });
}
start();
"""
