// Pictures that wait to be sent with a message: chosen, pasted or dropped, shown small, held as data URLs.
import { button, make } from "./dom.js";

const TYPES = ["image/png", "image/jpeg", "image/webp"];

export class Attachments {
  #urls = [];

  constructor(form, tray, input) {
    this.tray = tray;
    input.addEventListener("change", () => {
      this.#take(input.files);
      input.value = "";
    });
    form.addEventListener("paste", (event) => this.#takeFrom(event, event.clipboardData));
    form.addEventListener("dragover", (event) => this.enabled && event.preventDefault());
    form.addEventListener("drop", (event) => this.#takeFrom(event, event.dataTransfer));
  }

  enabled = false;

  get urls() {
    return this.enabled ? [...this.#urls] : [];
  }

  set urls(urls) {
    this.#urls = urls;
    this.#draw();
  }

  #takeFrom(event, data) {
    if (!this.enabled || !data.files.length) return;
    event.preventDefault();
    this.#take(data.files);
  }

  async #take(files) {
    const pictures = [...files].filter((file) => TYPES.includes(file.type));
    this.#urls.push(...(await Promise.all(pictures.map(dataUrl))));
    this.#draw();
  }

  #draw() {
    this.tray.replaceChildren(...this.#urls.map((url, place) => {
      const remove = button("×", () => {
        this.#urls.splice(place, 1);
        this.#draw();
      });
      remove.setAttribute("aria-label", `Remove picture ${place + 1}`);
      return make("figure", { class: "thumb" }, make("img", { src: url, alt: `picture ${place + 1}` }), remove);
    }));
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
