// Transcribe: a recording over /v1/audio/transcriptions, written while it is heard.
import { ask, cost, frames, requestId } from "./api.js";
import { showCode } from "./code.js";
import { button, duration, make } from "./dom.js";
import { Panel } from "./panel.js";

export class Transcribe extends Panel {
  constructor() {
    super("transcribe");
    this.form.elements.file.addEventListener("change", () => this.#preview());
  }

  #preview() {
    const [file] = this.form.elements.file.files;
    this.part("heard").replaceChildren(...(file ? [make("audio", { controls: "", src: URL.createObjectURL(file) })] : []));
  }

  call() {
    const upload = this.form.elements.file.files[0]?.name ?? "recording.wav";
    const body = { ...this.fields("model", "prompt"), stream: true };
    return {
      path: "/audio/transcriptions", method: "audio.transcriptions.create", result: "stream", body, upload,
      prelude: { javascript: [`import { createReadStream } from "node:fs";`] },
      then: {
        python: ["for event in stream:", `    if event.type == "transcript.text.delta":`, `        print(event.delta, end="", flush=True)`],
        javascript: [`for await (const event of stream) process.stdout.write(event.delta ?? "");`],
      },
    };
  }

  async run(signal) {
    const call = this.call();
    const form = new FormData();
    for (const [name, value] of Object.entries(call.body)) form.append(name, value);
    form.append("file", this.form.elements.file.files[0]);
    const text = make("p", { class: "transcript" });
    const line = make("p", { class: "hint" }, this.badge(call.body.model));
    const result = make("article", { class: "card result" }, text, line, make("div", { class: "row" },
      button("Copy", () => navigator.clipboard.writeText(text.textContent)), button("Code", () => showCode(call))));
    const started = performance.now();
    const response = await ask(call.path, { method: "POST", form, signal });
    this.part("results").prepend(result);
    let usage = null;
    for await (const event of frames(response)) {
      text.append(event.delta ?? "");
      usage = event.usage ?? usage;
    }
    const tokens = usage && `${usage.input_tokens} in, ${usage.output_tokens} tokens`;
    const figures = [duration(performance.now() - started), tokens, await cost(requestId(response))];
    this.stats(...figures);
    line.append(` · ${figures.filter(Boolean).join(" · ")}`);
  }
}
