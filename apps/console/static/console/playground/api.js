// /v1, asked with the session's cookie and CSRF token. Refusals are thrown as the API words them.
const csrf = document.querySelector("[name=csrfmiddlewaretoken]").value;

// `body` is sent as JSON, `form` as it is.
export async function ask(path, { method = "GET", body, form, signal } = {}) {
  const headers = { "X-CSRFToken": csrf, ...(body && { "Content-Type": "application/json" }) };
  const response = await fetch(`/v1${path}`, { method, headers, body: form ?? (body && JSON.stringify(body)), signal });
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  try {
    return (await response.json()).error;
  } catch {
    return { message: `The server answered with ${response.status}.` };
  }
}

export function worded(error) {
  if (error instanceof TypeError) return "The connection was lost.";
  return error.code ? `${error.message} (${error.code})` : error.message;
}

// The bodies of server-sent events. An error among them is thrown.
export async function* frames(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const body of parts.map(parsed)) {
      if (body?.error && !body.type) throw body.error;
      if (body) yield body;
    }
  }
}

function parsed(part) {
  const line = part.split("\n").find((each) => each.startsWith("data: {"));
  return line && JSON.parse(line.slice(6));
}

export const requestId = (response) => response.headers.get("x-inference-id");

// What the scheduler expected a request to cost, in the unit of all its decisions; empty once that is forgotten.
export async function cost(id) {
  if (!id) return "";
  try {
    const told = await (await ask(`/requests/${id}`)).json();
    return `cost ${Math.round(told.predicted_cost_ms).toLocaleString()} GPU-ms predicted`;
  } catch {
    return "";
  }
}
