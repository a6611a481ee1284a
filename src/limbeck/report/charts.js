"use strict";
// Draws the learning curves, and serves the page's three buttons. Text goes in as textContent only.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const PAD = { top: 10, right: 8, bottom: 30, left: 52 };

  function make(parent, name, attributes = {}, text = "") {
    const node = parent.appendChild(document.createElementNS(SVG, name));
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== "") node.textContent = text;
    return node;
  }

  const FORMS = {
    percent: (value) => (100 * value).toFixed(1) + " %",
    number: (value) => {
      if (value === 0) return "0";
      const size = Math.abs(value);
      return size < 0.001 || size >= 1e5 ? value.toExponential(1).replace("-", "−") : String(+value.toPrecision(3));
    },
  };
  const shortPercent = (value) => +(100 * value).toFixed(1) + " %";

  // Round numbers from low to high, about as many as wanted.
  function ticks(low, high, wanted) {
    const raw = (high - low) / Math.max(1, wanted);
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step);
    return found;
  }

  function powers(low, high) {
    const found = [];
    for (let n = Math.ceil(Math.log10(low) - 1e-9); n <= Math.log10(high) + 1e-9; n++) found.push(10 ** n);
    return found;
  }

  class Chart {
    constructor(figure, spec, series, shown) {
      Object.assign(this, { figure, spec, series, shown, at: null });
      this.plot = figure.querySelector(".plot");
      this.readout = figure.querySelector(".readout");
      this.format = FORMS[spec.form] || FORMS.number;
      new ResizeObserver(() => this.draw()).observe(this.plot);
    }

    lines() {
      return this.spec.lines.filter((line) => this.shown[line.series]);
    }

    scales() {
      const all = this.lines().flatMap((line) => line.seeds);
      const xs = all.flatMap(([steps]) => steps);
      const ys = all.flatMap(([, values]) => values).filter((value) => value !== null);
      let [low, high] = [ys.reduce((a, b) => Math.min(a, b), Infinity), ys.reduce((a, b) => Math.max(a, b), -Infinity)];
      if (!ys.length) [low, high] = [0, 1];
      this.log = low > 0 && high / low > 60 && this.spec.form === "number" && this.spec.name !== "rate";
      if (!this.log && low > 0 && low < 0.45 * high) low = 0;
      if (high === low) high = low + (Math.abs(low) || 1);
      const bend = this.log ? Math.log10 : (value) => value;
      const wide = this.width - PAD.left - PAD.right, tall = this.height - PAD.top - PAD.bottom;
      const last = xs.reduce((a, b) => Math.max(a, b), 1);
      this.x = (step) => PAD.left + (wide * step) / last;
      this.y = (value) => PAD.top + tall * (1 - (bend(value) - bend(low)) / (bend(high) - bend(low)));
      Object.assign(this, { low, high, last });
    }

    draw() {
      this.width = Math.max(240, Math.round(this.plot.clientWidth));
      this.height = Math.round(Math.min(300, Math.max(190, this.width * 0.46)));
      this.scales();
      const size = { viewBox: `0 0 ${this.width} ${this.height}`, tabindex: 0, role: "img" };
      const svg = make(document.createDocumentFragment(), "svg", size);
      svg.setAttribute("aria-label", `${this.spec.title} by step; arrow keys read values`);
      this.axes(svg);
      for (const line of this.lines()) this.line(svg, line);
      this.cursor = make(svg, "g");
      this.listen(svg);
      const focused = this.plot.contains(document.activeElement);
      this.plot.replaceChildren(svg);
      if (focused) svg.focus();
      this.point(this.at);
    }

    axes(svg) {
      const round = this.spec.form === "percent" ? shortPercent : this.format;
      const marks = this.log ? powers(this.low, this.high) : ticks(this.low, this.high, this.height / 55);
      for (const mark of marks) {
        const y = this.y(mark);
        make(svg, "line", { class: "grid", x1: PAD.left, x2: this.width - PAD.right, y1: y, y2: y });
        make(svg, "text", { x: PAD.left - 8, y: y + 4, "text-anchor": "end" }, round(mark));
      }
      for (const mark of ticks(0, this.last, this.width / 110)) {
        const anchor = this.x(mark) > this.width - 30 ? "end" : mark === 0 ? "start" : "middle";
        const label = mark === 0 ? "step 0" : String(+mark.toPrecision(6));
        make(svg, "text", { x: this.x(mark), y: this.height - 8, "text-anchor": anchor }, label);
      }
    }

    line(svg, line) {
      const colour = "c" + this.series[line.series].colour;
      const path = ([steps, values], kind) => {
        let pen = "M", d = "";
        steps.forEach((step, n) => {
          if (values[n] === null || (this.log && values[n] <= 0)) return void (pen = "M");
          // h0: a point without neighbours is still a dot, thanks to the round ends of lines
          d += `${pen}${this.x(step).toFixed(1)} ${this.y(values[n]).toFixed(1)}${pen === "M" ? "h0" : ""}`;
          pen = "L";
        });
        make(svg, "path", { class: `${colour} ${kind}`, d: d || "M0 0" });
      };
      for (const seed of line.seeds) path(seed, line.mean ? "thin" : "bold");
      if (line.mean) path(line.mean, "bold");
    }

    // Shows the values nearest to a step; the last ones for null.
    point(step) {
      this.at = step;
      this.cursor.replaceChildren();
      const at = step === null ? this.last : step;
      if (step !== null) {
        const x = this.x(step);
        make(this.cursor, "line", { class: "cursor", x1: x, x2: x, y1: PAD.top, y2: this.height - PAD.bottom });
      }
      const parts = [step === null ? "at the end" : `step ${step}`];
      const nodes = this.lines().map((line) => {
        const [steps, values] = line.mean || line.seeds[0];
        const near = nearest(steps, at);
        const item = document.createElement("span");
        item.className = "key c" + this.series[line.series].colour;
        const value = document.createElement("b");
        value.textContent = values[near] === null ? "–" : this.format(values[near]);
        item.append(value);
        item.title = this.series[line.series].label;
        item.setAttribute("aria-label", `${this.series[line.series].label} ${value.textContent}`);
        if (step !== null && values[near] !== null) {
          const place = { class: item.className.slice(4), r: 4.5, cx: this.x(steps[near]), cy: this.y(values[near]) };
          make(this.cursor, "circle", place);
        }
        return item;
      });
      this.readout.replaceChildren(...parts, ...nodes);
    }

    listen(svg) {
      const steps = [...new Set(this.lines().flatMap((line) => (line.mean || line.seeds[0])[0]))].sort((a, b) => a - b);
      if (!steps.length) return;
      svg.addEventListener("pointermove", (event) => {
        const box = svg.getBoundingClientRect();
        const x = ((event.clientX - box.left) * this.width) / box.width;
        const step = ((x - PAD.left) / (this.width - PAD.left - PAD.right)) * this.last;
        this.point(steps[nearest(steps, step)]);
      });
      svg.addEventListener("pointerleave", () => this.point(null));
      svg.addEventListener("blur", () => this.point(null));
      svg.addEventListener("keydown", (event) => {
        const now = this.at === null ? steps.length : nearest(steps, this.at);
        const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: steps.length - 1 };
        if (!(event.key in moves)) return;
        event.preventDefault();
        this.point(steps[Math.min(steps.length - 1, Math.max(0, moves[event.key]))]);
      });
    }
  }

  function nearest(steps, wanted) {
    let best = 0;
    steps.forEach((step, n) => {
      if (Math.abs(step - wanted) < Math.abs(steps[best] - wanted)) best = n;
    });
    return best;
  }

  function curves() {
    const block = document.getElementById("curves-data");
    if (!block) return;
    const data = JSON.parse(block.textContent);
    const shown = data.series.map(() => true);
    const charts = data.charts.map((spec) => {
      const figure = document.querySelector(`[data-chart="${CSS.escape(spec.name)}"]`);
      return new Chart(figure, spec, data.series, shown);
    });
    for (const button of document.querySelectorAll("[data-series]")) {
      button.addEventListener("click", () => {
        const number = Number(button.dataset.series);
        shown[number] = !shown[number];
        button.setAttribute("aria-pressed", String(shown[number]));
        for (const chart of charts) chart.draw();
      });
    }
  }

  function theme() {
    const root = document.documentElement.style;
    const stored = () => { try { return localStorage.getItem("limbeck-theme"); } catch { return null; } };
    const set = (value) => { root.colorScheme = value; try { localStorage.setItem("limbeck-theme", value); } catch { /* a page from a file may have no storage */ } };
    if (stored() === "dark" || stored() === "light") root.colorScheme = stored();
    document.getElementById("theme").addEventListener("click", () => {
      const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
      set((root.colorScheme || system) === "dark" ? "light" : "dark");
    });
  }

  function copying() {
    for (const button of document.querySelectorAll(".copy")) {
      button.addEventListener("click", async () => {
        const code = button.parentElement.querySelector("code");
        try {
          await navigator.clipboard.writeText(code.textContent);
        } catch {
          getSelection().selectAllChildren(code);
          document.execCommand("copy");
        }
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      });
    }
  }

  theme();
  curves();
  copying();
})();
