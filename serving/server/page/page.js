"use strict";

// The playground: sends the conversation to this server and shows the answer as it streams in. A classifier is sent one
// text at a time, and its labels are shown with their scores.

const element = (id) => document.getElementById(id);
let model = null;
let turns = []; // {role, content}, what the server is sent
let running = null; // AbortController of the answer that is streaming

function headers() {
  const key = element("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function fail(response) {
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

async function connect() {
  try {
    const health = await (await fetch("/health")).json();
    element("state").textContent = `${health.provider}, ${health.slots} slots, ${health.status}`;
    const response = await fetch("/v1/models", { headers: headers() });
    if (response.status === 401) {
      element("settings").open = true;
      element("model").textContent = "an API key is needed";
      return;
    }
    if (!response.ok) await fail(response);
    model = (await response.json()).data[0];
    element("model").textContent = model.id;
    if (model.task === "classification") {
      document.body.classList.add("classifier");
      element("prompt").placeholder = `Give a text to label: ${model.labels.slice(0, 8).join(", ")}`;
      return;
    }
    element("max_tokens").max = model.context_length;
    if (!model.has_chat_template) {
      element("mode").value = "completion";
      element("mode").disabled = true;
      element("prompt").placeholder = "This model has no chat template: give a text for it to continue.";
    }
  } catch (error) {
    element("state").textContent = `not reachable (${error.message})`;
  }
}

function show(kind, text) {
  const turn = document.createElement("div");
  turn.className = `turn ${kind}`;
  turn.textContent = text; // never innerHTML: what a model says is not markup
  element("log").append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

function requestFor(prompt) {
  const body = { stream: true, stream_options: { include_usage: true }, max_tokens: Number(element("max_tokens").value) };
  for (const name of ["temperature", "top_p", "seed"]) {
    if (element(name).value !== "") body[name] = Number(element(name).value);
  }
  if (element("mode").value === "completion") return ["/v1/completions", { ...body, prompt }];
  return ["/v1/chat/completions", { ...body, messages: [...turns, { role: "user", content: prompt }] }];
}

// Yields the events of a server-sent stream; a network chunk may hold half an event, or several.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice("data: ".length));
    }
  }
}

async function post(path, body) {
  const response = await fetch(path, {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
  });
  if (!response.ok) await fail(response);
  return response;
}

async function classify(text, turn) {
  const started = performance.now();
  const found = (await (await post("/v1/classify", { input: text })).json()).data[0];
  for (const [label, score] of Object.entries(found.scores).sort((one, other) => other[1] - one[1])) {
    const row = document.createElement("div");
    row.className = "score";
    const [name, bar, number] = ["span", "meter", "output"].map((tag) => row.appendChild(document.createElement(tag)));
    name.textContent = label;
    bar.value = score;
    number.textContent = `${(100 * score).toFixed(1)} %`;
    turn.append(row);
  }
  const cut = found.truncated ? ", the text was cut" : "";
  element("speed").textContent = `${Math.round(performance.now() - started)} ms${cut}`;
}

async function answer(prompt, turn) {
  const [path, body] = requestFor(prompt);
  const started = performance.now();
  let firstAt = null;
  const response = await post(path, body);
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const piece = event.choices[0]?.delta?.content ?? event.choices[0]?.text ?? "";
    if (piece) {
      firstAt ??= performance.now();
      turn.textContent += piece;
    }
    if (event.usage) showSpeed(event.usage, started, firstAt);
  }
}

function showSpeed(usage, started, firstAt) {
  const count = usage.completion_tokens;
  const first = Math.round((firstAt ?? performance.now()) - started);
  const seconds = (performance.now() - (firstAt ?? started)) / 1000;
  const rate = count > 1 && seconds > 0 ? `, ${((count - 1) / seconds).toFixed(1)} tokens/s` : "";
  element("speed").textContent = `${count} tokens, first after ${first} ms${rate}`;
}

function setRunning(controller) {
  running = controller;
  element("send").disabled = controller !== null;
  element("stop").disabled = controller === null;
}

async function send(event) {
  event.preventDefault();
  const prompt = element("prompt").value;
  if (running !== null || prompt.trim() === "") return;
  if (model === null) await connect();
  element("prompt").value = "";
  show("user", prompt);
  const turn = show("assistant busy", "");
  setRunning(new AbortController());
  try {
    await (model?.task === "classification" ? classify : answer)(prompt, turn);
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  } finally {
    setRunning(null);
    turn.classList.remove("busy");
  }
  if (turn.textContent === "") turn.remove();
  else turns.push({ role: "user", content: prompt }, { role: "assistant", content: turn.textContent });
}

element("ask").addEventListener("submit", send);
element("stop").addEventListener("click", () => running?.abort());
element("clear").addEventListener("click", () => {
  running?.abort();
  turns = [];
  element("log").replaceChildren();
  element("speed").textContent = "";
});
element("key").addEventListener("change", connect);
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) element("ask").requestSubmit();
});
element("prompt").addEventListener("keypress", (event) => {
  if (event.key === "Enter" && !event.shiftKey) event.preventDefault();
});
connect();
