// The playground: a conversation over /v1/chat/completions, with the session's cookie and CSRF token.
const $ = (id) => document.getElementById(id);
const csrf = document.querySelector("[name=csrfmiddlewaretoken]").value;
const messages = [];
let running = null;

function settings() {
  const body = {
    model: $("model").value,
    messages: [...($("system").value ? [{ role: "system", content: $("system").value }] : []), ...messages],
    temperature: Number($("temperature").value),
    top_p: Number($("top_p").value),
    max_tokens: Number($("max_tokens").value),
  };
  if ($("seed").value) body.seed = Number($("seed").value);
  return body;
}

async function loadModels() {
  const response = await fetch("/v1/models");
  if (!response.ok) return showProblem((await response.json()).error);
  const { data } = await response.json();
  const chats = data.filter((model) => ["text", "vision"].includes(model.modality));
  chats.sort((a, b) => (b.state === "ready") - (a.state === "ready"));
  $("model").replaceChildren(...chats.map((model) => {
    const ready = model.state === "ready";
    const option = new Option(ready ? model.name : `${model.name} (${model.state.replace("_", " ")})`, model.id);
    option.disabled = !ready;
    return option;
  }));
}

function bubble(role, text) {
  $("empty")?.remove();
  const element = document.createElement("div");
  element.className = `message ${role}`;
  const body = document.createElement("div");
  body.textContent = text;
  element.append(body, document.createElement("small"));
  $("log").append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

function showProblem(error) {
  $("problem").hidden = !error;
  $("problem").textContent = error ? `${error.message}${error.code ? ` (${error.code})` : ""}` : "";
}

async function* frames(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
  }
}

async function send(text) {
  showProblem(null);
  messages.push({ role: "user", content: text });
  bubble("user", text);
  const answer = bubble("assistant", "");
  answer.classList.add("streaming");
  running = new AbortController();
  setRunning(true);
  const started = performance.now();
  let first = null, content = "", usage = null, finish = "stopped";
  const show = () => {
    const seconds = (performance.now() - (first ?? started)) / 1000;
    const tokens = usage?.completion_tokens;
    const rate = tokens > 1 ? ` · ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    const ttft = first === null ? "" : ` · first token after ${Math.round(first - started)} ms`;
    return `${tokens ?? "…"} tokens${rate}${ttft}`;
  };
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-CSRFToken": csrf },
      body: JSON.stringify({ ...settings(), stream: true, stream_options: { include_usage: true } }),
      signal: running.signal,
    });
    if (!response.ok) throw (await response.json()).error;
    let pieces = 0;
    for await (const chunk of frames(response)) {
      if (chunk.error) throw chunk.error;
      if (chunk.usage) usage = chunk.usage;
      const choice = chunk.choices[0];
      if (choice?.finish_reason) finish = choice.finish_reason;
      if (!choice?.delta.content) continue;
      first ??= performance.now();
      pieces += 1;
      content += choice.delta.content;
      answer.firstChild.textContent = content;
      const seconds = (performance.now() - first) / 1000;
      $("stats").textContent = `${pieces} tokens · ${(pieces / Math.max(seconds, 0.001)).toFixed(1)} tokens/s · first token after ${Math.round(first - started)} ms`;
    }
  } catch (error) {
    if (error.name !== "AbortError") showProblem(error.message ? error : { message: "The connection was lost." });
  }
  const last = usage ? show() : $("stats").textContent;
  $("stats").textContent = last;
  answer.classList.remove("streaming");
  answer.lastChild.textContent = [last, finish].filter(Boolean).join(" · ");
  if (content) messages.push({ role: "assistant", content });
  else { messages.pop(); answer.remove(); }
  setRunning(false);
}

function setRunning(on) {
  if (!on) running = null;
  $("send").hidden = on;
  $("stop").hidden = !on;
  if (!on) $("prompt").focus();
}

function snippet(language) {
  const body = settings();
  if (!body.messages.some((m) => m.role === "user")) body.messages = [...body.messages, { role: "user", content: $("prompt").value || "Hello!" }];
  const base = `${location.origin}/v1`;
  if (language === "curl") {
    const data = JSON.stringify({ ...body, stream: true }, null, 2).replaceAll("'", "'\\''");
    return `curl -N ${base}/chat/completions \\\n  -H "Authorization: Bearer $API_KEY" \\\n  -H "Content-Type: application/json" \\\n  -d '${data}'`;
  }
  const fields = Object.entries(body).map(([name, value]) => `    ${name}=${JSON.stringify(value, null, 4).replaceAll("\n", "\n    ")},`);
  return `import os\n\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${base}", api_key=os.environ["API_KEY"])\nstream = client.chat.completions.create(\n${fields.join("\n")}\n    stream=True,\n)\nfor chunk in stream:\n    print(chunk.choices[0].delta.content or "", end="", flush=True)`;
}

function showCode(language) {
  for (const button of document.querySelectorAll("[data-language]")) button.setAttribute("aria-pressed", button.dataset.language === language);
  $("snippet").textContent = snippet(language);
  if (!$("code-dialog").open) $("code-dialog").showModal();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  send(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("composer").requestSubmit(); }
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => { messages.length = 0; $("log").replaceChildren(); $("stats").textContent = ""; showProblem(null); $("prompt").focus(); });
$("code").addEventListener("click", () => showCode("python"));
$("close").addEventListener("click", () => $("code-dialog").close());
$("copy").addEventListener("click", async () => { await navigator.clipboard.writeText($("snippet").textContent); $("copy").textContent = "Copied"; setTimeout(() => ($("copy").textContent = "Copy"), 1500); });
for (const button of document.querySelectorAll("[data-language]")) button.addEventListener("click", () => showCode(button.dataset.language));
for (const name of ["temperature", "top_p"]) {
  const show = () => ($(`${name}-out`).textContent = $(name).value);
  $(name).addEventListener("input", show);
  show();
}
loadModels();
