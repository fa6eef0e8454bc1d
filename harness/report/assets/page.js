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

  const known = value => value !== null && value !== undefined;
  // As the commands print them: MiB below 10 GiB, slopes in KiB for each token.
  const decimals = (value, digits) => value.toLocaleString("en", {minimumFractionDigits: digits, maximumFractionDigits: digits});
  const size = bytes => !known(bytes) ? "–"
    : Math.abs(bytes) >= 10 * GIB ? `${decimals(bytes / GIB, 2)} GiB` : `${decimals(bytes / MIB, 1)} MiB`;
  const slope = gibPer10k => known(gibPer10k) ? decimals(gibPer10k * GIB / 10000 / 1024, 3) : "–";
  const count = value => value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en");
  const rate = (value, uncertainty) => !known(value) ? "–" : `${decimals(value, 1)} ± ${Math.round(100 * uncertainty)} %`;

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
  // A table that is records on a narrow screen: a cell bears the name of its column. Columns are [name, kind], cells in their order.
  const row = (columns, cells) => element("tr", {role: "row"},
    ...cells.map((cell, index) => element("td", {role: "cell", class: columns[index][1], "data-label": columns[index][0]}, cell)));
  function table(label, columns, body, heads = columns.map(([name]) => name)) {
    const head = heads.map((one, index) => element("th", {role: "columnheader", scope: "col", class: columns[index][1]}, one));
    return element("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": label},
      element("table", {role: "table"}, element("thead", {}, element("tr", {role: "row"}, ...head)), body));
  }
  const most = entry => entry.planner.at_most.includes(true) ? "at most " : "";
  const hardware = doc => doc.metadata.machine.gpus.map(gpu => gpu.name).join(", ") || "host memory";
  const meter = doc => doc.metadata.machine.meter === "log" ? "logged, not measured" : `measured by ${doc.metadata.machine.meter}`;

  // -- charts ----------------------------------------------------------------------------------------------------------

  const drawn = new Map(), probe = document.body.appendChild(element("span", {hidden: true}));
  let paper = false;

  // A colour of the style as rgb(), which charts understand; the names of a system's own colours they do not.
  function colour(name) {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  }

  function draw(target, traces, layout) {
    drawn.set(target, [traces, layout]);
    const axis = {gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true};
    const whole = {
      font: {family: "system-ui, sans-serif", size: 13, color: colour("--text")},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: {l: 60, r: 16, t: 40, b: 96}, hovermode: "x unified",
      hoverlabel: {bgcolor: colour("--card"), bordercolor: colour("--line"), font: {color: colour("--text")}},
      legend: {orientation: "h", yref: "container", y: 0, yanchor: "bottom"},
      ...(paper ? {width: 640, height: 320} : {autosize: true}), ...layout,
    };
    for (const key of Object.keys(whole).filter(name => /^[xy]axis\d*$/.test(name))) whole[key] = {...axis, ...whole[key]};
    for (const shape of whole.shapes ?? []) shape.line = {...shape.line, color: colour("--muted")};
    for (const note of whole.annotations ?? []) Object.assign(note, {font: {size: 11, color: colour("--text")}, bgcolor: colour("--card")});
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
      const off = 1.1 * Math.max(1, ...fit.off_mib.map(one => Math.abs(one ?? 0))); // a thousandth of a MiB is drawn as none
      const xaxis = {title: {text: "context, tokens"}}, yaxis = {title: {text: "GiB"}, rangemode: "tozero"};
      draw(target, [...lines, ...points], !points.length ? {xaxis, yaxis} : {
        xaxis: {...xaxis, anchor: "y2"}, yaxis: {...yaxis, domain: [0.36, 1]},
        yaxis2: {title: {text: "MiB off"}, domain: [0, 0.24], range: [-off, off], nticks: 3},
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
    const spread = known(performance.spread) ? ` Repeats differ by ${(100 * performance.spread).toFixed(1)} %.` : "";
    const over = spill ? "Measured over depth; over the memory that is free, as the engine would split the layers." : "Measured over depth.";
    const said = over + spread;
    return chart("Decode speed", said, target => {
      const traces = [{
        x: depths.map(one => one.depth), y: rates, mode: "lines+markers", name: "measured at depth",
        line: {color: COLOURS.line}, marker: {size: 8}, hovertemplate: "%{y:.1f} tokens/s",
        error_y: {type: "percent", value: 100 * entry.speed_uncertainty, thickness: 1},
      }];
      const layout = {
        xaxis: {title: {text: "tokens in the cache"}, rangemode: "tozero", nticks: 4, domain: spill ? [0, 0.44] : [0, 1]},
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
    // [name, kind, what it is sorted by, how it is shown]
    const columns = [
      ["calibration", "name", entry => entry.key, (key, entry) => element("a", {href: `#${entry.anchor}`, onclick: () => open(entry)}, key)],
      ["base", "number", entry => entry.document.constants.base_vram_gb * GIB, (bytes, entry) => most(entry) + size(bytes)],
      ["KV, KiB/token", "number", entry => entry.document.constants.kv_cache_gb_per_10k, (gib, entry) => most(entry) + slope(gib)],
      ["compute, KiB/token", "number", entry => entry.document.constants.compute_gb_per_10k, slope],
      ["valid to", "number", entry => entry.document.metadata.quality.valid_to, count],
      ["error", "number", entry => entry.document.metadata.quality.max_error, value => known(value) ? `${(100 * value).toFixed(3)} %` : "–"],
      ["decode, tokens/s", "number", entry => entry.document.metadata.performance.decode_tokens_per_s, (value, entry) => rate(value, entry.speed_uncertainty)],
      ["measured on", "text", entry => `${hardware(entry.document)} · ${entry.document.engine} ${entry.document.metadata.engine.version ?? ""}`, String],
      ["date", "number", entry => entry.document.metadata.calibrated_at.slice(0, 10), String],
    ];
    const body = element("tbody");
    const lines = data.calibrations.map(entry => {
      const values = columns.map(column => column[2](entry));
      const line = row(columns, columns.map((column, index) => column[3](values[index], entry)));
      return {entry, values, line, text: line.textContent.toLowerCase()};
    });
    body.append(...lines.map(one => one.line));

    const compare = (a, b) => typeof a === "string" ? a.localeCompare(b, "en", {numeric: true}) : a - b;
    function sort(index, head) {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const one of head.parentElement.children) one.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const last = one => known(one.values[index]) ? 0 : 1; // what is not known, in both directions
      lines.sort((a, b) => last(a) - last(b) || (last(a) ? 0 : sign * compare(a.values[index], b.values[index])));
      body.append(...lines.map(one => one.line));
    }
    const heads = lines.length < 2 ? undefined : columns.map(([name], index) => element("button", {type: "button", onclick: event => sort(index, event.target.closest("th"))}, name));

    const shown = element("span", {role: "status", class: "muted"});
    const filter = element("input", {id: "filter", type: "search", placeholder: "name, card, engine, date", oninput: () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let left = 0;
      for (const {entry, line, text} of lines) {
        const hidden = !words.every(word => text.includes(word));
        line.hidden = panels.get(entry.key).hidden = hidden;
        left += !hidden;
      }
      shown.textContent = words.length ? `${left} of ${lines.length}` : "";
    }});
    return element("section", {id: "overview"},
      element("h2", {}, "Calibrations"),
      lines.length > 1 ? element("div", {class: "controls edit"}, element("label", {}, "filter calibrations and models ", filter), shown) : null,
      table("Calibrations", columns, body, heads));
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
    const columns = [["model", "name"], ["context per slot", "context"], ["slots", "choice"], ["verdict", "verdict"], ["needs", "number"], ["short by", "number"],
      ["layers on the GPU", "number"], ["tokens/s", "number"], ["largest context", "number"], ["", "edit"]];
    const body = element("tbody"), together = element("p", {id: "together", role: "status", "aria-live": "polite"});
    // What is typed narrows the list; words that only one model has are enough.
    const found = () => {
      const words = pick.value.toLowerCase().split(/\s+/).filter(Boolean);
      const fitting = choices.filter(entry => words.length && words.every(word => entry.key.toLowerCase().includes(word)));
      return choices.find(entry => entry.key === pick.value.trim()) ?? (fitting.length === 1 ? fitting[0] : null);
    };
    const chosen = () => {
      const entry = found();
      pick.setCustomValidity(entry ? "" : "Choose a model of the list, or type a part of its name that no other has.");
      if (!pick.reportValidity()) return;
      addRow(entry);
      pick.value = "";
      update();
    };
    const pick = element("input", {id: "pick", type: "search", list: "choices", placeholder: "name", autocomplete: "off",
      oninput: () => pick.setCustomValidity(""), onkeydown: event => { if (event.key === "Enter") chosen(); }});
    const add = element("button", {type: "button", id: "add", onclick: chosen}, "Add");
    const listed = element("datalist", {id: "choices"}, ...choices.map(entry => element("option", {value: entry.key})));

    function addRow(entry) {
      const {contexts, slots: offered} = entry.planner, name = `context of ${entry.key}`;
      const first = contexts.filter(one => one <= 8192).at(-1) ?? contexts[0];
      const context = element("select", {"aria-label": name}, ...options(contexts, first));
      const slide = element("input", {type: "range", min: 0, max: contexts.length - 1, value: contexts.indexOf(first), class: "edit", "aria-label": `${name}, slider`});
      const slots = element("select", {"aria-label": `slots of ${entry.key}`}, ...options(offered, entry.document.metadata.settings.num_parallel));
      const remove = element("button", {type: "button", "aria-label": `Remove ${entry.key}`,
        onclick: () => { rows.splice(rows.indexOf(one), 1); line.remove(); update(); }}, "×");
      const both = element("span", {class: "both"}, context, slide);
      const line = row(columns, [entry.key + (isHost(entry) ? " (host memory)" : ""), both, slots, "", "", "", "", "", "", remove]);
      const one = {entry, context, slots, out: [...line.cells].slice(3, 9)};
      context.addEventListener("input", () => { slide.value = contexts.indexOf(Number(context.value)); update(); });
      slide.addEventListener("input", () => { context.value = contexts[slide.value]; update(); });
      slots.addEventListener("input", () => update());
      rows.push(one);
      body.append(line);
    }

    // Bytes of a field; null where it holds no number from 0 on.
    const bytes = input => input.value !== "" && Number(input.value) >= 0 ? Math.round(Number(input.value) * GIB) : null;
    const asked = one => [one.entry.planner, Number(one.slots.value), Number(one.context.value), one.entry.document.engine];

    // Models share the memory that they are in: those of the GPU one, those of the host the other.
    function update() {
      const said = [];
      for (const [name, here, many, available] of [["GPU", rows.filter(one => !isHost(one.entry)), Number(cards.value), bytes(free)],
        ["host memory", rows.filter(one => isHost(one.entry)), 1, bytes(host)]]) {
        if (available === null) {
          here.forEach(one => show(one, {verdict: "unknown"}, null));
          if (here.length) said.push(`Type how many GiB of ${name === "GPU" ? "GPU memory" : name} are free: a number from 0 on.`);
          continue;
        }
        const alone = many > 1 ? here.map(one => planner.look(one.entry.planner, many, ...asked(one).slice(1, 3), available)) : null;
        const found = alone ?? planner.together(here.map(asked), available);
        here.forEach((one, index) => show(one, found[index], planner.largest(one.entry.planner, many, Number(one.slots.value), found[index].available / many)));
        here.forEach((one, index) => {
          const why = found[index].reason ?? (found[index].tight ? tightness(one.entry, found[index]) : null);
          if (why) said.push(`${one.entry.key}: ${why}.`);
        });
        if (here.length > 1 && alone) said.push(`On ${many} cards each model is judged alone: harness check judges them together.`);
        else if (here.length > 1)
          said.push(`Started in this order (${name}): ${here.map((one, index) => `${one.entry.key} ${found[index].fate ?? "unknown"}`).join(", ")}.`);
      }
      together.textContent = rows.length ? said.join(" ") : "Add a model.";
    }

    // What fits is tight by what its server takes later, what does not fit by the prediction's bound.
    const tightness = (entry, found) => found.verdict !== "fits" ? "within the uncertainty of the prediction"
      : `fits, but later ${entry.planner.uncounted} may take up to ${size(found.growth)} more of host memory: only `
        + `${size(found.available - found.required)} are left${found.before ? `, of which the models before it may take up to ${size(found.before)}` : ""}`;

    function show({entry, out}, found, largest) {
      const layers = !known(found.layersOffloaded) || isHost(entry) ? "–"
        : `${found.layersOffloaded} of ${found.layersTotal}${found.layersOverflowing ? `, ${found.layersOverflowing} overflowing` : ""}`;
      const word = {fits: found.tight ? "fits, tight" : "fits", offload: "CPU OFFLOAD LIKELY", unknown: "unknown"}[found.verdict];
      const speed = found.verdict !== "offload" || !known(found.decode) ? rate(found.decode, entry.speed_uncertainty) : `about ${decimals(found.decode, 1)}`;
      const texts = [word, (found.bounded ? "at most " : "") + size(found.required), found.short ? size(found.short) : "–", layers, speed, largest === 0 ? "none" : count(largest)];
      out.forEach((cell, index) => { cell.textContent = texts[index]; });
      out[0].className = `verdict ${found.verdict}`;
    }

    choices.slice().sort((a, b) => isHost(a) - isHost(b)).slice(0, 2).forEach(addRow);
    queueMicrotask(update);
    const gpu = choices.some(entry => !isHost(entry)) ? [labelled("card", card), labelled("free on each, GiB", free), labelled("cards", cards)] : [];
    return element("section", {id: "planner"},
      element("h2", {}, "Planner"),
      element("p", {}, "What fits, by the engine's own rule: the answers of ", element("code", {}, "harness check"), ", for the contexts listed.",
        choices.some(isHost) ? " What a server takes of host memory later goes by the variables that its calibration recorded." : "",
        gpu.length ? " What a model on the GPU takes of host memory is not judged here." : ""),
      element("div", {class: "controls"}, ...gpu, choices.some(isHost) ? labelled("free host memory, GiB", host) : null,
        element("span", {class: "edit"}, labelled("model", pick), " ", add, listed)),
      table("Plan", columns, body),
      together);
  }

  function drift() {
    if (!data.drift.length) return null;
    const columns = [["calibration", "name"], ["status", "text"], ["what moved", "text"]];
    const rows = data.drift.map(one => row(columns, [one.key, one.status,
      one.lines.length ? element("ul", {class: "plain"}, ...one.lines.map(line => element("li", {}, line))) : "nothing beyond the measurement error"]));
    return element("section", {id: "drift"},
      element("h2", {}, "Drift"), element("p", {class: "muted"}, `From ${data.against} to this store.`),
      table("Drift", columns, element("tbody", {}, ...rows)));
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

  // Paper is light.
  let onScreen = "auto";
  addEventListener("beforeprint", () => {
    onScreen = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    paper = true;
    redraw();
  });
  addEventListener("afterprint", () => {
    document.documentElement.dataset.theme = onScreen;
    paper = false;
    redraw();
  });

  const main = document.getElementById("main");
  const sections = data.calibrations.length
    ? [planning(), overview(), drift(), element("section", {id: "models"}, element("h2", {}, "Models"), ...data.calibrations.map(detail))]
    : [element("p", {}, "There is no calibration in this store yet. Make one with ", element("code", {}, "harness calibrate"), ".")];
  main.append(...sections.filter(Boolean));
  const links = [...main.children].filter(one => one.id).map(one => element("a", {href: `#${one.id}`}, one.querySelector("h2").textContent));
  document.getElementById("tools").append(element("nav", {"aria-label": "Sections"}, ...links), theme);
  if (data.calibrations.length === 1) open(data.calibrations[0]);
  const target = location.hash.slice(1);
  data.calibrations.filter(entry => entry.anchor === target).forEach(open);
})();
