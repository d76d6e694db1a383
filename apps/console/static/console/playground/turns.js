// The conversation on the page: questions with their pictures, and answers that grow, their thinking folded away.
import { duration, make } from "./dom.js";

export function addQuestion(log, text, pictures) {
  const shown = pictures.map((url) => make("img", { src: url, alt: "attached picture" }));
  const turn = make("div", { class: "message user" }, make("div", {}, ...shown, text));
  add(log, turn);
  return turn;
}

// An answer being written.
export function addAnswer(log, madeBy) {
  const body = make("div", { class: "said" });
  const foot = make("small", {});
  const turn = make("div", { class: "message assistant streaming" }, body, foot);
  add(log, turn);
  let thought = null;
  return {
    turn,
    think(piece) {
      thought ??= addThought(turn);
      thought.add(piece);
    },
    say(piece) {
      thought?.end();
      body.append(piece);
    },
    finish(line) {
      thought?.end();
      turn.classList.remove("streaming");
      body.hidden = !body.textContent;
      foot.replaceChildren(madeBy, ` · ${line}`);
    },
  };
}

function addThought(turn) {
  const summary = make("summary", {}, "Thinking…");
  const text = make("p", {});
  const started = performance.now();
  let ended = false;
  turn.prepend(make("details", { class: "thought" }, summary, text));
  return {
    add: (piece) => text.append(piece),
    end() {
      if (!ended) summary.textContent = `Thought for ${duration(performance.now() - started)}`;
      ended = true;
    },
  };
}

function add(log, turn) {
  log.append(turn);
  turn.scrollIntoView({ block: "end" });
}
