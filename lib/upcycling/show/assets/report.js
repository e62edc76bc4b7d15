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
