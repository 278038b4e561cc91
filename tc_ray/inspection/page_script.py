"""The script of the pages: tells the figures under the pointer, or under a cursor that the arrow keys move.

Invariant: pages are complete without it. It writes text only as text nodes, never as HTML.
"""

SCRIPT = """
"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const tip = document.body.appendChild(document.createElement("div"));
  tip.id = "tip";
  tip.setAttribute("role", "status");
  const shown = (value, kind) => value === null ? "no data"
    : kind === "percent" ? (100 * value).toFixed(value > 0 && value < 0.1 ? 2 : 1) + "%"
    : kind === "count" ? value.toLocaleString("en") : value.toPrecision(4);
  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = charts[svg.dataset.chart];
    if (!chart) continue;
    const cursor = svg.querySelector(".cursor");
    const rows = chart.ys ? chart.ys.length : 1, columns = chart.xs.length;
    const wide = chart.width / columns, high = chart.height / rows;
    let at = [columns - 1, 0];
    const hide = () => { tip.style.visibility = cursor.style.visibility = "hidden"; };
    const tell = (column, row, x, y) => {
      at = [column, row];
      const index = row * columns + column;
      const lines = [chart.xs[column] + (chart.ys ? ", " + chart.ys[row] : "")];
      for (const layer of chart.layers) lines.push(layer.name + ": " + shown(layer.values[index], layer.kind));
      tip.textContent = lines.join("\\n");
      cursor.setAttribute("x", chart.left + column * wide);
      cursor.setAttribute("y", chart.top + row * high);
      cursor.setAttribute("width", wide);
      cursor.setAttribute("height", high);
      tip.style.visibility = cursor.style.visibility = "visible";
      const box = tip.getBoundingClientRect();
      tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 6)) + "px";
      tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18) + "px";
    };
    svg.addEventListener("pointermove", (event) => {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const column = Math.floor((point.x - chart.left) / wide), row = Math.floor((point.y - chart.top) / high);
      if (column < 0 || row < 0 || column >= columns || row >= rows) hide();
      else tell(column, row, event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const column = Math.max(0, Math.min(columns - 1, at[0] + step[0]));
      const row = Math.max(0, Math.min(rows - 1, at[1] + step[1]));
      const corner = new DOMPoint(chart.left + column * wide, chart.top + row * high).matrixTransform(svg.getScreenCTM());
      tell(column, row, corner.x, corner.y);
    });
  }
})();
"""
