// The dialog that shows a call as code.
import { curl, javascript, python } from "./snippets.js";

const LANGUAGES = { curl, python, javascript };
const LONG_DATA = /(data:[\w/+.-]+;base64,[A-Za-z0-9+/]{24})[A-Za-z0-9+/=]+/g;
const dialog = document.getElementById("code-dialog");
const buttons = dialog.querySelectorAll("[data-language]");
const copy = document.getElementById("copy");
let shown = null;
let whole = "";

export function showCode(call) {
  shown = call;
  show("curl");
  dialog.showModal();
}

function show(language) {
  for (const each of buttons) each.setAttribute("aria-pressed", each.dataset.language === language);
  whole = LANGUAGES[language](shown, `${location.origin}/v1`);
  document.getElementById("snippet").textContent = whole.replace(LONG_DATA, "$1…"); // copied, it is whole
}

for (const each of buttons) each.addEventListener("click", () => show(each.dataset.language));
document.getElementById("close").addEventListener("click", () => dialog.close());
copy.addEventListener("click", async () => {
  await navigator.clipboard.writeText(whole);
  copy.textContent = "Copied";
  setTimeout(() => (copy.textContent = "Copy"), 1500);
});
