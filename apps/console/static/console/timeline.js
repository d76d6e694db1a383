// One request's time, by cause: asks /v1/requests/{id} until it has ended, and draws a bar.
const $ = (id) => document.getElementById(id);
const CAUSES = {
  dispatch: ["a dispatcher to notice", "#8b8d98"], capacity: ["workers busy with what came before", "#6d5ef6"],
  priority: ["later requests of a higher class", "#e5484d"], fairness: ["organizations that had had less", "#ffb224"],
  batch_window: ["the batch to gather", "#12a594"], model_load: ["the model to load", "#0090ff"],
  mode_switch: ["workers to change mode", "#ab4aba"], no_worker: ["any worker at all", "#99543a"],
  retry: ["another attempt, after one was lost", "#f76b15"], prefill: ["the prompt to be read", "#30a46c"],
  generating: ["the answer to be generated", "#cfcbdc"],
};
let timer;

function segments(told) {
  const found = Object.entries(told.wait).filter(([, ms]) => ms > 0);
  const { first_token_ms: first, finished_ms: finished } = told.timeline;
  if (finished !== null && first !== null && finished > first) found.push(["generating", finished - first]);
  return found;
}

function draw(told) {
  const parts = segments(told);
  const total = parts.reduce((sum, [, ms]) => sum + ms, 0) || 1;
  $("title").textContent = `${told.id} · ${told.outcome || told.state}`;
  const place = told.queue ? ` Place ${told.queue.position + 1} of ${told.queue.waiting}; starts in about ${(told.queue.starts_in_ms / 1000).toFixed(1)} s.` : "";
  $("summary").textContent = `${told.model}, ${told.service_tier} tier, ${told.attempts} attempt${told.attempts === 1 ? "" : "s"}.${place}`;
  $("timeline").setAttribute("aria-label", parts.map(([cause, ms]) => `${cause} ${ms} ms`).join(", "));
  $("timeline").replaceChildren(...parts.map(([cause, ms]) => {
    const bar = document.createElement("i");
    bar.style.background = CAUSES[cause]?.[1] ?? "#8b8d98";
    bar.style.flexGrow = ms / total;
    bar.title = `${CAUSES[cause]?.[0] ?? cause}: ${ms} ms`;
    return bar;
  }));
  $("causes").replaceChildren(...parts.map(([cause, ms]) => {
    const row = document.createElement("tr");
    for (const text of [CAUSES[cause]?.[0] ?? cause, ms.toLocaleString(), `${Math.round((100 * ms) / total)} %`]) row.insertCell().textContent = text;
    return row;
  }));
  $("request").hidden = false;
}

async function show(id) {
  clearTimeout(timer);
  const response = await fetch(`/v1/requests/${encodeURIComponent(id)}`);
  const told = await response.json();
  $("problem").hidden = response.ok;
  $("problem").textContent = response.ok ? "" : told.error.message;
  if (!response.ok) return void ($("request").hidden = true);
  draw(told);
  if (told.state !== "finished") timer = setTimeout(() => show(id), 500);
}

$("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const id = new FormData($("find")).get("id").trim();
  history.replaceState(null, "", `?id=${encodeURIComponent(id)}`);
  show(id);
});
const asked = new FormData($("find")).get("id");
if (asked) show(asked);
