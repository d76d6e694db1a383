// The conversation on the page: questions, and answers that grow.
import { copy } from "./copy.js";
import { $, make } from "./dom.js";
import { render } from "./markdown.js";

export function addQuestion(text) {
  $("empty").hidden = true;
  add(make("article", { class: "turn question", "aria-label": "You" }, make("div", { class: "body" }, text)));
}

// An answer being written. `regenerate` is called when its reader asks for another.
export function addAnswer({ regenerate }) {
  const body = make("div", { class: "body" });
  const stats = make("small", { class: "stats" });
  const tools = make("span", { class: "tools" });
  const turn = make("article", { class: "turn answer streaming", "aria-label": "Model" }, body, make("footer", {}, stats, tools));
  add(turn);
  let text = "";
  let drawing = 0;

  const draw = () => {
    drawing = 0;
    body.replaceChildren(...render(text));
  };
  return {
    get text() {
      return text;
    },
    get attached() {
      return turn.isConnected;
    },
    // Drawn once a frame, however many tokens arrive in it.
    append(piece) {
      text += piece;
      drawing ||= requestAnimationFrame(draw);
    },
    showStats(line) {
      stats.textContent = line;
    },
    finish(line) {
      cancelAnimationFrame(drawing);
      draw();
      turn.classList.remove("streaming");
      stats.textContent = line;
      tools.append(tool("Copy", (button) => copy(button, text)), tool("Regenerate", regenerate));
    },
    remove() {
      turn.remove();
    },
  };
}

function add(turn) {
  $("turns").append(turn);
  $("log").scrollTop = $("log").scrollHeight;
}

function tool(label, act) {
  const button = make("button", { type: "button", class: `quiet ${label.toLowerCase()}` }, label);
  button.addEventListener("click", () => act(button));
  return button;
}

// The last answer, when nothing was asked after it.
export const lastAnswer = () => $("turns").querySelector(".answer:last-child");

export const clearTurns = () => $("turns").replaceChildren();

export const showEmpty = () => ($("empty").hidden = false);
