// Video: durable jobs of /v1/videos, which go on whether or not this page is open.
import { ask } from "./api.js";
import { Job } from "./job.js";
import { Panel } from "./panel.js";

const SHOWN = 12;
const SIZES = { real: ["720x480"], tiny: ["128x128", "64x64", "256x160", "720x480"] };

export class Video extends Panel {
  #listed = null;

  constructor() {
    super("video");
  }

  modelChanged() {
    super.modelChanged();
    const sizes = SIZES[this.model?.tiny ? "tiny" : "real"];
    const { size } = this.form.elements;
    if (size.options.length !== sizes.length) size.replaceChildren(...sizes.map((name) => new Option(name.replace("x", " × "), name)));
  }

  call() {
    const body = this.fields("model", "prompt", "size", "frames", "steps", "seed");
    return { path: "/videos", method: "videos.create", result: "video", ours: ["frames", "steps", "seed"], body, prelude: PRELUDE, then: THEN };
  }

  // The organization's earlier videos are there once the tab is first looked at.
  opened() {
    this.#listed ??= this.#list().catch((error) => this.problem(error));
  }

  async #list() {
    const { data } = await (await ask(`/videos?limit=${SHOWN}`)).json();
    for (const video of data.reverse()) this.#add(video);
  }

  async run(signal) {
    await this.#listed;
    const call = this.seeded(this.call());
    const video = await (await ask(call.path, { method: "POST", body: call.body, signal })).json();
    this.#add(video, call);
  }

  #add(video, call) {
    const job = new Job(video, { madeBy: this.badge(video.model), call, failed: (error) => this.problem(error) });
    this.part("results").prepend(job.element);
    this.part("none").hidden = true;
    job.follow();
  }
}

const PRELUDE = { python: ["import time"], javascript: [`import { writeFile } from "node:fs/promises";`] };
const THEN = {
  curl: (base) => [
    "# When it is completed, which the first of these tells, the second fetches it:",
    `# curl ${base}/videos/ID -H "Authorization: Bearer $API_KEY"`,
    `# curl ${base}/videos/ID/content -H "Authorization: Bearer $API_KEY" -o video.mp4`,
  ],
  python: [
    `while video.status in ("queued", "in_progress"):`, "    time.sleep(1)", "    video = client.videos.retrieve(video.id)",
    "if video.error:", "    raise SystemExit(video.error.message)",
    `client.videos.download_content(video.id).write_to_file("video.mp4")`,
  ],
  javascript: [
    "let now = video;", `while (["queued", "in_progress"].includes(now.status)) {`, "  await new Promise((done) => setTimeout(done, 1000));",
    "  now = await client.videos.retrieve(video.id);", "}", "if (now.error) throw new Error(now.error.message);",
    "const file = await client.videos.downloadContent(video.id);",
    `await writeFile("video.mp4", Buffer.from(await file.arrayBuffer()));`,
  ],
};
