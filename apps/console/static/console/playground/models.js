// The models that the tabs offer, each with its state, and what to do where there is none.
import { ask } from "./api.js";
import { make } from "./dom.js";

const REFRESH_MS = 10_000;
const STATES = {
  loading: "loading", on_demand: "loads on demand", load_failed: "could not be loaded", not_loaded: "on no worker",
  no_weights: "no weights here", no_worker: "no worker is up",
};
const USABLE = ["ready", "on_demand", "loading"]; // in the order in which they are offered

// Keeps the panels' choices as the fleet is, for as long as the page is open.
export async function offerModels(panels) {
  const refresh = async () => {
    const { data } = await (await ask("/models")).json();
    for (const panel of panels) offer(panel, data.filter((model) => panel.modalities.includes(model.modality)));
  };
  setInterval(() => document.hidden || refresh().catch(() => {}), REFRESH_MS);
  await refresh();
}

function offer(panel, models) {
  const select = panel.form.elements.model;
  const known = JSON.stringify(models);
  if (select.dataset.known === known) return; // nobody's open list is closed for nothing
  select.dataset.known = known;
  const rank = (model) => (USABLE.indexOf(model.state) + USABLE.length + 1) % (USABLE.length + 1);
  const sorted = [...models].sort((a, b) => rank(a) - rank(b));
  const chosen = select.value;
  select.replaceChildren(...sorted.map(option));
  if (sorted.some((model) => model.id === chosen)) select.value = chosen;
  panel.part("missing").replaceChildren(...(["ready", "on_demand"].includes(sorted[0]?.state) ? [] : missing(sorted)));
  panel.offer(sorted);
}

function option(model) {
  const label = model.state === "ready" ? model.name : `${model.name} · ${STATES[model.state]}`;
  const element = new Option(label, model.id);
  element.disabled = !USABLE.includes(model.state);
  return element;
}

// `models` are sorted: the first is the nearest to being ready.
function missing([model]) {
  const code = (text) => make("code", {}, text);
  const said = {
    loading: () => [`${model.name} is loading and will be ready in a moment.`],
    load_failed: () => [`${model.name} could not be loaded; the admin's list of placements says why.`],
    not_loaded: () => [`${model.name} has weights here, and is on no worker yet: place it in the admin.`],
    no_worker: () => ["No worker is up. ", code("manage.py fleet list"), " shows what is known of them."],
    no_weights: () => ["No model of this kind has weights here. Start with ", code(`DEMO_MODELS=${model.id} make run`), "; or fetch them with ",
      code(`manage.py models pull ${model.id}`), ", or stand in a tiny test checkpoint with ", code(`manage.py models make-tiny ${model.id}`),
      ", and place the model on a worker."],
  }[model?.state] ?? (() => ["Your key may use no model of this kind."]);
  return [make("p", { class: "card missing" }, ...said())];
}
