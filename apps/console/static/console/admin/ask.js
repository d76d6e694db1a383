// The dialog before every change: it says what would happen, as the server foresees it, and then has it done.
import { el, show, words } from "./dom.js";

const $ = (id) => document.getElementById(id);
let board = null, wish = null, asked = 0;

const ACTIONS = {
  place: { title: () => `Place a model on ${wish.worker.name}`, yes: "Place", fields: ["model", "pinned"], send: () => ["workers", wish.worker.id, "place", { model: $("ask-model").lastElementChild.value, pinned: $("ask-pinned").firstElementChild.checked }] },
  load: { title: () => `Place ${wish.model} on ${wish.worker.name}`, yes: "Place", fields: ["pinned"], send: () => ["workers", wish.worker.id, "place", { model: wish.model, pinned: $("ask-pinned").firstElementChild.checked }] },
  move: { title: () => `Move ${wish.model}`, yes: "Move", fields: ["target"], send: () => ["workers", wish.worker.id, "move", { model: wish.model, to: $("ask-target").lastElementChild.value }] },
  pin: { title: () => `${wish.pinned ? "Pin" : "Unpin"} ${wish.model} on ${wish.worker.name}`, yes: () => (wish.pinned ? "Pin" : "Unpin"), fields: [], send: () => ["workers", wish.worker.id, "place", { model: wish.model, pinned: wish.pinned }] },
  unload: { title: () => `Unload ${wish.model} from ${wish.worker.name}`, yes: "Unload", fields: [], send: () => ["workers", wish.worker.id, "unload", { model: wish.model }] },
  drain: { title: () => `${wish.worker.is_draining ? "Undrain" : "Drain"} ${wish.worker.name}`, yes: () => (wish.worker.is_draining ? "Undrain" : "Drain"), fields: [], send: () => ["workers", wish.worker.id, "drain", { draining: !wish.worker.is_draining }] },
  switch: { title: () => `Switch ${wish.host.name} to ${words(otherMode())}`, yes: "Switch", fields: [], send: () => ["hosts", wish.host.id, "switch-mode", { mode: otherMode() }] },
};
const otherMode = () => (wish.host.mode === "individual" ? "tensor_parallel" : "individual");
const said = (value) => (typeof value === "function" ? value() : value);

export function setBoard(latest) {
  board = latest;
}

export function ask(action, about) {
  wish = { action, ...about };
  const kind = ACTIONS[action];
  const workers = board.hosts.flatMap((host) => host.workers).filter((worker) => worker.id !== about.worker?.id);
  const here = new Set((about.worker?.models ?? []).filter((model) => model.state !== "asleep").map((model) => model.model));
  options("ask-model", board.models.filter((model) => !here.has(model)), "");
  options("ask-target", workers.map((worker) => worker.name), about.target ?? "");
  $("ask-pinned").firstElementChild.checked = false;
  for (const name of ["model", "target", "pinned"]) show($(`ask-${name}`), kind.fields.includes(name));
  $("ask-title").textContent = kind.title();
  $("ask-yes").textContent = said(kind.yes);
  $("ask").showModal();
  dryRun();
}

function options(id, names, chosen) {
  const select = $(id).lastElementChild;
  select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  if (chosen) select.value = chosen;
}

function say(lines, kind = "") {
  $("ask-says").className = `b-says ${kind}`;
  $("ask-says").replaceChildren(...lines.map((line) => el("li", {}, line)));
}

// Of several answers only the one to the latest question counts.
async function dryRun() {
  const number = ++asked;
  $("ask-yes").disabled = true;
  say(["…"]);
  const kind = ACTIONS[wish.action];
  if (kind.fields.includes("target") && !$("ask-target").lastElementChild.value) return say(["There is no other worker."], "bad");
  if (kind.fields.includes("model") && !$("ask-model").lastElementChild.value) return say(["Every model that may be placed is here."], "bad");
  const { problem, body } = await send(kind.send(), true);
  if (number !== asked) return;
  if (problem) return say([problem], "bad");
  $("ask-yes").disabled = false;
  if (body.says) say([...body.says, ...duration(body)], body.possible ? "" : "warn");
  else say(switchLines(body));
}

const duration = (body) => (body.seconds !== null ? [`About ${body.seconds} s, as lately.`] : body.loads.length ? ["How long it takes is not known: no load like it is on record."] : []);

function switchLines(plan) {
  const list = (names) => names.join(", ") || "none";
  return [
    `Starts ${list(plan.starts)} beside ${list(plan.stops)}; when they are up, running requests move to them and the old ones stop.`,
    `Loads ${list(plan.loads)}.`, ...(plan.unloads.length ? [`No longer held by this host: ${list(plan.unloads)}.`] : []),
    plan.seconds === null ? "How long it takes is not known: this is the first switch to this mode." : `About ${plan.seconds} s, as the last ones took.`,
    "If a step fails, the host goes back to its present mode.",
  ];
}

async function send([kind, id, verb, body], dryRunOnly) {
  try {
    const token = document.querySelector("[name=csrfmiddlewaretoken]").value;
    const response = await fetch(`/api/${kind}/${id}/${verb}/`, { method: "POST", headers: { "Content-Type": "application/json", "X-CSRFToken": token }, body: JSON.stringify({ ...body, dry_run: dryRunOnly }) });
    const answer = await response.json();
    return response.ok ? { body: answer } : { problem: answer.error?.message ?? `The gateway answered ${response.status}.` };
  } catch {
    return { problem: "The gateway does not answer." };
  }
}

export function wire(afterwards) {
  $("ask").addEventListener("change", dryRun);
  $("ask-no").addEventListener("click", () => $("ask").close());
  $("ask").querySelector("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    $("ask-yes").disabled = true;
    const { problem } = await send(ACTIONS[wish.action].send(), false);
    if (problem) return say([problem], "bad");
    $("ask").close();
    afterwards();
  });
}
