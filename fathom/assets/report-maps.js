// Depth maps of the report: what each site reads, of all tokens or of one, and mixing matrices. A map is a table, so that it is read aloud too.

const shade = (palette, share) => palette[Math.round(Math.min(1, Math.max(0, share)) * (palette.length - 1))];

/** Black or white, whichever is told apart from `hex`. */
function ink(hex) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#000" : "#fff";
}

/** rows: [{head (an element), cells: [number or null], partial: column or -1}]; `paint` gives a value's colour. */
function mapTable(caption, columns, rows, paint) {
  const wide = columns.length > 12;
  const every = columns.length > 24 ? 8 : 4;
  const head = make("tr", {}, make("th", { scope: "col" }, "site"));
  columns.forEach((column, i) => head.append(make("th", { scope: "col", title: column }, make("span", {}, wide && (i % every || i === columns.length - 1) ? "" : short(column)), wide && (i % every || i === columns.length - 1) ? make("span", { class: "unseen" }, short(column)) : null)));
  const body = make("tbody");
  for (const row of rows) {
    const line = make("tr", {}, row.head);
    row.cells.forEach((value, i) => {
      if (value === null) return line.append(make("td", { class: "none" }));
      const back = paint(value);
      const text = value.toFixed(2).replace("0.", ".").replace("-", "−");
      line.append(make("td", { style: `background:${back};color:${ink(back)}`, title: `${columns[i]}: ${value.toFixed(3)}`, class: i === row.partial ? "partial" : null }, make("span", {}, text)));
    });
    body.append(line);
  }
  return make("div", { class: "mapbox", tabindex: 0, role: "region", "aria-label": caption },
    make("table", { class: wide ? "map wide" : "map" }, make("caption", {}, caption), make("thead", {}, head), body));
}

const short = (source) => source.replace("embedding", "emb").replace(/^(block|output|source|sublayer) /, "");

/** The scale of a palette, with the values at its ends. */
function key(palette, from, to, note) {
  const stops = palette.map((each, i) => `${each} ${((100 * i) / (palette.length - 1)).toFixed(1)}%`).join(",");
  return make("p", { class: "key" }, from, make("span", { class: "scale", style: `background:linear-gradient(90deg,${stops})` }), to, make("span", { class: "quiet" }, note));
}

const effective = (weights) => {
  const total = weights.reduce((a, b) => a + b, 0) || 1;
  return Math.exp(-weights.reduce((sum, w) => sum + (w > 0 ? (w / total) * Math.log(w / total) : 0), 0));
};

/** One token's weights at every site: [[weight]], from the packed bytes of a sentence. */
function tokenWeights(run, sentence, token) {
  let at = 0;
  return run.sites.map((site) => {
    const from = at + token * site.columns.length;
    at += sentence.tokens.length * site.columns.length;
    return Array.from(sentence.bytes.subarray(from, from + site.columns.length), (byte) => byte / 255);
  });
}

