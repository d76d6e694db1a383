// Images: /v1/images/generations; a single one is sketched while it is made.
import { ask, cost, frames, requestId } from "./api.js";
import { showCode } from "./code.js";
import { button, duration, make } from "./dom.js";
import { Panel } from "./panel.js";

const PREVIEWS = 3;
const viewer = document.getElementById("viewer");
viewer.addEventListener("click", () => viewer.close());

export class Images extends Panel {
  constructor() {
    super("images");
  }

  call() {
    const single = Number(this.form.elements.n.value) === 1;
    const body = {
      ...this.fields("model", "prompt", "n", "size", "steps", "seed"), response_format: "b64_json",
      ...(single && { stream: true, partial_images: PREVIEWS }),
    };
    const made = { path: "/images/generations", method: "images.generate", body, ours: ["steps", "seed"], prelude: PRELUDE };
    return single ? { ...made, result: "stream", then: STREAMED } : { ...made, result: "made", then: WHOLE };
  }

  async run(signal) {
    const call = this.seeded(this.call());
    const batch = new Batch(call, this.badge(call.body.model));
    this.part("results").prepend(batch.element);
    const started = performance.now();
    const clock = setInterval(() => this.stats(duration(performance.now() - started)), 200);
    try {
      const response = await ask(call.path, { method: "POST", body: call.body, signal });
      const usage = call.body.stream ? await batch.follow(response) : await batch.take(response);
      const spent = usage && `${usage.total_tokens.toLocaleString()} patches`;
      clearInterval(clock);
      const figures = [duration(performance.now() - started), spent, await cost(requestId(response))];
      this.stats(...figures);
      batch.finish(figures);
    } catch (error) {
      batch.element.remove();
      this.stats();
      throw error;
    } finally {
      clearInterval(clock);
    }
  }
}

// The pictures of one call.
class Batch {
  constructor(call, madeBy) {
    this.call = call;
    const { prompt, size, steps, seed, n } = call.body;
    this.figures = Array.from({ length: n }, () => make("figure", { class: "picture making" }));
    this.line = make("p", { class: "hint" }, madeBy, ` · ${size} · ${steps} step${steps > 1 ? "s" : ""} · seed ${seed}`);
    this.tools = make("div", { class: "row" }, button("Code", () => showCode(call)));
    this.element = make("article", { class: "card result" },
      make("p", { class: "asked" }, prompt), make("div", { class: "pictures" }, ...this.figures), this.line, this.tools);
  }

  // Sketches first, the picture last.
  async follow(response) {
    let usage = null;
    for await (const event of frames(response)) {
      const done = event.type === "image_generation.completed";
      this.#show(0, event.b64_json, done ? "image/png" : "image/jpeg", done);
      usage = event.usage ?? usage;
    }
    return usage;
  }

  async take(response) {
    const { data, usage } = await response.json();
    for (const [place, image] of data.entries()) this.#show(place, image.b64_json, "image/png", true);
    return usage;
  }

  #show(place, b64, mime, done) {
    const url = `data:${mime};base64,${b64}`;
    const image = make("img", { src: url, alt: `${done ? "" : "sketch of "}${this.call.body.prompt}` });
    const figure = this.figures[place];
    if (!done) return figure.replaceChildren(image);
    const open = button("", () => view(url, this.call.body.prompt), "bare");
    open.setAttribute("aria-label", `Open picture ${place + 1}`);
    open.append(image);
    figure.classList.remove("making");
    figure.replaceChildren(open, make("a", { class: "button", href: url, download: `image-${place + 1}.png` }, "Download"));
  }

  finish(figures) {
    this.line.append(` · ${figures.filter(Boolean).join(" · ")}`);
  }
}

function view(url, alt) {
  viewer.querySelector("img").src = url;
  viewer.querySelector("img").alt = alt;
  viewer.showModal();
}

const PRELUDE = { python: ["import base64"], javascript: [`import { writeFile } from "node:fs/promises";`] };
const STREAMED = {
  python: ["for event in stream:", `    if event.type == "image_generation.completed":`,
    `        open("image.png", "wb").write(base64.b64decode(event.b64_json))`],
  javascript: ["for await (const event of stream) {", `  if (event.type !== "image_generation.completed") continue;`,
    `  await writeFile("image.png", Buffer.from(event.b64_json, "base64"));`, "}"],
};
const WHOLE = {
  python: ["for place, image in enumerate(made.data, 1):", `    open(f"image-{place}.png", "wb").write(base64.b64decode(image.b64_json))`],
  javascript: ["for (const [place, image] of made.data.entries()) {",
    "  await writeFile(`image-${place + 1}.png`, Buffer.from(image.b64_json, \"base64\"));", "}"],
};
