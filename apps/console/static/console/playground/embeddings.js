// Embeddings: a text a line over /v1/embeddings, and how alike the lines are.
import { ask, cost, requestId } from "./api.js";
import { duration, make } from "./dom.js";
import { Panel } from "./panel.js";

const THEN = {
  python: ["for item in made.data:", "    print(item.index, item.embedding[:4], len(item.embedding))"],
  javascript: ["for (const item of made.data) console.log(item.index, item.embedding.slice(0, 4), item.embedding.length);"],
};

export class Embeddings extends Panel {
  constructor() {
    super("embeddings");
  }

  call() {
    const input = this.form.elements.input.value.split("\n").map((line) => line.trim()).filter(Boolean);
    const body = { ...this.fields("model"), input, encoding_format: "float" };
    return { path: "/embeddings", method: "embeddings.create", result: "made", body, then: THEN };
  }

  async run(signal) {
    const { path, body } = this.call();
    const started = performance.now();
    const response = await ask(path, { method: "POST", body, signal });
    const { data, usage } = await response.json();
    const took = duration(performance.now() - started);
    const vectors = data.map((item) => item.embedding);
    this.stats(took, `${usage.total_tokens} tokens`, `${vectors.length} × ${vectors[0].length} numbers`, await cost(requestId(response)));
    this.part("results").replaceChildren(make("article", { class: "card result" },
      make("h2", {}, "Cosine similarity"), make("div", { class: "scroll" }, likeness(body.input, vectors)),
      make("p", { class: "hint" }, this.badge(body.model))));
  }
}

function likeness(lines, vectors) {
  const table = make("table", { class: "likeness" });
  const head = table.createTHead().insertRow();
  head.append(make("th"), ...lines.map((_, place) => make("th", { scope: "col" }, `${place + 1}`)));
  for (const [place, line] of lines.entries()) {
    const row = table.insertRow();
    row.append(make("th", { scope: "row", title: line }, `${place + 1} ${line}`));
    for (const other of vectors) row.insertCell().textContent = cosine(vectors[place], other).toFixed(3);
  }
  return table;
}

function cosine(a, b) {
  const dot = (x, y) => x.reduce((sum, value, place) => sum + value * y[place], 0);
  return dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
}
