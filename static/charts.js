// The job's charts. Points lie by series and step, so one that comes twice (a reload, a stream that was cut) stands once.
(() => {
  const charts = document.getElementById("charts");
  const source = document.querySelector("[data-live]");
  if (!charts || !window.uPlot) return;
  const planned = document.getElementById("plan");
  let plan = null;

  // name -> Map(step -> value); the plan is a series like any other.
  const points = new Map();
  const add = (series) => {
    for (const [name, pairs] of Object.entries(series)) {
      if (!points.has(name)) points.set(name, new Map());
      for (const [step, value] of pairs) points.get(name).set(step, value);
    }
  };
  // Known before the first step, and again when an attempt plans anew.
  let seenPlan = "";
  const readPlan = () => {
    if (planned.dataset.plan === seenPlan) return false;
    seenPlan = planned.dataset.plan;
    plan = JSON.parse(seenPlan);
    points.set("planned", new Map(plan?.curve ?? []));
    return true;
  };
  readPlan();

  const share = (value) => `${(value * 100).toFixed(1)} %`;
  const rate = (value) => (value === 0 ? "0" : value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e"));
  const plain = (value) => (Math.abs(value) < 10 ? value.toFixed(4) : value.toPrecision(4));

  const KINDS = {
    loss: {
      format: plain,
      lines: [
        { name: "loss", colour: "s1", width: 1.5 },
        { name: "eval_loss", colour: "s2", width: 2, spanGaps: true, points: true },
      ],
      // The first losses are often far above the rest; the scale fits what there is.
      range: (u, low, high) => (low === null ? [0, 1] : uPlot.rangeNum(low, high, 0.08, true)),
    },
    learning_rate: {
      format: rate,
      lines: [
        { name: "planned", colour: "sm", width: 1.5, dash: [5, 4] },
        { name: "learning_rate", colour: "s1", width: 2 },
      ],
      range: (u, low, high) => [0, (high || 1) * 1.08],
      shadeTo: () => plan?.warmup_steps,
    },
    padding_efficiency: {
      format: share,
      lines: [
        { name: "padded_efficiency", colour: "sm", width: 1 },
        { name: "padding_efficiency", colour: "s3", width: 2 },
      ],
      range: () => [0, 1.02],
    },
  };

  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;
  const colourOf = (name) => {
    probe.className = name;
    return getComputedStyle(probe).color;
  };

  const aligned = (lines) => {
    const steps = [...new Set(lines.flatMap((line) => [...(points.get(line.name)?.keys() ?? [])]))].sort((a, b) => a - b);
    return [steps, ...lines.map((line) => steps.map((step) => points.get(line.name)?.get(step)))];
  };

  const shade = (end) => (u) => {
    const until = end?.();
    if (!until) return;
    const [left, right] = [u.valToPos(0, "x", true), u.valToPos(until, "x", true)];
    const from = Math.max(left, u.bbox.left);
    u.ctx.fillStyle = colourOf("sw");
    u.ctx.fillRect(from, u.bbox.top, Math.max(0, Math.min(right, u.bbox.left + u.bbox.width) - from), u.bbox.height);
  };

  class Chart {
    constructor(card) {
      this.card = card;
      this.kind = KINDS[card.dataset.chart];
      this.host = card.querySelector(".host");
      this.values = Object.fromEntries([...card.querySelectorAll("[data-series]")].map((value) => [value.dataset.series, value]));
      this.empty = this.host.appendChild(document.createElement("p"));
      this.empty.className = "chart-empty";
      this.empty.textContent = charts.dataset.empty;
      this.build();
      new ResizeObserver(() => this.resize()).observe(this.host);
      this.host.addEventListener("keydown", (event) => this.walk(event));
      card.querySelector("[data-table]").addEventListener("click", (event) => this.toggleTable(event.currentTarget));
    }

    build() {
      this.plot?.destroy();
      const { kind } = this;
      const [muted, line] = [colourOf("muted"), colourOf("grid-line")];
      const axis = { stroke: muted, font: "11px system-ui, sans-serif", grid: { stroke: line, width: 1 }, ticks: { show: false }, gap: 6 };
      this.plot = new uPlot(
        {
          width: Math.max(this.host.clientWidth, 120),
          height: this.host.clientHeight,
          legend: { show: false },
          padding: [10, 12, 0, 0],
          cursor: { sync: { key: "steps", setSeries: false }, y: false, drag: { x: true, y: false }, points: { size: 7 } },
          scales: {
            x: { time: false, range: (u, low, high) => [low ?? 0, Math.max(high ?? 0, (low ?? 0) + 10)] },
            y: { range: kind.range },
          },
          axes: [
            { ...axis, size: 28, space: 70, values: (u, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? tick.toLocaleString() : "")) },
            { ...axis, size: 52, space: 36, values: (u, ticks) => ticks.map((tick) => this.tick(tick)) },
          ],
          series: [
            {},
            ...kind.lines.map((each) => ({
              label: each.name,
              stroke: colourOf(each.colour),
              width: each.width,
              dash: each.dash,
              spanGaps: each.spanGaps ?? false,
              points: { show: each.points ?? ((u, series) => (points.get(each.name)?.size ?? 0) < 2), size: 6, fill: colourOf(each.colour) },
            })),
          ],
          hooks: { drawClear: [shade(kind.shadeTo)], setCursor: [(u) => this.showValues(u.cursor.idx)] },
        },
        aligned(kind.lines),
        this.host,
      );
      this.draw();
    }

    tick(value) {
      if (this.kind.format === share) return `${Math.round(value * 100)} %`;
      return this.kind.format === rate ? rate(value) : String(+value.toPrecision(3));
    }

    draw() {
      const data = aligned(this.kind.lines);
      this.plot.setData(data);
      this.empty.hidden = data[0].length > 0;
      this.host.classList.toggle("is-empty", !data[0].length);
      this.showValues(null);
      this.host.setAttribute("aria-label", this.sentence());
      if (this.table) this.fillTable();
    }

    resize() {
      if (this.host.clientWidth && this.host.clientWidth !== this.plot.width) {
        this.plot.setSize({ width: this.host.clientWidth, height: this.host.clientHeight });
      }
    }

    // At the cursor, else the newest.
    showValues(index) {
      const [steps, ...series] = this.plot.data;
      this.kind.lines.forEach((line, number) => {
        const target = this.values[line.name];
        if (!target) return;
        let at = index ?? this.lastWith(series[number], line.name === "planned" ? this.newestStep() : Infinity, steps);
        if (index !== null && line.spanGaps) while (at > 0 && series[number][at] == null) at -= 1;
        const value = series[number]?.[at];
        target.textContent = value == null ? "" : this.kind.format(value);
      });
      this.card.dataset.step = index === null ? "" : steps[index];
    }

    newestStep() {
      return Math.max(0, ...(points.get("learning_rate")?.keys() ?? []));
    }

    lastWith(values, until, steps) {
      for (let at = values.length - 1; at >= 0; at -= 1) if (values[at] != null && steps[at] <= until) return at;
      return null;
    }

    walk(event) {
      const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
      if (!(event.key in moves)) return;
      event.preventDefault();
      const steps = this.plot.data[0];
      const at = Math.min(Math.max((this.plot.cursor.idx ?? steps.length - 1) + moves[event.key], 0), steps.length - 1);
      this.plot.setCursor({ left: this.plot.valToPos(steps[at], "x"), top: this.plot.height / 3 });
    }

    sentence() {
      const facts = (name) => {
        const pairs = [...(points.get(name) ?? [])].filter(([, value]) => value !== null).sort((a, b) => a[0] - b[0]);
        if (!pairs.length) return null;
        const values = pairs.map(([, value]) => value);
        const lowest = pairs.reduce((best, pair) => (pair[1] < best[1] ? pair : best));
        const { format } = this.kind;
        return {
          steps: pairs.at(-1)[0],
          first: format(values[0]),
          last: format(values.at(-1)),
          lowest: format(lowest[1]),
          lowest_step: lowest[0],
          highest: format(values.reduce((a, b) => Math.max(a, b))),
          mean: format(values.reduce((a, b) => a + b, 0) / values.length),
        };
      };
      const fill = (text, values) => text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
      const [main, also] = { loss: ["loss", "eval_loss"], learning_rate: ["learning_rate", null], padding_efficiency: ["padding_efficiency", "padded_efficiency"] }[this.card.dataset.chart];
      const sentences = [];
      if (facts(main)) sentences.push(fill(this.card.dataset.sentence, facts(main)));
      if (also && facts(also)) sentences.push(fill(this.card.dataset.also, facts(also)));
      if (!also && plan) {
        const [peak, floor] = [Math.max(...plan.curve.map((pair) => pair[1])), plan.curve.at(-1)[1]];
        sentences.push(fill(this.card.dataset.also, { warmup: plan.warmup_steps, peak: rate(peak), floor: rate(floor), total: plan.total_steps }));
      }
      return sentences.join(" ") || charts.dataset.empty;
    }

    toggleTable(button) {
      const isOpen = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", String(!isOpen));
      if (isOpen) {
        this.table.parentElement.remove();
        this.table = null;
        return;
      }
      const scroller = this.card.appendChild(document.createElement("div"));
      scroller.className = "scroll chart-table";
      scroller.tabIndex = 0;
      scroller.setAttribute("role", "region");
      scroller.setAttribute("aria-label", this.card.querySelector("h2").textContent);
      this.table = scroller.appendChild(document.createElement("table"));
      this.fillTable();
    }

    // Every row of a long run would be a page of its own: at most 200, evenly spread, the last among them.
    fillTable() {
      const [steps, ...series] = this.plot.data;
      const stride = Math.max(1, Math.ceil(steps.length / 200));
      const titles = this.kind.lines.map((line) => this.values[line.name].parentElement.firstChild.nextSibling.textContent.trim());
      const row = (cells, kind) => {
        const line = document.createElement("tr");
        for (const text of cells) {
          const cell = line.appendChild(document.createElement(kind));
          cell.className = "num";
          cell.textContent = text;
        }
        return line;
      };
      const head = document.createElement("thead");
      head.append(row([charts.dataset.step, ...titles], "th"));
      const body = document.createElement("tbody");
      steps.forEach((step, at) => {
        if ((steps.length - 1 - at) % stride) return;
        body.append(row([step.toLocaleString(), ...series.map((values) => (values[at] == null ? "" : this.kind.format(values[at])))], "td"));
      });
      this.table.replaceChildren(head, body);
    }
  }

  const all = [...charts.querySelectorAll("[data-chart]")].map((card) => new Chart(card));
  document.addEventListener("pegbox:theme", () => all.forEach((chart) => chart.build()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => all.forEach((chart) => chart.build()));

  // Many messages between two frames are one drawing.
  let isWaiting = false;
  const redraw = () => {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      all.forEach((chart) => chart.draw());
    });
  };

  fetch(charts.dataset.metrics, { headers: { Accept: "application/json" } })
    .then((reply) => (reply.ok ? reply.json() : Promise.reject(reply.status)))
    .then((metrics) => {
      // What the stream has brought meanwhile is newer.
      const live = [...points].filter(([name]) => name !== "planned").map(([name, series]) => [name, [...series]]);
      add(metrics.series);
      add(Object.fromEntries(live));
      redraw();
      charts.dataset.loaded = "";
    })
    .catch((problem) => charts.setAttribute("data-problem", problem));

  document.addEventListener("htmx:after:swap", () => {
    if (readPlan()) redraw();
  });
  source?.addEventListener("points", (event) => {
    add(JSON.parse(event.detail.data).series);
    redraw();
  });
})();
