"use strict";

// The same hues as in the printed contact sheet.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
                 "#8C564B", "#7F3FBF", "#B5BD00", "#17202A"];
const MUTED = "#656D76";
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

let answer = null;    // of the last search
let shown = [];       // which of its words are outlined
let turn = 0;         // a late answer must not replace a newer one
let preview = null;   // address of the dropped picture

function make(name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function say(line, isError = false) {
  byId("status").textContent = line;
  byId("status").classList.toggle("error", isError);
}

async function ask(address, options) {
  const response = await fetch(address, options);
  const content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}

async function search(address, options) {
  const mine = ++turn;
  say("searching …");
  try {
    const found = await ask(address, options);
    if (mine !== turn) return;
    answer = found;
    shown = found.words.map((word) => word.spoken && !found.grid);
    say(`${found.hits.length} best in ${found.milliseconds.toFixed(1)} ms`);
    showQuery();
    showHits();
  } catch (error) {
    if (mine !== turn) return;
    answer = null;
    byId("query").replaceChildren();
    byId("hits").replaceChildren();
    say(error.message, true);
  }
}

function searchText(text) {
  forgetPicture();
  history.replaceState(null, "", "?" + new URLSearchParams({ text }));
  return search("/search?" + new URLSearchParams({ text }));
}

function searchPicture(file) {
  forgetPicture();
  preview = URL.createObjectURL(file);
  byId("text").value = "";
  history.replaceState(null, "", location.pathname);
  return search("/search", { method: "POST", body: file });
}

function forgetPicture() {
  if (preview) URL.revokeObjectURL(preview);
  preview = null;
}

function colour(n) {
  const spoken = answer.words.slice(0, n).filter((word) => word.spoken).length;
  return answer.words[n].spoken ? COLOURS[spoken % COLOURS.length] : MUTED;
}

function showQuery() {
  const query = byId("query");
  query.replaceChildren();
  if (preview) {
    query.append(askedPicture());
    return;
  }
  answer.words.forEach((word, n) => {
    const chip = make("button", "word", word.text);
    chip.type = "button";
    chip.style.color = chip.style.borderColor = colour(n);
    chip.setAttribute("aria-pressed", shown[n]);
    chip.title = "outline the best patch of this word, or not";
    chip.addEventListener("click", () => {
      shown[n] = !shown[n];
      chip.setAttribute("aria-pressed", shown[n]);
      outlineHits();
    });
    query.append(chip);
  });
}

// The dropped picture: the patch under the pointer is outlined with its match in every hit.
function askedPicture() {
  const box = make("div", "picture asked");
  const image = make("img");
  image.src = preview;
  image.alt = "the picture that is looked for";
  box.append(image);
  if (!answer.grid) return box;
  const [rows, columns] = answer.grid;
  const overlay = layer(answer.grid);
  const leading = answer.words.length - rows * columns;
  for (let patch = 0; patch < rows * columns; patch++) {
    const cell = rectangle(patch, columns, 0);
    cell.setAttribute("class", "cell");
    cell.addEventListener("pointerenter", () => {
      shown = answer.words.map((_, n) => n === patch + leading);
      outlineHits();
    });
    overlay.append(cell);
  }
  box.append(overlay);
  const note = make("span", "", "point at a patch to see its match in every picture");
  note.style.color = MUTED;
  const both = document.createDocumentFragment();
  both.append(box, note);
  return both;
}

function showHits() {
  byId("hits").replaceChildren(...answer.hits.map((hit) => {
    const figure = make("figure");
    const box = make("div", "picture");
    const image = make("img");
    image.src = `/image/${hit.number}?side=256`;
    image.alt = hit.key;
    image.loading = "lazy";
    box.append(image);
    if (hit.grid) box.append(layer(hit.grid));
    const caption = make("figcaption");
    caption.append(make("span", "score", hit.score.toFixed(3)), " ", make("span", "key", hit.key));
    if (!preview) caption.append(shares(hit));
    figure.append(box, caption);
    return figure;
  }));
  outlineHits();
}

// How similar each word's best patch is: the score is the mean over all tokens.
function shares(hit) {
  const row = make("div", "shares");
  hit.words.forEach((word, n) => {
    if (!answer.words[n].spoken) return;
    const part = make("span", "", word.similarity.toFixed(2));
    part.style.color = colour(n);
    part.title = answer.words[n].text;
    row.append(part);
  });
  return row;
}

function layer(grid) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${grid[1]} ${grid[0]}`);
  svg.setAttribute("preserveAspectRatio", "none");
  return svg;
}

function rectangle(patch, columns, inset) {
  const element = document.createElementNS(SVG, "rect");
  const size = 1 - 2 * inset;
  const place = { x: (patch % columns) + inset, y: Math.floor(patch / columns) + inset,
                  width: size, height: size };
  for (const [name, value] of Object.entries(place)) element.setAttribute(name, value);
  return element;
}

function outlineHits() {
  document.querySelectorAll("#hits figure").forEach((figure, place) => {
    const svg = figure.querySelector("svg");
    if (!svg) return;
    svg.replaceChildren();
    const hit = answer.hits[place];
    const within = new Map();  // words that chose one patch are drawn inside one another
    hit.words.forEach((word, n) => {
      if (!shown[n]) return;
      for (const patch of word.patches) {
        const before = within.get(patch) || 0;
        within.set(patch, before + 1);
        const outline = rectangle(patch, hit.grid[1], Math.min(0.05 + 0.1 * before, 0.45));
        outline.setAttribute("stroke", answer.grid ? COLOURS[1] : colour(n));
        outline.dataset.word = answer.words[n].text;
        svg.append(outline);
      }
    });
  });
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  searchText(byId("text").value);
});
byId("file").addEventListener("change", (event) => {
  if (event.target.files.length) searchPicture(event.target.files[0]);
  event.target.value = "";
});
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    byId("drop").hidden = false;
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").hidden = true;
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").hidden = true;
  const file = event.dataTransfer.files[0];
  if (file) searchPicture(file);
  else say("that was no picture file", true);
});

ask("/about").then((about) => {
  const skipped = about.skipped ? `, ${about.skipped} could not be read` : "";
  const partly = about.complete ? "" : "; the index is not complete";
  byId("text").disabled = !about.text;
  if (turn === 0) say(`${about.images.toLocaleString("en")} pictures${skipped}${partly}`);
}).catch((error) => say(error.message, true));

const asked = new URLSearchParams(location.search).get("text");
if (asked) {
  byId("text").value = asked;
  searchText(asked);
}
