// What the tabs share: a form of settings, one run at a time with its problem and its figures, and the code of its call.
import { worded } from "./api.js";
import { showCode } from "./code.js";
import { make } from "./dom.js";

export class Panel {
  #running = null;
  #models = new Map();

  constructor(id) {
    this.form = document.getElementById(id);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.#running) this.#start();
    });
    this.part("stop").addEventListener("click", () => this.#running?.abort());
    this.part("code").addEventListener("click", () => showCode(this.call()));
    this.form.elements.model.addEventListener("change", () => this.modelChanged());
  }

  // The call that the settings make now. Raises nothing: an empty prompt gives a call that the API refuses.
  call() {
    throw new Error("each tab has its own");
  }

  // One run, from the button to its end. Whoever presses Stop aborts the signal, and so the request.
  async run(signal) {
    throw new Error("each tab has its own");
  }

  // Another model was chosen, or is known better.
  modelChanged() {
    this.part("tiny").hidden = !this.model?.tiny;
  }

  get modalities() {
    return this.form.dataset.modalities.split(" ");
  }

  get model() {
    return this.#models.get(this.form.elements.model.value);
  }

  // The fields of the form by name, with numbers as numbers; what is empty is left out.
  fields(...names) {
    const found = names.map((name) => [name, this.form.elements[name]]).filter(([, input]) => input.value !== "" && !input.disabled);
    return Object.fromEntries(found.map(([name, input]) => [name, ["number", "range"].includes(input.type) ? Number(input.value) : input.value]));
  }

  // A call with a seed drawn where none was given, so that what is made can be made again.
  seeded(call) {
    return { ...call, body: { ...call.body, seed: call.body.seed ?? Math.floor(Math.random() * 2 ** 31) } };
  }

  part(name) {
    return this.form.querySelector(`[data-part=${name}]`);
  }

  offer(models) {
    this.#models = new Map(models.map((model) => [model.id, model]));
    this.modelChanged();
  }

  // A model's name, with what marks a tiny one.
  badge(id) {
    const tiny = this.#models.get(id)?.tiny;
    return make("span", { class: "made-by" }, id, tiny ? make("span", { class: "state tiny" }, "tiny test checkpoint") : null);
  }

  stats(...figures) {
    this.part("stats").textContent = figures.filter(Boolean).join(" · ");
  }

  problem(error) {
    this.part("problem").hidden = !error;
    this.part("problem").textContent = error ? worded(error) : "";
  }

  async #start() {
    this.#running = new AbortController();
    this.#show();
    this.problem(null);
    try {
      await this.run(this.#running.signal);
    } catch (error) {
      if (error.name !== "AbortError") this.problem(error);
    }
    this.#running = null;
    this.#show();
  }

  #show() {
    this.part("go").hidden = this.#running;
    this.part("stop").hidden = !this.#running;
  }
}