function readsPanel(box, runs) {
  for (const run of runs)
    for (const sentence of run.sentences) sentence.bytes = Uint8Array.from(atob(sentence.weights), (c) => c.charCodeAt(0));
  const state = { run: runs[0], kind: "attention", sentence: 0, token: -1, site: null };
  const picker = make("fieldset", { class: "tokens" });
  const sentenceBox = make("span");
  const map = make("div", { class: "panel" });
  const detail = make("div", { class: "panel" });
  const told = make("p", { class: "told", role: "status" });

  const weights = () =>
    state.token < 0 ? state.run.sites.map((site) => site.weights) : tokenWeights(state.run, state.run.sentences[state.sentence], state.token);
  const shown = () => state.run.sites.map((site, i) => i).filter((i) => state.run.sites[i].name.endsWith(state.kind) || state.run.sites[i].name === "output");
  const what = () => (state.token < 0 ? "the mean token" : `“${state.run.sentences[state.sentence].tokens[state.token].trim() || "␣"}”`);
  const row = (site, values) => {
    const cells = Array(state.run.columns.length).fill(null);
    site.columns.forEach((column, i) => (cells[column] = values[i]));
    return { cells, partial: site.partial ? site.columns.at(-1) : -1 };
  };

  function drawTokens() {
    const sentence = state.run.sentences[state.sentence];
    const one = (label, token, name) => {
      const input = make("input", { type: "radio", name: "token", onchange: () => { state.token = token; drawMap(); drawDetail(); } });
      input.checked = token === state.token;
      return make("label", { class: name }, input, make("span", {}, label));
    };
    picker.replaceChildren(make("legend", {}, sentence ? "Token of the sentence" : "No checkpoint was there to read single tokens from"), one("mean of all tokens", -1, "all"));
    sentence?.tokens.forEach((token, i) => picker.append(one(token.replace(/\n/g, "⏎").replace(/^ /, "·") || "�", i, "token")));
    sentenceBox.replaceChildren();
    if (state.run.sentences.length > 1)
      sentenceBox.append(choice("Sentence", state.run.sentences.map((s, i) => `${i + 1}: ${s.tokens.join("").trim().slice(0, 40)}`), (at) => { state.sentence = at; state.token = -1; drawTokens(); drawMap(); drawDetail(); }));
    if (state.run.sentences.length > 1) sentenceBox.querySelector("select").selectedIndex = state.sentence;
  }

  function drawMap() {
    const all = weights();
    const rows = shown().map((i) => {
      const site = state.run.sites[i];
      const input = make("input", { type: "radio", name: "site", onchange: () => { state.site = i; drawDetail(); } });
      input.checked = i === state.site;
      return { ...row(site, all[i]), head: make("th", { scope: "row" }, make("label", {}, input, make("span", {}, site.name.replace(/ (attention|mlp)$/, "")))) };
    });
    const kind = state.kind === "attention" ? "attention" : "MLP";
    map.replaceChildren(
      make("h3", {}, `What is read before ${kind} sublayers`),
      mapTable(`${state.run.label}: weights of ${what()} before each ${kind} sublayer, and of the output. Choose a row.`, state.run.columns, rows, (w) => shade(DATA.viridis, Math.sqrt(w))),
      key(DATA.viridis, "0", "1", state.run.sites.some((site) => site.partial) ? "by square root; framed: a block still being summed" : "by square root"),
    );
  }

  function drawDetail() {
    const site = state.run.sites[state.site];
    const mine = weights()[state.site];
    const order = mine.map((w, i) => i).sort((a, b) => mine[b] - mine[a]);
    const names = site.columns.map((column, i) => (site.partial && i === site.columns.length - 1 ? `${state.run.columns[column]} (unfinished)` : state.run.columns[column]));
    const [first, second] = order;
    told.textContent = `${site.name === "output" ? "For the output" : `Before ${site.name}`}, ${what()} reads most from ${names[first]} (${mine[first].toFixed(2)})${second === undefined ? "" : `, then ${names[second]} (${mine[second].toFixed(2)})`}; ${(state.token < 0 ? site.effective : effective(mine)).toFixed(1)} effective sources of ${mine.length}.`;
    const bars = make("ol", { class: "bars" });
    const top = Math.max(...mine, ...site.weights);
    for (const i of order.slice(0, 12)) {
      const bar = make("span", { class: "bar", style: `width:${((100 * mine[i]) / top).toFixed(1)}%` });
      const mean = make("span", { class: "mean", style: `left:calc(${((100 * site.weights[i]) / top).toFixed(1)}% - 3px)`, title: `mean ${site.weights[i].toFixed(3)}` });
      bars.append(make("li", {}, make("span", { class: "name" }, names[i]), make("span", { class: "track" }, bar, mean), make("span", { class: "amount" }, mine[i].toFixed(3))));
    }
    detail.replaceChildren(make("h3", {}, `Where ${site.name === "output" ? "the output" : site.name} reads`), told, bars, make("p", { class: "quiet" }, `Bars, from 0 to ${top.toFixed(2)}: ${what()}. Upright marks: the mean of all tokens.${order.length > 12 ? " The 12 largest." : ""}`));
    const sentence = state.run.sentences[state.sentence];
    if (!sentence) return;
    const rows = sentence.tokens.map((token, t) => ({
      ...row(site, tokenWeights(state.run, sentence, t)[state.site]),
      head: make("th", { scope: "row", class: t === state.token ? "chosen" : null }, token.replace(/\n/g, "⏎").replace(/^ /, "·")),
    }));
    detail.append(make("details", {}, make("summary", {}, "Every token of the sentence at this site"), mapTable(`${state.run.label}, ${site.name}: weights of each token`, state.run.columns, rows, (w) => shade(DATA.viridis, Math.sqrt(w)))));
  }

  function start() {
    state.sentence = 0;
    state.token = -1;
    state.site = shown().at(-1);
    drawTokens();
    drawMap();
    drawDetail();
  }
  const controls = make("div", { class: "controls" });
  if (runs.length > 1) controls.append(choice("Run", runs.map((run) => run.label), (at) => { state.run = runs[at]; start(); }));
  controls.append(choice("Before", ["attention", "MLP"], (at) => {
    state.kind = ["attention", "mlp"][at];
    if (!shown().includes(state.site)) state.site = shown().at(-1);
    drawMap();
    drawDetail();
  }), sentenceBox);
  box.append(controls, picker, make("div", { class: "cards" }, map, detail));
  start();
}

function mixingPanel(box, runs) {
  const panel = make("div", { class: "panel" });
  function draw(run) {
    const largest = Math.max(...run.matrix.flat().map(Math.abs)) || 1;
    const columns = run.matrix.map((_, i) => (i ? `output ${i}` : "embedding"));
    const rows = run.matrix.map((line, i) => ({
      head: make("th", { scope: "row" }, i === run.matrix.length - 1 ? "output" : `${Math.floor(i / 2) + 1} ${i % 2 ? "mlp" : "attn"}`),
      cells: line.map((value, column) => (column <= i ? value : null)), partial: -1,
    }));
    panel.replaceChildren(
      mapTable(`${run.label}: how much of each output is in what each site reads`, columns, rows, (v) => shade(DATA.diverging, 0.5 + v / largest / 2)),
      key(DATA.diverging, `−${number(largest)}`, number(largest), `mean over ${run.tokens} tokens${run.remainder > 1e-4 ? `; the matrix leaves out ${number(run.remainder)} of what is read` : ""}`),
    );
  }
  if (runs.length > 1) box.append(make("div", { class: "controls" }, choice("Run", runs.map((run) => run.label), (at) => draw(runs[at]))));
  box.append(panel);
  draw(runs[0]);
}

if (DATA.readers.length) readsPanel(document.getElementById("reads"), DATA.readers);
if (DATA.mixing.length) mixingPanel(document.getElementById("mixing"), DATA.mixing);
