// The page's own logic: reads the form, starts both streams, shows what arrives. Nothing is stored but the key, for this tab.

import { Answer, Parting } from "./answer.js";
import { chunks, models, ServerError } from "./stream.js";
import { Tip } from "./tip.js";

const KEY = "tc-ray-key";
const find = (id) => document.getElementById(id);
const tip = new Tip(find("tip"));
const pilot = new Answer(find("pilot"), tip);
const fused = new Answer(find("fused"), tip);
const parting = new Parting(pilot, fused);
const exported = new Map(); // name of a model -> its exported lambda
let running = null; // AbortController of the two streams

function complain(message, place = "trouble") {
  find(place).textContent = message;
  find(place).hidden = !message;
}

function showLambda() {
  find("lambda-value").textContent = Number(find("lambda").value).toFixed(2);
}

function chooseModel() {
  const lam = exported.get(find("model").value) ?? 0;
  find("lambda").value = lam || 0.5;
  find("exported").textContent = lam
    ? `Exported with lambda ${lam}.`
    : "Exported with lambda 0: on validation data no correction helped. The slider stands at 0.5 to show one.";
  showLambda();
}

async function loadModels() {
  try {
    const list = await models(find("key").value);
    exported.clear();
    for (const card of list) exported.set(card.id, card.copilot.lambda);
    find("model").replaceChildren(...list.map((card) => new Option(card.id, card.id)));
    chooseModel();
    complain("");
    complain("", "key-trouble");
  } catch (error) {
    complain(error.message, error.status === 401 ? "key-trouble" : "trouble"); // beside the field at fault
    if (error.status === 401) find("key").focus();
  }
}

function request(lam, seed) {
  const chat = find("kind").value === "chat";
  const prompt = find("prompt").value;
  return {
    path: chat ? "v1/chat/completions" : "v1/completions",
    body: {
      model: find("model").value,
      ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
      max_tokens: Number(find("max-tokens").value),
      temperature: Number(find("temperature").value),
      seed,
      stream: true,
      stream_options: { include_usage: true },
      copilot: { lambda: lam, explain: true },
    },
  };
}

async function follow(answer, { path, body }, signal) {
  try {
    for await (const chunk of chunks(path, body, find("key").value, signal)) {
      answer.add(chunk);
      parting.look(false);
    }
    answer.end();
    return true;
  } catch (error) {
    if (error.name === "AbortError") answer.end("stopped");
    else answer.fail(error instanceof ServerError ? error.message : `The page failed: ${error.message}`);
    return false;
  }
}

async function answer(event) {
  event.preventDefault();
  if (running) return;
  complain("");
  const given = find("seed").value;
  const seed = given === "" ? crypto.getRandomValues(new Uint32Array(1))[0] >>> 1 : Number(given);
  const lam = Number(find("lambda").value);
  const greedy = Number(find("temperature").value) === 0;
  running = new AbortController();
  find("go").disabled = true;
  find("stop").disabled = false;
  find("status").textContent = "Answering…";
  pilot.start("Pilot");
  fused.start(`Fused, lambda ${lam.toFixed(2)}`);
  parting.start();
  const both = await Promise.all([
    follow(pilot, request(0, seed), running.signal),
    follow(fused, request(lam, seed), running.signal),
  ]);
  const whole = both.every(Boolean);
  if (whole) parting.look(true);
  const words = running.signal.aborted ? "Stopped." : whole ? parting.words() : "Not complete.";
  find("status").textContent = greedy ? words : `${words} Seed ${seed}.`;
  running = null;
  find("go").disabled = false;
  find("stop").disabled = true;
}

function stop() {
  running?.abort();
}

find("key").value = sessionStorage.getItem(KEY) ?? "";
find("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, find("key").value);
  loadModels();
});
find("lambda").addEventListener("input", showLambda);
find("model").addEventListener("change", chooseModel);
find("ask").addEventListener("submit", answer);
find("stop").addEventListener("click", stop);
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    find("prompt").value = example.textContent;
    find("prompt").focus();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("ask").requestSubmit();
  if (event.key === "Escape") {
    if (find("tip").hidden) stop();
    else tip.hide();
  }
});
loadModels();
