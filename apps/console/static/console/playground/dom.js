// Elements made by hand. Attributes are set as such, so nothing here is inline script or style.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function button(label, act, kind = "quiet") {
  const element = make("button", { type: "button", class: kind }, label);
  element.addEventListener("click", act);
  return element;
}

export function download(label, blob, name) {
  return make("a", { class: "button", href: URL.createObjectURL(blob), download: name }, label);
}

export const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
