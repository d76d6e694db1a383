// Speech: /v1/audio/speech, heard from its first sound on.
import { ask, cost, requestId } from "./api.js";
import { showCode } from "./code.js";
import { button, download, duration, make } from "./dom.js";
import { Panel } from "./panel.js";
import { joined, Player, seconds, Unwrapped, wav } from "./player.js";

const ONCE_WHOLE = { mp3: "audio/mpeg", opus: "audio/ogg", aac: "audio/aac", flac: "audio/flac" };
const LANGUAGES = {
  a: "American English", b: "British English", e: "Spanish", f: "French", h: "Hindi", i: "Italian", j: "Japanese",
  p: "Portuguese", z: "Mandarin",
};

export class Speech extends Panel {
  #voicesOf = "";

  constructor() {
    super("speech");
    const { speed } = this.form.elements;
    speed.addEventListener("input", () => (speed.nextElementSibling.textContent = `${speed.value}×`));
    speed.dispatchEvent(new Event("input"));
  }

  modelChanged() {
    super.modelChanged();
    const known = this.model && `${this.model.id} ${this.model.state}`;
    if (known && known !== this.#voicesOf) this.#offerVoices(known).catch((error) => this.problem(error));
  }

  async #offerVoices(known) {
    this.#voicesOf = known;
    const { voices } = await (await ask("/audio/voices")).json();
    const groups = Map.groupBy(voices.filter((voice) => voice.model === this.model.id), (voice) => voice.language);
    const { voice: select } = this.form.elements;
    const chosen = select.value || "af_heart";
    select.replaceChildren(...[...groups].map(([letter, members]) => {
      const group = make("optgroup", { label: LANGUAGES[letter] ?? letter });
      group.append(...members.map((voice) => new Option(voice.name, voice.id, false, voice.id === chosen)));
      return group;
    }));
  }

  call() {
    const body = this.fields("model", "input", "voice", "speed", "response_format");
    const output = `speech.${body.response_format}`;
    return {
      path: "/audio/speech", method: "audio.speech.create", result: "sound", body, output,
      prelude: { javascript: [`import { writeFile } from "node:fs/promises";`] },
      then: {
        python: [`sound.write_to_file("${output}")`],
        javascript: [`await writeFile("${output}", Buffer.from(await sound.arrayBuffer()));`],
      },
    };
  }

  async run(signal) {
    const call = this.call();
    const format = call.body.response_format;
    const live = format in ONCE_WHOLE ? null : new Player();
    signal.addEventListener("abort", () => live?.stop());
    const started = performance.now();
    this.stats("waiting for the first sound…");
    const response = await ask(call.path, { method: "POST", body: call.body, signal });
    const { parts, first } = await this.#hear(response, live, format, started);
    const timing = [`first sound after ${duration(first)}`, `all of it after ${duration(performance.now() - started)}`];
    const figures = [...timing, `${call.body.input.length} characters`, await cost(requestId(response))];
    this.stats(...figures);
    this.#show(call, parts, figures, live);
  }

  // The bytes as they come, which are heard at once where they are samples.
  async #hear(response, live, format, started) {
    const unwrapped = format === "wav" ? new Unwrapped() : null;
    const reader = response.body.getReader();
    const parts = [];
    let first = 0;
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return { parts, first };
      const part = unwrapped ? unwrapped.push(value) : value;
      if (!first && part.length) this.stats(`first sound after ${duration((first = performance.now() - started))}`);
      live?.push(part);
      parts.push(part);
    }
  }

  #show(call, parts, figures, live) {
    const format = call.body.response_format;
    const bytes = joined(parts);
    const playable = live ? wav(bytes) : new Blob([bytes], { type: ONCE_WHOLE[format] });
    const audio = make("audio", { controls: "", src: URL.createObjectURL(playable) });
    audio.addEventListener("play", () => live?.stop());
    if (!live) audio.play().catch(() => {}); // a browser may want another click
    const kept = format === "pcm" ? new Blob([bytes]) : playable;
    const length = live ? `${seconds(bytes).toFixed(1)} s of sound` : "";
    this.part("results").prepend(make("article", { class: "card result" },
      make("p", { class: "asked" }, call.body.input), audio,
      make("p", { class: "hint" }, this.badge(call.body.model), ` · ${[call.body.voice, length, ...figures].filter(Boolean).join(" · ")}`),
      make("div", { class: "row" }, download(`Download ${call.output}`, kept, call.output), button("Code", () => showCode(call)))));
  }
}
