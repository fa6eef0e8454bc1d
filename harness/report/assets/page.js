"use strict";
/* Draws the page from the data in #data. Text of others (names, notes) only ever becomes text nodes. */
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const GIB = 2 ** 30, MIB = 2 ** 20;
  // Okabe and Ito's colours, distinct with any colour vision.
  const COLOURS = {
    weights: "#0072B2", overhead: "#999999", fixed: "#CC79A7", compute: "#E69F00", cache: "#009E73",
    line: "#0072B2", point: "#D55E00", second: "#E69F00",
  };
  const PARTS = [
    ["weights", "weights"], ["overhead", "overhead"], ["fixed cache", "fixed"], ["compute", "compute"], ["context cache", "cache"],
  ];
  const CARDS = [4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141, 192];

  const size = bytes => bytes === null || bytes === undefined ? "–"
    : Math.abs(bytes) >= GIB ? `${(bytes / GIB).toFixed(2)} GiB` : `${(bytes / MIB).toFixed(1)} MiB`;
  const count = value => value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en");
  const rate = value => value === null || value === undefined ? "–" : value.toFixed(1);
  const known = value => value !== null && value !== undefined;

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value === true) made.setAttribute(key, "");
      else if (value !== false && value !== null) made.setAttribute(key, value);
    }
    made.append(...children.filter(child => child !== null && child !== undefined));
    return made;
  }
  const cells = (row, name = "td") => row.map((cell, index) => element(name, {class: index ? "number" : null}, cell));
  const hardware = doc => doc.metadata.machine.gpus.map(gpu => gpu.name).join(", ") || "host memory";
  const meter = doc => doc.metadata.machine.meter === "log" ? "logged, not measured" : `measured by ${doc.metadata.machine.meter}`;

  // -- charts ----------------------------------------------------------------------------------------------------------

  const drawn = new Map();

  function style() {
    const css = getComputedStyle(document.documentElement);
    return name => css.getPropertyValue(name).trim();
  }

  function draw(target, traces, layout) {
    drawn.set(target, [traces, layout]);
    const colour = style();
    const axis = {gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true};
    const whole = {
      font: {family: "system-ui, sans-serif", size: 13, color: colour("--text")},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: {l: 60, r: 16, t: 12, b: 96}, hovermode: "x unified",
      hoverlabel: {bgcolor: colour("--card"), bordercolor: colour("--line"), font: {color: colour("--text")}},
      legend: {orientation: "h", yref: "container", y: 0, yanchor: "bottom"}, ...layout,
    };
    for (const key of Object.keys(whole).filter(name => /^[xy]axis\d*$/.test(name))) whole[key] = {...axis, ...whole[key]};
    for (const shape of whole.shapes ?? []) shape.line = {...shape.line, color: colour("--muted")};
    for (const note of whole.annotations ?? []) note.font = {size: 11, color: colour("--muted")};
    Plotly.react(target, traces, whole, {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"]});
  }

  const redraw = () => drawn.forEach(([traces, layout], target) => draw(target, traces, layout));

  function chart(caption, summary, fill) {
    const target = element("div", {class: "plot", role: "img", "aria-label": `${caption}. ${summary}`});
    const figure = element("figure", {}, element("figcaption", {}, element("strong", {}, caption), ` ${summary}`), target);
    figure.fill = () => fill(target);
    return figure;
  }

  function fitChart(entry) {
    const {fit, document: doc} = entry, error = doc.metadata.quality.max_error;
    const said = !fit.loads.length ? "The engine fills what it is given: the line is what one sequence needs."
      : known(error) ? `Worst load left out: ${(100 * error).toFixed(3)} %.` : "The error was not measured.";
    const title = fit.loads.length ? "The points and the line through them" : "Memory over the context";
    return chart(title, said, target => {
      const lines = fit.lines.map((line, index) => ({
        x: line.contexts, y: line.gib, mode: "lines", name: line.name,
        line: {color: COLOURS.line, dash: index % 2 ? "dash" : "solid"}, hovertemplate: "%{y:.3f} GiB",
      }));
      const points = !fit.loads.length ? [] : [
        {x: fit.loads.map(load => load[0]), y: fit.loads.map(load => load[1]), mode: "markers", name: "measured",
          marker: {color: COLOURS.point, size: 9}, hovertemplate: "%{y:.3f} GiB"},
        {x: fit.loads.map(load => load[0]), y: fit.off_mib, type: "bar", name: "measured − line", yaxis: "y2",
          marker: {color: COLOURS.point}, hovertemplate: "%{y:+.2f} MiB"},
      ];
      const xaxis = {title: {text: "context, tokens"}}, yaxis = {title: {text: "GiB"}, rangemode: "tozero"};
      draw(target, [...lines, ...points], !points.length ? {xaxis, yaxis} : {
        xaxis: {...xaxis, anchor: "y2"}, yaxis: {...yaxis, domain: [0.36, 1]},
        yaxis2: {title: {text: "MiB off"}, domain: [0, 0.24]},
      });
    });
  }

  function partsChart(entry) {
    const {planner: table, document: doc} = entry, own = doc.metadata.settings.num_parallel;
    if (table.parts.includes(null)) return null;
    return chart("Memory by part over the context", "Dashed lines are what cards have beyond what is kept free.", target => {
      const most = Math.max(...table.parts.map(parts => parts.reduce((sum, part) => sum + (part ?? 0), 0))) / GIB;
      const {reserve} = planner.look(table, table.cards[0], own, table.contexts[0], Number.MAX_SAFE_INTEGER);
      const kept = known(reserve) ? reserve / GIB : 0, beyond = CARDS.filter(card => card - kept < most * 1.15);
      const shown = doc.metadata.machine.target === "gpu" && table.cards[0] === 1 ? beyond.slice(-5) : [];
      draw(target, PARTS.map(([name, colour], index) => ({
        x: table.contexts, y: table.parts.map(parts => (parts[index] ?? 0) / GIB), name, stackgroup: "one", mode: "lines",
        line: {width: 0.5, color: COLOURS[colour]}, fillcolor: COLOURS[colour], hovertemplate: "%{y:.3f} GiB",
      })), {
        xaxis: {title: {text: "context, tokens"}}, yaxis: {title: {text: "GiB"}, rangemode: "tozero"},
        shapes: shown.map(card => ({type: "line", xref: "paper", x0: 0, x1: 1, y0: card - kept, y1: card - kept, line: {dash: "dash", width: 1}})),
        annotations: shown.map(card => ({xref: "paper", x: 1, y: card - kept, text: `${card} GiB card`, showarrow: false, yanchor: "bottom", xanchor: "right"})),
      });
    });
  }

  function traceChart(entry) {
    if (!entry.traces.length) return null;
    return chart("Memory of the run", "As the meter read it in each load; dotted lines begin a phase of the last one.", target => {
      const traces = entry.traces.map(load => ({
        x: load.seconds, y: load.bytes.map(one => one === null ? null : one / GIB), mode: "lines", name: load.title,
        hovertemplate: "%{y:.3f} GiB",
      }));
      const {marks} = entry.traces.at(-1);
      const shapes = marks.map(([at]) => ({type: "line", yref: "paper", y0: 0, y1: 1, x0: at, x1: at, line: {width: 1, dash: "dot"}}));
      const annotations = marks.map(([at, phase]) =>
        ({x: at, yref: "paper", y: 1, text: phase, showarrow: false, textangle: -90, yanchor: "top", xanchor: "left"}));
      draw(target, traces, {xaxis: {title: {text: "seconds since the load began"}}, yaxis: {title: {text: "GiB"}, rangemode: "tozero"}, shapes, annotations,
        colorway: [COLOURS.weights, COLOURS.compute, COLOURS.cache, COLOURS.fixed, COLOURS.point, "#56B4E9"]});
    });
  }

  function speedChart(entry) {
    const {planner: table, document: doc} = entry, performance = doc.metadata.performance, depths = performance.depths ?? [];
    let least = Infinity; // a busy machine can time the deeper one as the faster; no cache makes it so
    const rates = depths.map(one => least = Math.min(least, one.decode_tokens_per_s));
    const {decode_tokens_per_s: fast = null, host_decode_tokens_per_s: slow = null} = performance;
    if (!depths.length && fast === null) return null;
    const spill = doc.metadata.machine.target === "gpu" && fast && slow && doc.metadata.machine.gpus.length < 2;
    const said = spill ? "Measured over depth; over the memory that is free, as the engine would split the layers." : "Measured over depth.";
    return chart("Decode speed", said, target => {
      const traces = [{
        x: depths.map(one => one.depth), y: rates, mode: "lines+markers", name: "measured at depth",
        line: {color: COLOURS.line}, marker: {size: 8}, hovertemplate: "%{y:.1f} tokens/s",
      }];
      const layout = {
        xaxis: {title: {text: "tokens in the cache"}, rangemode: "tozero", domain: spill ? [0, 0.44] : [0, 1]},
        yaxis: {title: {text: "tokens/s"}, rangemode: "tozero"},
      };
      if (spill) {
        const context = table.contexts.filter(one => one <= 8192).at(-1) ?? table.contexts[0];
        const steps = planner.decodeSteps(table, 1, doc.metadata.settings.num_parallel, context);
        const end = steps.at(-1)[0] * 1.2;
        traces.push({
          x: [...steps.map(([free]) => free / GIB), end / GIB], y: [...steps.map(step => step[1]), steps.at(-1)[1]],
          xaxis: "x2", yaxis: "y2", mode: "lines",
          line: {color: COLOURS.point, shape: "hv"}, name: `at ${count(context)} tokens`, hovertemplate: "%{y:.1f} tokens/s",
        });
        layout.xaxis2 = {title: {text: "GiB free"}, domain: [0.56, 1], anchor: "y2"};
        layout.yaxis2 = {title: {text: "tokens/s"}, rangemode: "tozero", anchor: "x2"};
      }
      draw(target, traces, layout);
    });
  }

  // -- sections --------------------------------------------------------------------------------------------------------

  function overview() {
    const head = ["calibration", "base", "KV / 10k tokens", "compute / 10k tokens", "valid to", "error", "decode", "measured on", "date"];
    const rows = data.calibrations.map(entry => {
      const {constants, metadata} = entry.document;
      const error = metadata.quality.max_error;
      const row = cells([
        element("a", {href: `#${entry.anchor}`, onclick: () => open(entry)}, entry.key), size(constants.base_vram_gb * GIB),
        size(constants.kv_cache_gb_per_10k * GIB), size((constants.compute_gb_per_10k ?? 0) * GIB), count(metadata.quality.valid_to),
        known(error) ? `${(100 * error).toFixed(2)} %` : "–", rate(metadata.performance.decode_tokens_per_s),
        `${hardware(entry.document)} · ${entry.document.engine} ${metadata.engine.version ?? ""}`, metadata.calibrated_at.slice(0, 10),
      ]);
      return element("tr", {}, ...row);
    });
    return element("section", {id: "overview"},
      element("h2", {}, "Calibrations"),
      element("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": "Calibrations"},
        element("table", {}, element("thead", {}, element("tr", {}, ...cells(head, "th"))), element("tbody", {}, ...rows))));
  }

  const panels = new Map();

  function open(entry) {
    panels.get(entry.key).open = true;
  }

  function detail(entry) {
    const {document: doc} = entry, {metadata} = doc;
    const facts = [
      ["model", [metadata.model.name, metadata.model.architecture, metadata.model.quantization].filter(Boolean).join(" · ")],
      ["engine", `${doc.engine} ${metadata.engine.version ?? "(version unknown)"}${metadata.engine.image ? ` · ${metadata.engine.image}` : ""}`],
      ["machine", `${hardware(doc)} · ${meter(doc)}`],
      ["settings", entry.settings],
      ["run", metadata.run ?? "–"],
    ];
    const figures = [fitChart(entry), partsChart(entry), traceChart(entry), speedChart(entry)].filter(Boolean);
    const panel = element("details", {id: entry.anchor, class: "model"},
      element("summary", {}, element("h3", {}, entry.key), element("span", {class: "muted"}, ` ${hardware(doc)}`)),
      element("dl", {}, ...facts.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)])),
      metadata.quality.notes.length ? element("ul", {class: "notes"}, ...metadata.quality.notes.map(note => element("li", {}, note))) : null,
      element("div", {class: "figures"}, ...figures));
    panel.addEventListener("toggle", () => {
      if (panel.open) figures.splice(0).forEach(figure => figure.fill());
    });
    panels.set(entry.key, panel);
    return panel;
  }

  // -- planner ---------------------------------------------------------------------------------------------------------

  function planning() {
    const rows = [], choices = data.calibrations;
    const isHost = entry => entry.document.metadata.machine.target === "host";
    const labelled = (name, ...fields) => element("label", {}, `${name} `, ...fields);
    const options = (values, chosen, text = count) => values.map(one => element("option", {value: one, selected: one === chosen}, text(one)));
    const card = element("select", {id: "card", onchange: () => { free.value = card.value || free.value; update(); }},
      element("option", {value: ""}, "another"), ...options(CARDS, 24, one => `${one} GiB`));
    const free = element("input", {id: "free", type: "number", min: 0, step: "any", value: 24, oninput: () => {
      card.value = CARDS.includes(Number(free.value)) ? Number(free.value) : "";
      update();
    }});
    const numbers = [...new Set(choices.flatMap(entry => isHost(entry) ? [] : entry.planner.cards))].sort((a, b) => a - b);
    const cards = element("select", {id: "cards", onchange: () => update()}, ...options(numbers, numbers[0]));
    const host = element("input", {id: "host", type: "number", min: 0, step: "any", value: 32, oninput: () => update()});
    const body = element("tbody"), together = element("p", {id: "together", role: "status", "aria-live": "polite"});
    const pick = element("select", {id: "pick"}, ...choices.map(entry => element("option", {value: entry.key}, entry.key)));
    const add = element("button", {type: "button", id: "add", onclick: () => { addRow(entryOf(pick.value)); update(); }}, "Add");
    const entryOf = key => choices.find(entry => entry.key === key);

    function addRow(entry) {
      const {contexts, slots: offered} = entry.planner, name = `context of ${entry.key}`;
      const first = contexts.filter(one => one <= 8192).at(-1) ?? contexts[0];
      const context = element("select", {"aria-label": name}, ...options(contexts, first));
      const slide = element("input", {type: "range", min: 0, max: contexts.length - 1, value: contexts.indexOf(first), "aria-label": `${name}, slider`});
      const slots = element("select", {"aria-label": `slots of ${entry.key}`}, ...options(offered, entry.document.metadata.settings.num_parallel));
      const out = Array.from({length: 6}, () => element("td", {class: "number"}));
      const row = {entry, context, slots, out};
      const line = element("tr", {},
        element("td", {}, entry.key, isHost(entry) ? element("span", {class: "muted"}, " host memory") : null),
        element("td", {}, context, slide), element("td", {}, slots), ...out,
        element("td", {}, element("button", {
          type: "button", "aria-label": `Remove ${entry.key}`,
          onclick: () => { rows.splice(rows.indexOf(row), 1); line.remove(); update(); },
        }, "×")));
      context.addEventListener("input", () => { slide.value = contexts.indexOf(Number(context.value)); update(); });
      slide.addEventListener("input", () => { context.value = contexts[slide.value]; update(); });
      slots.addEventListener("input", () => update());
      rows.push(row);
      body.append(line);
    }

    const bytes = input => Math.max(Math.round(Number(input.value) * GIB) || 0, 0);
    const asked = row => [row.entry.planner, Number(row.slots.value), Number(row.context.value), row.entry.document.engine];

    // Models share the memory that they are in: those of the GPU one, those of the host the other.
    function update() {
      const said = [];
      for (const [name, here, many, available] of [["GPU", rows.filter(row => !isHost(row.entry)), Number(cards.value), bytes(free)],
        ["host memory", rows.filter(row => isHost(row.entry)), 1, bytes(host)]]) {
        const alone = many > 1 ? here.map(row => planner.look(row.entry.planner, many, ...asked(row).slice(1, 3), available)) : null;
        const found = alone ?? planner.together(here.map(asked), available);
        here.forEach((row, index) => show(row, found[index], planner.largest(row.entry.planner, many, Number(row.slots.value), found[index].available / many)));
        if (here.length > 1 && alone) said.push(`On ${many} cards each model is judged alone: harness check judges them together.`);
        else if (here.length > 1)
          said.push(`Started in this order (${name}): ${here.map((row, index) => `${row.entry.key} ${found[index].fate ?? "unknown"}`).join(", ")}.`);
      }
      together.textContent = rows.length ? said.join(" ") : "Add a model.";
    }

    function show(row, found, largest) {
      const layers = !known(found.layersOffloaded) || isHost(row.entry) ? "–"
        : `${found.layersOffloaded} of ${found.layersTotal}${found.layersOverflowing ? `, ${found.layersOverflowing} overflowing` : ""}`;
      const word = {fits: "fits", offload: "CPU OFFLOAD LIKELY", unknown: "unknown"}[found.verdict];
      const texts = [word, size(found.required), found.short ? size(found.short) : "–", layers, rate(found.decode), count(largest)];
      row.out.forEach((cell, index) => { cell.textContent = texts[index]; });
      row.out[0].className = `verdict ${found.verdict}`;
      row.out[0].title = found.reason ?? (found.tight ? "within the uncertainty of the prediction" : "");
    }

    choices.slice().sort((a, b) => isHost(a) - isHost(b)).slice(0, 2).forEach(addRow);
    const head = ["model", "context per slot", "slots", "verdict", "needs", "short by", "layers on the GPU", "tokens/s", "largest context", ""];
    queueMicrotask(update);
    const gpu = choices.some(entry => !isHost(entry)) ? [labelled("card", card), labelled("free on each, GiB", free), labelled("cards", cards)] : [];
    return element("section", {id: "planner"},
      element("h2", {}, "Planner"),
      element("p", {}, "What fits, by the engine's own rule: the answers of ", element("code", {}, "harness check"), ", for the contexts listed."),
      element("div", {class: "controls"}, ...gpu, choices.some(isHost) ? labelled("free host memory, GiB", host) : null,
        labelled("model", pick), add),
      element("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": "Plan"},
        element("table", {class: "plan"}, element("thead", {}, element("tr", {}, ...cells(head, "th"))), body)),
      together);
  }

  function drift() {
    if (!data.drift.length) return null;
    const rows = data.drift.map(one => element("tr", {},
      element("td", {}, one.key), element("td", {}, one.status),
      element("td", {}, ...(one.lines.length ? [element("ul", {class: "plain"}, ...one.lines.map(line => element("li", {}, line)))] : ["nothing beyond the measurement error"]))));
    return element("section", {id: "drift"},
      element("h2", {}, "Drift"), element("p", {class: "muted"}, `From ${data.against} to this store.`),
      element("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": "Drift"},
        element("table", {}, element("thead", {}, element("tr", {}, ...cells(["calibration", "status", "what moved"], "th"))), element("tbody", {}, ...rows))));
  }

  // -- page ------------------------------------------------------------------------------------------------------------

  const themes = ["auto", "light", "dark"];
  const theme = element("button", {type: "button", id: "theme", onclick: () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length];
    document.documentElement.dataset.theme = next;
    theme.textContent = `theme: ${next}`;
    redraw();
  }}, "theme: auto");
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  document.getElementById("tools").append(theme);
  const main = document.getElementById("main");
  const sections = data.calibrations.length
    ? [overview(), planning(), drift(), element("section", {id: "models"}, element("h2", {}, "Models"), ...data.calibrations.map(detail))]
    : [element("p", {}, "There is no calibration in this store yet. Make one with ", element("code", {}, "harness calibrate"), ".")];
  main.append(...sections.filter(Boolean));
  if (data.calibrations.length === 1) open(data.calibrations[0]);
  const target = location.hash.slice(1);
  data.calibrations.filter(entry => entry.anchor === target).forEach(open);
})();
