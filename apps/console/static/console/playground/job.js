// One video's card: its progress while it is made, and the video then.
import { ask, cost } from "./api.js";
import { showCode } from "./code.js";
import { button, duration, make } from "./dom.js";

const POLL_MS = 1000; // where the server names none
const RUNNING = ["queued", "in_progress"];

export class Job {
  constructor(video, { madeBy, call, failed }) {
    this.id = video.id;
    this.failed = failed;
    this.state = make("span", { class: "state" });
    this.bar = make("progress", { max: "100", "aria-label": "Progress" });
    this.screen = make("div", { class: "screen" });
    this.line = make("p", { class: "hint" }, madeBy, ` · ${video.size} · ${video.frames} frames, ${Number(video.seconds)} s · ${video.steps} steps · seed ${video.seed}`);
    this.cancel = button("Cancel", () => this.#act(`/videos/${this.id}/cancel`, "POST"));
    this.remove = button("Delete", () => this.#delete(), "quiet danger");
    this.tools = make("div", { class: "row" }, this.cancel, this.remove);
    if (call) this.tools.append(button("Code", () => showCode(call)));
    this.element = make("article", { class: "card result job" },
      make("p", { class: "asked" }, video.prompt, " ", this.state), this.bar, this.screen, this.line, this.tools);
    this.#show(video);
  }

  // Until the video has ended or its card is gone.
  async follow() {
    try {
      let wait = POLL_MS;
      while (RUNNING.includes(this.video.status)) {
        await new Promise((done) => setTimeout(done, wait));
        if (!this.element.isConnected) return;
        const response = await ask(`/videos/${this.id}`);
        wait = Number(response.headers.get("openai-poll-after-ms")) || POLL_MS;
        this.#show(await response.json());
      }
      const spent = await cost(this.video.request_id);
      if (spent) this.line.append(` · ${spent}`);
    } catch (error) {
      if (this.element.isConnected) this.failed(error);
    }
  }

  #show(video) {
    const was = this.video?.status;
    this.video = video;
    const running = RUNNING.includes(video.status);
    const word = video.error?.code === "cancelled" ? "cancelled" : video.status.replace("_", " ");
    this.state.textContent = running ? `${word} · ${video.progress} %` : word;
    this.state.className = `state ${{ completed: "ready", failed: "failed" }[video.status] ?? "loading"}`;
    this.bar.hidden = this.cancel.hidden = !running;
    this.remove.hidden = running;
    this.bar.value = video.progress;
    if (video.status !== was && video.status === "completed") this.#play(video);
    if (video.status !== was && video.error && word !== "cancelled")
      this.screen.replaceChildren(make("p", { class: "error" }, `${video.error.message} (${video.error.code})`));
  }

  #play(video) {
    const url = `/v1/videos/${video.id}/content`;
    this.screen.replaceChildren(make("video", { controls: "", loop: "", playsinline: "", preload: "metadata", src: url }));
    this.line.append(` · made in ${duration(1000 * (video.completed_at - video.created_at))}`);
    this.tools.prepend(make("a", { class: "button", href: url, download: `${video.id}.mp4` }, "Download"));
  }

  async #delete() {
    if (await this.#act(`/videos/${this.id}`, "DELETE")) this.element.remove();
  }

  async #act(path, method) {
    try {
      const told = await (await ask(path, { method })).json();
      if (told.object === "video") this.#show(told);
      return true;
    } catch (error) {
      this.failed(error);
      return false;
    }
  }
}
