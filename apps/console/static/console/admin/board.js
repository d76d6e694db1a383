// The placement board: asks for the state of the fleet every 1.5 s and draws it in place.
import { ask, setBoard, wire } from "./ask.js";
import { show, text } from "./dom.js";
import { drawHosts } from "./hosts.js";
import { drawLists } from "./lists.js";

const EVERY_MS = 1500, STALE_MS = 5000, PATIENCE_MS = 4000;
const $ = (id) => document.getElementById(id);
let heardAt = Date.now(), timer = 0, board = null;

async function refresh() {
  clearTimeout(timer);
  try {
    const response = await fetch("/api/board/", { signal: AbortSignal.timeout(PATIENCE_MS) });
    if (response.status === 401 || response.status === 403) return notice("You are signed out. Reload the page to sign in.");
    if (!response.ok) throw new Error(String(response.status));
    board = await response.json();
    heardAt = Date.now();
    draw();
  } catch {
    if (Date.now() - heardAt > STALE_MS) notice(`This is ${Math.round((Date.now() - heardAt) / 1000)} s old: the gateway does not answer.`);
  }
  timer = setTimeout(refresh, EVERY_MS);
}

function draw() {
  setBoard(board);
  drawHosts($("hosts"), board, ask);
  drawLists(board);
  show($("empty"), !board.hosts.length);
  notice(board.problem || (board.leader ? "" : "No fleet controller leads: nothing is loaded, moved or watched until one does. Wishes are kept."));
}

function notice(words) {
  text($("notice"), words);
  show($("notice"), Boolean(words));
}

setInterval(() => {
  const seconds = Math.round((Date.now() - heardAt) / 1000);
  text($("freshness"), board ? (seconds < 3 ? "live" : `${seconds} s old`) : "");
  $("board").classList.toggle("stale", Date.now() - heardAt > STALE_MS);
}, 500);
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
wire(refresh);
refresh();
