// A call as code that works where it is pasted, given API_KEY. Pure.
//
// A call has the `path` under /v1 and its `body`; `method`, by which the SDKs know it, and `ours`, the fields that they do not;
// `output`, the file that a plain answer is saved in; `upload`, the file that a form takes; and, by language, `prelude` and
// `then`: the lines before and after. `result` names what the call returns.

export function curl(call, base) {
  const head = [`curl -N ${base}${call.path}`, `-H "Authorization: Bearer $API_KEY"`];
  if (call.output) head.push(`-o ${call.output}`);
  const then = call.then.curl ? `\n${call.then.curl(base).join("\n")}` : "";
  if (call.upload) {
    const fields = Object.entries(call.body).map(([name, value]) => `-F ${name}=${value}`);
    return [...head, ...fields, `-F file=@${quoted(call.upload)}`].join(" \\\n  ") + then;
  }
  head.push(`-H "Content-Type: application/json"`, `-d @- <<'JSON'`);
  return `${head.join(" \\\n  ")}\n${JSON.stringify(call.body, null, 2)}\nJSON${then}`;
}

const quoted = (name) => `'${name.replaceAll("'", "'\\''")}'`;

export function python(call, base) {
  const ours = Object.fromEntries(Object.entries(call.body).filter(([name]) => call.ours?.includes(name)));
  const fields = Object.entries(call.body).filter(([name]) => !(name in ours)).map(([name, value]) => `    ${name}=${literal(value, 1)},`);
  if (call.upload) fields.push(`    file=open(${JSON.stringify(call.upload)}, "rb"),`);
  if (Object.keys(ours).length) fields.push(`    extra_body=${literal(ours, 1)},`);
  return [
    ...(call.prelude?.python ?? []), "import os", "", "from openai import OpenAI", "",
    `client = OpenAI(base_url="${base}", api_key=os.environ["API_KEY"])`,
    `${call.result} = client.${call.method}(`, ...fields, ")", ...call.then.python,
  ].join("\n");
}

// JSON's strings and numbers are Python's.
function literal(value, depth) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = "    ".repeat(depth + 1);
  const items = Array.isArray(value)
    ? value.map((item) => `${inner}${literal(item, depth + 1)},`)
    : Object.entries(value).map(([name, item]) => `${inner}${JSON.stringify(name)}: ${literal(item, depth + 1)},`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return items.length ? `${open}\n${items.join("\n")}\n${"    ".repeat(depth)}${close}` : open + close;
}

export function javascript(call, base) {
  const body = JSON.stringify(call.body, null, 2);
  const given = call.upload ? `${body.slice(0, -2)},\n  "file": createReadStream(${JSON.stringify(call.upload)})\n}` : body;
  return [
    ...(call.prelude?.javascript ?? []), `import OpenAI from "openai";`, "",
    `const client = new OpenAI({ baseURL: "${base}", apiKey: process.env.API_KEY });`,
    `const ${call.result} = await client.${call.method}(${given});`, ...call.then.javascript,
  ].join("\n");
}
