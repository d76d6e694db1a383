// The tabs, each of which is a panel of its own. The address says which one is open.
import { Chat } from "./chat.js";
import { Embeddings } from "./embeddings.js";
import { Images } from "./images.js";
import { offerModels } from "./models.js";
import { Speech } from "./speech.js";
import { Transcribe } from "./transcribe.js";
import { Video } from "./video.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const panels = { chat: new Chat(), speech: new Speech(), images: new Images(), video: new Video(), transcribe: new Transcribe(), embeddings: new Embeddings() };

function open(name) {
  for (const tab of tabs) {
    const chosen = tab.dataset.opens === name;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    panels[tab.dataset.opens].form.hidden = !chosen;
  }
  panels[name].opened?.();
}

function fromAddress() {
  const name = location.hash.slice(1);
  open(name in panels ? name : "chat");
}

for (const [place, tab] of tabs.entries()) {
  tab.addEventListener("click", () => {
    history.replaceState(null, "", `#${tab.dataset.opens}`);
    open(tab.dataset.opens);
  });
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = tabs[(to + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });
}
// Settings are beside what they set, or, where there is no room for that, folded away.
const narrow = matchMedia("(max-width: 820px)");
const fold = () => document.querySelectorAll(".settings").forEach((settings) => (settings.open = !narrow.matches));
narrow.addEventListener("change", fold);
fold();
window.addEventListener("hashchange", fromAddress);
fromAddress();
offerModels(Object.values(panels)).catch((error) => Object.values(panels).forEach((panel) => panel.problem(error)));
