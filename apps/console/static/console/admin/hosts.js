// Hosts as cards, in each its workers with a memory bar, and on each of those its models as chips.
import { attribute, el, keyed, show, size, text, words } from "./dom.js";

const SEGMENTS = ["weights", "kv", "other", "elsewhere"];
const OTHER_MODE = { individual: "tensor_parallel", tensor_parallel: "individual" };

function button(label, act) {
  const made = el("button", { type: "button", class: "b-button small" }, label);
  made.addEventListener("click", act);
  return made;
}

// A node remembers the latest data, which its buttons act on.
function part(node, name, made) {
  (node.parts ??= {})[name] = made;
  return made;
}

export function drawHosts(parent, board, ask) {
  keyed(parent, board.hosts, (host) => host.id, () => makeHost(ask), updateHost);
}

function makeHost(ask) {
  const node = el("section", { class: "b-card b-host" });
  node.ask = ask;
  const head = el("header", {}, part(node, "name", el("h2")), part(node, "address", el("span", { class: "b-soft" })), part(node, "mode", el("span", { class: "b-tag" })), part(node, "cordoned", el("span", { class: "b-tag warn" }, "cordoned")),
    part(node, "switch", button("Switch mode", () => ask("switch", { host: node.host }))));
  node.append(head, part(node, "workers", el("div", { class: "b-workers" })), part(node, "none", el("p", { class: "b-soft" }, "No worker here yet.")));
  return node;
}

function updateHost(node, host) {
  node.host = host;
  const { parts } = node;
  attribute(node, "aria-label", `Host ${host.name}`);
  text(parts.name, host.name);
  text(parts.address, host.address);
  text(parts.mode, `${words(host.mode)}${host.is_managed ? ` · epoch ${host.epoch}` : ""}`);
  show(parts.cordoned, host.is_cordoned);
  show(parts.switch, host.is_managed && !host.is_switching);
  text(parts.switch, `Switch to ${words(OTHER_MODE[host.mode])}`);
  show(parts.none, !host.workers.length);
  keyed(parts.workers, host.workers, (worker) => worker.id, () => makeWorker(node.ask), updateWorker);
}

// --- Workers ---

function makeWorker(ask) {
  const node = el("article", { class: "b-worker" });
  node.ask = ask;
  const bar = part(node, "bar", el("div", { class: "b-memory", role: "img" }));
  for (const name of SEGMENTS) bar.append(part(node, name, el("i", { class: name })));
  bar.append(part(node, "budget", el("i", { class: "budget" })));
  node.append(
    el("header", {}, part(node, "name", el("h3")), part(node, "device", el("span", { class: "b-soft" })), part(node, "state", el("span", { class: "b-tag" })), part(node, "step", el("span", { class: "b-step" }))),
    part(node, "status", el("p", { class: "b-why" })),
    bar, part(node, "numbers", el("p", { class: "b-soft b-numbers" })),
    part(node, "chips", el("ul", { class: "b-chips" })),
    el("p", { class: "b-actions" }, part(node, "place", button("Place a model", () => ask("place", { worker: node.worker }))), part(node, "drain", button("Drain", () => ask("drain", { worker: node.worker })))),
  );
  acceptDrops(node, ask);
  return node;
}

function updateWorker(node, worker) {
  const { parts } = node;
  const moved = node.worker && node.worker.step !== worker.step;
  node.worker = worker;
  attribute(node, "aria-label", `Worker ${worker.name}`);
  text(parts.name, worker.name);
  text(parts.device, [worker.device, words(worker.mode)].filter(Boolean).join(" · "));
  text(parts.state, worker.state);
  attribute(parts.state, "class", `b-tag ${{ serving: "good", stuck: "bad", unreachable: "bad", fenced: "bad" }[worker.state] ?? "warn"}`);
  text(parts.step, worker.seen_ms_ago === null ? "" : `step ${worker.step.toLocaleString()}`);
  attribute(parts.step, "class", moved ? "b-step moving" : "b-step");
  const silent = worker.seen_ms_ago === null;
  show(parts.status, silent || worker.status.startsWith("stuck"));
  text(parts.status, worker.status);
  text(parts.drain, worker.is_draining ? "Undrain" : "Drain");
  updateMemory(parts, worker.memory);
  const chips = worker.models.map((model) => ({ ...model, worker }));
  keyed(parts.chips, chips, (chip) => `${chip.model}@${chip.revision}`, () => makeChip(node.ask), updateChip);
}

