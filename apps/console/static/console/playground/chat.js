// Chat: a conversation over /v1/chat/completions, with pictures where the model sees and thinking where it thinks.
import { ask, cost, frames } from "./api.js";
import { Attachments } from "./attachments.js";
import { duration } from "./dom.js";
import { Panel } from "./panel.js";
import { addAnswer, addQuestion } from "./turns.js";

const PYTHON = ["for chunk in stream:", `    print(chunk.choices[0].delta.content or "", end="", flush=True)`];
const JAVASCRIPT = [`for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta.content ?? "");`];

export class Chat extends Panel {
  #messages = [];

  constructor() {
    super("chat");
    const { prompt, pictures } = this.form.elements;
    this.attachments = new Attachments(this.form, this.part("tray"), pictures);
    this.part("attach").addEventListener("click", () => pictures.click());
    this.part("clear").addEventListener("click", () => this.#clear());
    prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (prompt.value.trim()) this.form.requestSubmit();
    });
    for (const name of ["temperature", "top_p"]) {
      const input = this.form.elements[name];
      input.addEventListener("input", () => (input.nextElementSibling.textContent = input.value));
      input.dispatchEvent(new Event("input"));
    }
  }

  modelChanged() {
    super.modelChanged();
    this.attachments.enabled = this.model?.modality === "vision";
    this.part("attach").hidden = this.part("tray").hidden = !this.attachments.enabled;
    this.part("thinking").hidden = !this.model?.thinking;
  }

  call() {
    const next = this.form.elements.prompt.value.trim() || (this.#messages.length ? "" : "Hello!");
    const waiting = next ? [this.#question(next)] : [];
    const body = this.#body([...this.#messages, ...waiting]);
    const then = { python: PYTHON, javascript: JAVASCRIPT };
    return { path: "/chat/completions", method: "chat.completions.create", result: "stream", body, then };
  }

  #question(text) {
    const pictures = this.attachments.urls.map((url) => ({ type: "image_url", image_url: { url } }));
    return { role: "user", content: pictures.length ? [...pictures, { type: "text", text }] : text };
  }

  #body(messages) {
    const system = this.form.elements.system.value;
    const effort = this.model?.thinking && { reasoning_effort: this.form.elements.thinks.checked ? "medium" : "none" };
    return {
      model: this.form.elements.model.value,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
      ...this.fields("temperature", "top_p", "max_tokens", "seed"),
      ...effort,
      stream: true,
    };
  }

  async run(signal) {
    const { prompt } = this.form.elements;
    const text = prompt.value.trim();
    const pictures = this.attachments.urls;
    this.#messages.push(this.#question(text));
    this.part("empty").hidden = true;
    const question = addQuestion(this.part("log"), text, pictures);
    prompt.value = "";
    this.attachments.urls = [];
    const answer = addAnswer(this.part("log"), this.badge(this.form.elements.model.value));
    const figures = new Figures();
    let said = "";
    try {
      const body = { ...this.#body(this.#messages), stream_options: { include_usage: true } };
      for await (const chunk of frames(await ask("/chat/completions", { method: "POST", body, signal }))) {
        figures.take(chunk);
        const { content, reasoning_content: thought } = chunk.choices[0]?.delta ?? {};
        if (thought) answer.think(thought);
        if (content) answer.say(content);
        said += content ?? "";
        this.stats(...figures.line());
      }
    } finally {
      answer.finish([...figures.line(), figures.finish].join(" · "));
      if (said) this.#messages.push({ role: "assistant", content: said });
      else this.#messages.pop(); // a question that got nothing is no part of the conversation
      if (!figures.first) this.#takeBack([question, answer.turn], text, pictures);
      prompt.focus();
    }
    const line = [...figures.line(), await cost(figures.id)].filter(Boolean);
    this.stats(...line);
    answer.finish([...line, figures.finish].join(" · "));
  }

  // What was refused can be changed and sent again.
  #takeBack(turns, text, pictures) {
    for (const turn of turns) turn.remove();
    this.form.elements.prompt.value ||= text;
    this.attachments.urls = pictures;
  }

  #clear() {
    this.#messages = [];
    this.part("log").replaceChildren();
    this.part("empty").hidden = false;
    this.attachments.urls = [];
    this.stats();
    this.problem(null);
    this.form.elements.prompt.focus();
  }
}

// How fast an answer came.
class Figures {
  #started = performance.now();
  #pieces = 0;
  #usage = null;
  first = 0;
  finish = "stopped";
  id = "";

  take(chunk) {
    this.id = chunk.id;
    this.#usage = chunk.usage ?? this.#usage;
    const choice = chunk.choices[0];
    this.finish = choice?.finish_reason ?? this.finish;
    if (!choice?.delta.content && !choice?.delta.reasoning_content) return;
    this.first ||= performance.now();
    this.#pieces += 1;
    this.last = performance.now();
  }

  line() {
    if (!this.first) return [];
    const tokens = this.#usage?.completion_tokens ?? this.#pieces;
    const seconds = (this.last - this.first) / 1000;
    const rate = seconds > 0.05 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s` : ""; // what came at once has none
    const prompt = this.#usage ? `${this.#usage.prompt_tokens} in, ` : "";
    return [`${prompt}${tokens} tokens`, rate, `first token after ${duration(this.first - this.#started)}`];
  }
}
