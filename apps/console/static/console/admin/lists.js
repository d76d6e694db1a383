// What waits and why, how mode switches go, and what was loaded and evicted.
import { ago, attribute, el, keyed, show, text, words } from "./dom.js";

const CAUSES = { capacity: "a free place", batch_window: "its batch to fill", model_load: "its model to load", mode_switch: "a host to change its mode", no_worker: "a worker that has the model", fairness: "its fair turn", priority: "those before it", quota: "quota" };

export function drawLists(board) {
  const fill = (name, items, make, update) => {
    keyed(document.getElementById(name), items, (item) => item.id ?? item.model, make, update);
    show(document.getElementById(`no-${name}`), !items.length);
  };
  fill("lanes", board.lanes, line, (node, lane) => {
    text(node.head, lane.model);
    const cause = lane.waiting && lane.cause ? `, for ${CAUSES[lane.cause] ?? words(lane.cause)}` : "";
    text(node.body, `${lane.running} running, ${lane.waiting} waiting${cause}`);
  });
  fill("switches", board.switches, makeSwitch, updateSwitch);
  fill("movements", board.movements, line, (node, row) => {
    const what = [row.evicted && `unloaded ${row.evicted}`, row.loaded && (row.error ? `could not load ${row.loaded}` : `loaded ${row.loaded}`)].filter(Boolean).join(", ");
    text(node.head, `${row.worker}: ${what}`);
    const source = row.loaded && !row.error ? (row.from_host_memory ? " from host memory" : " from disk") : "";
    text(node.body, `${row.error || row.reason} · ${row.seconds} s${source} · ${ago(row.ended_at)}`);
    attribute(node, "class", row.error ? "bad" : "");
  });
}

function line() {
  const node = el("li");
  node.head = el("b");
  node.body = el("span", { class: "b-soft" });
  node.append(node.head, node.body);
  return node;
}

function makeSwitch() {
  const node = line();
  node.steps = el("ol", { class: "b-steps" });
  node.append(node.steps);
  return node;
}

function updateSwitch(node, row) {
  const { state } = row;
  attribute(node, "class", { failed: "bad", rolled_back: "bad", running: "running" }[state] ?? "");
  text(node.head, `${row.host}: ${words(row.from_mode)} to ${words(row.to_mode)}: ${words(state)}`);
  const took = row.ended_at ? ` · ${((Date.parse(row.ended_at) - Date.parse(row.created_at)) / 1000).toFixed(1)} s` : "";
  text(node.body, `${row.reason ? `${row.reason} · ` : ""}asked for by ${row.requested_by}${took} · ${ago(row.created_at)}`);
  keyed(node.steps, row.steps, (step) => step.step + step.started_at, () => el("li"), (item, step) => {
    attribute(item, "class", step.succeeded === null ? (step.ended_at ? "" : "running") : step.succeeded ? "good" : "bad");
    text(item, step.step);
    attribute(item, "title", step.detail || (step.ended_at ? "done" : "under way"));
  });
}
