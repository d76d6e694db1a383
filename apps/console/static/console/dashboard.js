// The dashboard: asks for its data every five seconds and draws it.
import { lineChart } from "./chart.js";

const $ = (id) => document.getElementById(id);
const COLORS = ["#6d5ef6", "#12a594", "#e5484d"];
let windowSeconds = 900;

const ms = (value) => (value === null || value === undefined ? "–" : value >= 1000 ? `${(value / 1000).toFixed(1)} s` : `${Math.round(value)} ms`);
const count = (value) => (value >= 1e6 ? `${(value / 1e6).toFixed(1)} M` : value >= 1e4 ? `${(value / 1e3).toFixed(1)} k` : String(Math.round(value * 10) / 10));
const three = (values) => (values ?? []).map(ms).join(" / ");
const gib = (bytes) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;

function row(cells) {
  const made = document.createElement("tr");
  for (const cell of cells) made.insertCell().textContent = cell;
  return made;
}

function fill(table, rows, width) {
  const none = document.createElement("tr");
  const cell = none.insertCell();
  cell.colSpan = width;
  cell.textContent = "Nothing in this window.";
  table.tBodies[0].replaceChildren(...(rows.length ? rows : [none]));
}

// Steps without any request have no row; counts there are zero.
function filled(data, value, empty) {
  const rows = new Map(data.series.map((entry) => [entry.at, entry]));
  const now = Math.floor(Date.now() / 1000 / data.step) * data.step;
  const points = [];
  for (let at = now - data.window; at <= now; at += data.step) points.push([at, rows.has(at) ? value(rows.get(at)) : empty]);
  return points;
}

function draw(data) {
  const to = Date.now() / 1000, from = to - data.window;
  const quantiles = (name) => ["p50", "p95", "p99"].map((label, i) => ({ name: label, color: COLORS[i], points: filled(data, (r) => r[name][i], null) }));
  lineChart($("chart-tps"), [{ name: "tokens/s", color: COLORS[0], points: filled(data, (r) => r.tokens_per_second, 0) }], { from, to, format: count });
  lineChart($("chart-requests"), ["succeeded", "refused", "failed"].map((name, i) => ({ name, color: [COLORS[1], "#ffb224", COLORS[2]][i], points: filled(data, (r) => r[name], 0) })), { from, to, format: count });
  lineChart($("chart-latency"), quantiles("latency_ms"), { from, to, format: ms });
  lineChart($("chart-ttft"), quantiles("ttft_ms"), { from, to, format: ms });
}

function tiles(data) {
  const total = (name) => data.models.reduce((sum, model) => sum + model[name], 0);
  const lanes = Object.values(data.load.lanes);
  const shown = {
    "requests": count(total("requests")),
    "output tokens": count(total("completion_tokens")),
    "tokens/s, mean": (total("completion_tokens") / data.window).toFixed(1),
    "refused": count(total("refused")),
    "running now": lanes.reduce((sum, lane) => sum + lane.running, 0),
    "waiting now": lanes.reduce((sum, lane) => sum + lane.waiting, 0),
  };
  $("tiles").replaceChildren(...Object.entries(shown).map(([name, value]) => {
    const tile = document.createElement("div");
    tile.className = "tile";
    const number = document.createElement("b"), label = document.createElement("span");
    number.textContent = value;
    label.textContent = name;
    tile.append(number, label);
    return tile;
  }));
}

function workers(data) {
  $("workers").replaceChildren(...data.workers.map((worker) => {
    const card = document.createElement("div");
    card.className = "worker";
    const title = document.createElement("strong");
    title.textContent = `${worker.worker_id} · ${worker.device}${worker.draining ? " · draining" : ""}`;
    const memory = document.createElement("p");
    const used = worker.memory_total_bytes - worker.memory_free_bytes;
    memory.textContent = `memory ${gib(used)} of ${gib(worker.memory_total_bytes)}`;
    const bar = document.createElement("progress");
    bar.max = worker.memory_total_bytes; bar.value = used;
    card.append(title, memory, bar, ...worker.models.map((model) => {
      const line = document.createElement("p");
      const state = document.createElement("span");
      state.className = `state ${model.state}`;
      state.textContent = model.state === "loading" ? `loading ${Math.round(model.progress * 100)} %` : model.state;
      line.append(`${model.model} `, state, ` ${model.running} running of ${model.max_running}`);
      return line;
    }));
    return card;
  }));
  if (!data.workers.length) $("workers").textContent = "No worker is alive.";
}

async function refresh() {
  let data;
  try {
    const response = await fetch(`data/?window=${windowSeconds}`);
    if (!response.ok) throw new Error();
    data = await response.json();
  } catch {
    return problem("The gateway does not answer; trying again.");
  }
  problem(data.available ? data.problem : "ClickHouse does not answer: history is missing until it is back. Requests are served as usual.");
  tiles(data);
  draw(data);
  workers(data);
  fill($("models"), data.models.map((m) => row([m.model, m.requests, m.succeeded, m.refused, count(m.prompt_tokens), count(m.completion_tokens), three(m.latency_ms), three(m.first_token_ms), ms(m.token_ms)])), 9);
  fill($("failures"), data.failures.map((f) => row([new Date(f.at * 1000).toLocaleTimeString(), f.request_id || "–", f.model, f.outcome, f.code])), 5);
}

function problem(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text ?? "";
}

for (const button of document.querySelectorAll("[data-window]")) {
  button.addEventListener("click", () => {
    for (const other of document.querySelectorAll("[data-window]")) other.setAttribute("aria-pressed", other === button);
    windowSeconds = Number(button.dataset.window);
    refresh();
  });
}
refresh();
setInterval(() => { if (!document.hidden) refresh(); }, 5000);
