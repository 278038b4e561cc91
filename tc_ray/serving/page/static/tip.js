// The box with a token's numbers, beside the token and inside the window. All text is set as text, never as HTML.

function shown(text) {
  if (text === "") return "(no text)";
  return `“${text.replaceAll("\n", "⏎").replaceAll(" ", "␣")}”`;
}

function percent(probability) {
  return `${(100 * probability).toFixed(probability < 0.001 ? 4 : 2)}%`;
}

export class Tip {
  constructor(element) {
    this.element = element;
    this.owner = null;
    window.addEventListener("scroll", () => this.hide(), { passive: true });
  }

  show(owner, tokens) {
    this.hide();
    for (const token of tokens) {
      const list = document.createElement("dl");
      const rows = [
        ["token", shown(token.token)],
        ["Pilot's likeliest", token.pilot_token === token.token ? "the same" : shown(token.pilot_token)],
        ["p of the token, Pilot", percent(token.pilot)],
        ["p of the token, fused", percent(token.fused)],
        ["moved", token.moved.toFixed(4)],
      ];
      for (const [name, value] of rows) {
        const term = document.createElement("dt");
        term.textContent = name;
        const detail = document.createElement("dd");
        detail.textContent = value;
        list.append(term, detail);
      }
      this.element.append(list);
    }
    this.owner = owner;
    owner.setAttribute("aria-describedby", this.element.id);
    this.element.hidden = false;
    const place = owner.getClientRects()[0] ?? owner.getBoundingClientRect();
    const { width, height } = this.element.getBoundingClientRect();
    const below = place.bottom + 6;
    this.element.style.left = `${Math.max(4, Math.min(place.left, document.documentElement.clientWidth - width - 4))}px`;
    this.element.style.top = `${below + height < innerHeight ? below : Math.max(4, place.top - height - 6)}px`;
  }

  hide() {
    this.owner?.removeAttribute("aria-describedby");
    this.owner = null;
    this.element.hidden = true;
    this.element.replaceChildren();
  }
}