function updateMemory(parts, memory) {
  const free = Math.max(0, memory.total - SEGMENTS.reduce((sum, name) => sum + memory[name], 0));
  const share = (bytes) => `${memory.total ? Math.min(100, (100 * bytes) / memory.total) : 0}%`;
  for (const name of SEGMENTS) {
    attribute(parts[name], "style", `width: ${share(memory[name])}`);
    show(parts[name], memory[name] > 0);
    attribute(parts[name], "title", `${{ weights: "weights", kv: "KV", other: "activations, other", elsewhere: "used by others" }[name]}: ${size(memory[name])}`);
  }
  attribute(parts.budget, "style", `left: ${share(memory.budget)}`);
  attribute(parts.budget, "title", `budget for models: ${size(memory.budget)}`);
  const reserved = memory.weights + memory.kv + memory.other;
  const numbers = `weights ${size(memory.weights)} · KV ${size(memory.kv)} · other ${size(memory.other)} · free ${size(free)} of ${size(memory.total)} · budget ${size(reserved)} of ${size(memory.budget)} taken`;
  text(parts.numbers, memory.total ? numbers : "Its memory is not known.");
  attribute(parts.bar, "aria-label", memory.total ? numbers : "memory unknown");
}

// --- Models ---

function makeChip(ask) {
  const node = el("li", { class: "b-chip", draggable: "true" });
  const asked = (action) => () => ask(action, { worker: node.chip.worker, model: node.chip.model, pinned: !node.chip.is_pinned });
  const line = el("div", { class: "b-chip-head" }, part(node, "pin", el("span", { class: "material-symbols-outlined b-pin", title: "pinned", role: "img", "aria-label": "pinned" }, "keep")), part(node, "name", el("b")), part(node, "tiny", el("span", { class: "b-tag warn", title: "made here with random weights: for trying out" }, "tiny")), part(node, "state", el("span", { class: "b-tag" })));
  const buttons = el("div", { class: "b-chip-actions" });
  for (const [name, label] of [["load", "Place"], ["move", "Move"], ["pin_it", "Pin"], ["unload", "Unload"]]) buttons.append(part(node, name, button(label, asked({ load: "load", pin_it: "pin" }[name] ?? name))));
  node.append(line, part(node, "progress", el("progress", { max: "1" })), part(node, "more", el("div", { class: "b-soft" })), buttons);
  node.addEventListener("dragstart", (event) => event.dataTransfer.setData("application/x-model", JSON.stringify({ worker: node.chip.worker.id, model: node.chip.model, asleep: node.chip.state === "asleep" })));
  return node;
}

function updateChip(node, chip) {
  node.chip = chip;
  const { parts } = node;
  attribute(node, "class", `b-chip ${chip.state}`);
  attribute(node, "aria-label", `${chip.model} on ${chip.worker.name}, ${chip.state}`);
  text(parts.name, chip.model + (chip.revision ? `@${chip.revision}` : ""));
  show(parts.pin, chip.is_pinned);
  show(parts.tiny, chip.tiny);
  text(parts.state, chip.leaves ? `leaves ${chip.leaves}` : chip.state === "loading" ? `loading ${Math.round(chip.progress * 100)} %` : chip.state);
  attribute(parts.state, "class", `b-tag ${{ ready: "good", failed: "bad", asleep: "" }[chip.state] ?? "warn"}`);
  show(parts.progress, chip.state === "loading");
  if (parts.progress.value !== chip.progress) parts.progress.value = chip.progress;
  text(parts.more, details(chip));
  const asleep = chip.state === "asleep";
  show(parts.load, asleep);
  for (const name of ["move", "pin_it", "unload"]) show(parts[name], !asleep);
  text(parts.pin_it, chip.is_pinned ? "Unpin" : "Pin");
  for (const [name, label] of [["load", "Place"], ["move", "Move"], ["pin_it", parts.pin_it.textContent], ["unload", "Unload"]]) attribute(parts[name], "aria-label", `${label} ${chip.model} on ${chip.worker.name}`);
}

function details(chip) {
  if (chip.state === "loading") return chip.stage || "begins";
  if (chip.state !== "ready") return [chip.note, chip.state === "asleep" ? `needs ${size(chip.bytes)}` : ""].filter(Boolean).join(", ");
  const traffic = chip.running || chip.waiting ? `${chip.running} of ${chip.max_running} running${chip.waiting ? `, ${chip.waiting} waiting` : ""}` : "idle";
  const rate = chip.tokens_per_second === null ? "" : `${chip.tokens_per_second} tokens/s in the last minute`;
  const how = chip.engine === "static" ? "static batching" : "";
  return [traffic, rate, size(chip.bytes), how, chip.is_placed ? "" : "on demand"].filter(Boolean).join(" · ");
}

// A chip dropped on a worker asks to move the model there; the buttons do the same.
function acceptDrops(node, ask) {
  const accepts = (event) => event.dataTransfer.types.includes("application/x-model");
  node.addEventListener("dragover", (event) => { if (accepts(event)) { event.preventDefault(); node.classList.add("over"); } });
  node.addEventListener("dragleave", () => node.classList.remove("over"));
  node.addEventListener("drop", (event) => {
    node.classList.remove("over");
    if (!accepts(event)) return;
    event.preventDefault();
    const from = JSON.parse(event.dataTransfer.getData("application/x-model"));
    if (from.asleep) ask("load", { worker: node.worker, model: from.model });
    else if (from.worker !== node.worker.id) ask("move", { worker: { id: from.worker }, model: from.model, target: node.worker.name });
  });
}
