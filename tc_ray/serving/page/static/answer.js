// One column: an answer as it streams, its tokens coloured by the size of the correction, and its numbers.
// Invariant: the text of `.answer` is the text of the chunks, character for character; marks are classes, not text.

const LEVELS = 10;

// the square root keeps small corrections apart, which are the most frequent ones
function level(moved) {
  return Math.min(Math.floor(Math.sqrt(moved) * LEVELS), LEVELS - 1);
}

export class Answer {
  constructor(section, tip) {
    this.title = section.querySelector("h2");
    this.box = section.querySelector(".answer");
    this.facts = section.querySelector(".facts");
    this.trouble = section.querySelector(".trouble");
    this.tip = tip;
    this.clear(this.title.textContent);
    this.box.addEventListener("pointerover", (event) => this.show(event.target));
    this.box.addEventListener("pointerout", () => this.tip.hide());
    this.box.addEventListener("focusin", (event) => this.show(event.target));
    this.box.addEventListener("focusout", () => this.tip.hide());
    this.box.addEventListener("click", (event) => event.target.classList.contains("unit") && this.focus(event.target));
    this.box.addEventListener("keydown", (event) => this.step(event));
  }

  start(title) {
    this.clear(title);
    this.box.setAttribute("aria-busy", "true");
  }

  clear(title) {
    this.title.textContent = title;
    this.box.replaceChildren();
    this.facts.textContent = "";
    this.trouble.hidden = true;
    this.units = []; // {text, tokens, element}: most often one token each
    this.waiting = []; // tokens whose text has not come yet
    this.tokens = [];
    this.usage = null;
    this.reason = null;
    this.began = performance.now();
    this.first = this.last = null;
  }

  add(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    const tokens = choice.copilot?.tokens ?? [];
    const text = choice.text ?? choice.delta?.content ?? "";
    if (tokens.length || text) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    this.tokens.push(...tokens);
    this.waiting.push(...tokens);
    this.say(text);
    if (choice.finish_reason) this.reason = choice.finish_reason;
    this.figures();
  }

  // give the text to the tokens it belongs to; a character made of several tokens is one unit
  say(text) {
    let rest = text;
    while (rest && this.waiting.length && this.waiting[0].token && rest.startsWith(this.waiting[0].token)) {
      const token = this.waiting.shift();
      rest = rest.slice(token.token.length);
      this.put(token.token, [token]);
    }
    if (rest) this.put(rest, this.waiting.splice(0));
  }

  put(text, tokens) {
    const element = document.createElement("span");
    element.className = "unit";
    element.textContent = text;
    if (text.includes("\n")) element.classList.add("newline");
    this.mark(element, tokens);
    this.box.append(element);
    this.units.push({ text, tokens, element });
  }

  mark(element, tokens) {
    element.tabIndex = this.box.childElementCount ? -1 : 0;
    if (!tokens.length) return;
    const moved = Math.max(...tokens.map((token) => token.moved));
    element.classList.add(`m${level(moved)}`);
    element.classList.toggle("other", tokens.some((token) => token.pilot_token !== token.token));
  }

  // `outcome`: the note under an answer that did not end by itself
  end(outcome = "") {
    if (this.waiting.length && this.reason === "stop") {
      const element = document.createElement("span"); // the end token: it has no text, but a correction
      element.className = "unit end";
      const tokens = this.waiting.splice(0);
      this.mark(element, tokens);
      this.box.append(element);
      this.units.push({ text: "", tokens, element });
    }
    this.box.removeAttribute("aria-busy");
    this.figures(outcome || { stop: "came to its end", length: "reached the token limit" }[this.reason] || "");
  }

  fail(message) {
    this.trouble.textContent = message;
    this.trouble.hidden = false;
    this.end("broke off");
  }

  figures(outcome = "") {
    const count = this.usage?.completion_tokens ?? this.tokens.length;
    const parts = [`${count} token${count === 1 ? "" : "s"}`];
    if (this.first !== null) parts.push(`first after ${((this.first - this.began) / 1000).toFixed(2)} s`);
    const steps = this.tokens.length - 1;
    if (steps > 0 && this.last > this.first) parts.push(`${(steps / ((this.last - this.first) / 1000)).toFixed(1)} tokens/s`);
    const moved = this.tokens.map((token) => token.moved);
    if (moved.some((value) => value > 0)) {
      const others = this.tokens.filter((token) => token.pilot_token !== token.token).length;
      parts.push(`moved ${(moved.reduce((sum, value) => sum + value, 0) / moved.length).toFixed(3)} a token`);
      parts.push(`${others} not the Pilot's likeliest`);
    }
    if (outcome) parts.push(outcome);
    this.facts.textContent = parts.join(" · ");
  }

  show(element) {
    const unit = this.units.find((one) => one.element === element);
    if (unit?.tokens.length) this.tip.show(element, unit.tokens);
  }

  focus(element) {
    for (const unit of this.units) unit.element.tabIndex = -1;
    element.tabIndex = 0;
    element.focus();
  }

  step(event) {
    const here = this.units.findIndex((unit) => unit.element === event.target);
    const last = this.units.length - 1;
    const next = { ArrowRight: Math.min(here + 1, last), ArrowLeft: Math.max(here - 1, 0), Home: 0, End: last }[event.key];
    if (here < 0 || next === undefined) return;
    event.preventDefault();
    this.focus(this.units[next].element);
  }
}

// frame the first unit of each answer that differs from the other's
export class Parting {
  constructor(one, other) {
    this.answers = [one, other];
    this.start();
  }

  start() {
    this.place = 0;
    this.found = false;
  }

  look(over) {
    const [one, other] = this.answers.map((answer) => answer.units);
    while (!this.found && this.place < Math.min(one.length, other.length)) {
      if (one[this.place].text === other[this.place].text) this.place += 1;
      else this.found = true;
    }
    if (over && one.length !== other.length) this.found = true;
    if (!this.found) return;
    for (const units of [one, other]) units[this.place]?.element.classList.add("parted");
  }

  words() {
    return this.found ? `The answers part after ${this.place} token${this.place === 1 ? "" : "s"}.` : "Both answers are the same.";
  }
}
