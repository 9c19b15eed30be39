// Draws the report's charts from the numbers in the page, and its samples. Without this script the pictures remain.
"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const data = () => JSON.parse($("#data").textContent);
  let page = data();
  const settings = { axis: "step", smooth: 0, log: false };
  const made = new Map(); // figure -> its chart
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const AXES = { step: "step", tokens: "response tokens", hours: "hours" };

  function axisOf(run) {
    const axes = page.runs[run];
    const values = axes[settings.axis] || axes.step;
    return new Map(axes.step.map((step, i) => [step, values[i]]));
  }

  function smoothed(values) { // exponential mean without the bias of its start, as trackers draw it
    let last = 0, weight = 0;
    return values.map(v => {
      last = last * settings.smooth + v * (1 - settings.smooth);
      weight = weight * settings.smooth + (1 - settings.smooth);
      return last / weight;
    });
  }

  function plot(figure) {
    const chart = page.charts[figure.dataset.chart];
    if (!chart.lines.length) return; // it has no step axis: the picture stays
    const unit = chart.percent ? " %" : "", scale = chart.percent ? 100 : 1;
    const tables = [], series = [{ label: AXES[settings.axis] }], bands = [];
    const number = v => v == null ? "–" : String(+v.toPrecision(4)) + unit;
    for (const line of chart.lines) {
      const at = axisOf(line.run), stroke = colour("--s" + line.colour);
      const x = line.points.map(p => at.get(p[0])), y = line.points.map(p => p[1] * scale);
      const name = line.label || "value", points = { show: y.length < 40, size: 5 };
      const option = { stroke, width: 1.6, spanGaps: true, points, value: (_, v) => number(v) };
      if (line.low) {
        for (const [end, values] of [["low", line.low], ["high", line.high]]) {
          tables.push([x, values.map(p => p[1] * scale)]);
          series.push({ ...option, label: `${name} ${end}`, width: 0, points: { show: false } });
        }
        bands.push({ series: [series.length - 1, series.length - 2], fill: stroke + "33" });
      }
      if (settings.smooth > 0 && y.length > 3) {
        tables.push([x, y], [x, smoothed(y)]);
        series.push({ ...option, label: `${name}, single`, stroke: stroke + "55", width: 0.8, points: { show: false } });
        series.push({ ...option, label: name, width: 2 });
      } else {
        tables.push([x, y]);
        series.push({ ...option, label: name });
      }
    }
    const positive = tables.every(t => t[1].every(v => v > 0));
    const ink = { stroke: colour("--soft"), grid: { stroke: colour("--grid"), width: 0.5 }, ticks: { show: false } };
    const box = $(".plot", figure);
    made.get(figure)?.destroy();
    const options = {
      width: Math.max(220, box.clientWidth), height: 210, series, bands,
      cursor: { sync: { key: "report" }, focus: { prox: 24 }, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: { distr: settings.log && positive ? 3 : 1 } },
      axes: [{ ...ink, size: 32 }, { ...ink, size: 60, values: (_, ticks) => ticks.map(v => v == null ? "" : short(v) + unit) }],
    };
    made.set(figure, new uPlot(options, uPlot.join(tables.map(sorted)), box));
    figure.classList.add("live");
  }

  const short = v => v && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e6) ? v.toExponential() : String(+v.toPrecision(6));

  function sorted([x, y]) { // joining needs rising x; a step without tokens repeats the x of the one before
    const last = new Map(x.map((v, i) => [v, y[i]]));
    const keys = [...last.keys()].filter(v => v != null).sort((a, b) => a - b);
    return [keys, keys.map(v => last.get(v))];
  }

  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const seen = new IntersectionObserver(entries => {
    for (const entry of entries) if (entry.isIntersecting && !made.has(entry.target)) plot(entry.target);
  }, { rootMargin: "300px" });
  figures.forEach(figure => seen.observe(figure));
  const redraw = () => made.forEach((_, figure) => plot(figure));

  for (const figure of figures) figure.addEventListener("keydown", event => {
    const u = made.get(figure);
    if (!u) return;
    const { min, max } = u.scales.x, span = max - min, x = u.data[0];
    const index = u.cursor.idx ?? 0, zoom = (a, b) => u.setScale("x", { min: a, max: b });
    const move = to => u.setCursor({ left: u.valToPos(x[Math.max(0, Math.min(x.length - 1, to))], "x"), top: 20 });
    const act = {
      ArrowRight: () => move(index + 1), ArrowLeft: () => move(index - 1), Home: () => move(0), End: () => move(x.length - 1),
      "+": () => zoom(min + span / 4, max - span / 4), "-": () => zoom(min - span / 2, max + span / 2),
      "0": () => zoom(x[0], x[x.length - 1]),
    }[event.key];
    if (act) { event.preventDefault(); act(); $(".said", figure).textContent = $(".u-legend", figure).innerText; }
  });

  const bar = $("#controls");
  if (bar) {
    bar.hidden = false;
    for (const option of $("#axis").options) option.disabled = !page.runs.every(run => run[option.value]);
    $("#axis").onchange = event => { settings.axis = event.target.value; redraw(); };
    $("#smooth").oninput = event => { settings.smooth = +event.target.value; redraw(); };
    $("#log").onchange = event => { settings.log = event.target.checked; redraw(); };
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
  document.querySelectorAll("details").forEach(d => d.addEventListener("toggle", () => d.open && redraw()));

  // ---- samples of any step: everything is set as text, never as markup
  function element(tag, text, name) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  }

  const SHADES = { // of a token: series colour, strength in [0, 1]
    entropy: (row, i) => [1, row.entropy[i] / 2],
    logp: (row, i) => [1, -row.logp[i] / 4],
    clip: (row, i) => { // strong where the loss stops the gradient, weak where it keeps some
      const side = row.clip_side ? row.clip_side[i] : 0;
      return [side < 0 ? 0 : 1, Math.abs(side) * (row.clip_side && row.gradient_weight[i] ? 0.45 : 1)];
    },
  };

  function clipping(row, i) {
    if (!row.clip_side) return "";
    const side = row.clip_side[i], where = side < 0 ? ", below the clip range" : side > 0 ? ", above the clip range" : "";
    return `, ratio ${row.ratio[i]}${where}, gradient weight ${row.gradient_weight[i]}`;
  }

  function card(row, shade) {
    const box = element("div", undefined, "sample" + (row.good ? " good" : ""));
    const list = element("dl");
    for (const key of ["reward", "advantage", "gold"]) {
      const pair = element("div");
      pair.append(element("dt", key), " ", element("dd", row[key]));
      list.append(pair);
    }
    const text = element("pre");
    if (row.tokens && shade !== "none") row.tokens.forEach((token, i) => {
      const span = element("span", token), [series, strength] = SHADES[shade](row, i);
      span.style.background = `color-mix(in srgb, var(--s${series}) ${Math.round(75 * Math.min(1, Math.max(0, strength)))}%, transparent)`;
      span.title = `entropy ${row.entropy[i]} nats, log-probability ${row.logp[i]}` + clipping(row, i);
      text.append(span);
    });
    else text.textContent = row.response;
    box.append(list, element("p", "prompt", "soft"), element("pre", row.prompt), element("p", "response", "soft"), text);
    return box;
  }

  for (const browser of document.querySelectorAll(".browser")) {
    browser.hidden = false;
    const run = +browser.dataset.run, choose = $("select.step", browser), shade = $("select.shade", browser);
    const steps = () => Object.keys(page.samples[run]).map(Number).sort((a, b) => a - b);
    const show = () => {
      const rows = page.samples[run][choose.value];
      $(".key", browser).textContent = shade.value !== "clip" ? "" : rows.some(row => row.clip_side) ?
        "Blue: ratio below the clip range; orange: above. Strong: no gradient; weak: the loss keeps some." :
        "This step has no record of clipping.";
      $(".cards", browser).replaceChildren(...rows.map(row => card(row, shade.value)));
    };
    const fill = keep => {
      choose.replaceChildren(...steps().map(step => new Option(step, step)));
      choose.value = keep ?? steps().at(-1);
      show();
    };
    choose.onchange = shade.onchange = show;
    for (const [name, by] of [[".before", -1], [".after", 1]]) $(name, browser).onclick = () => {
      choose.selectedIndex = Math.max(0, Math.min(choose.length - 1, choose.selectedIndex + by));
      show();
    };
    if (steps().length) fill();
    document.addEventListener("fresh", () => steps().length && fill(choose.value || undefined));
  }

  // ---- live: the server of `recipes.report --serve` gives new numbers; the reader's zoom and choices stay
  if (document.body.dataset.live) setInterval(async () => {
    try {
      const answer = await fetch("data.json");
      if (!answer.ok) return;
      const fresh = await answer.json();
      if (fresh.charts.length !== page.charts.length) return location.reload();
      const same = JSON.stringify(fresh) === JSON.stringify(page);
      page = fresh;
      if (!same) { redraw(); document.dispatchEvent(new Event("fresh")); }
    } catch { /* the server has ended: what is shown stays */ }
  }, 5000);
})();
