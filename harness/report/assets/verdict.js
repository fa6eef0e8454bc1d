"use strict";
/* What `harness check` answers, on the page: prediction/memory.py, rules.py, placement.py and verdict.py, function for function,
   without vLLM's. `rules` are the constants of rules.py. A test compares both in hundreds of cases. Bytes and tokens per slot,
   as there. */
const verdictsBy = rules => {
  const GIB = 2 ** 30, UNIT = rules.tokens_per_unit, PADDING = rules.cell_padding;
  const FIT_TARGET = rules.fit_target, GO_MINIMUM = rules.go_minimum, SERVER_SINCE = rules.server_since;
  const BATCHES = rules.batches.map(([limit, batch]) => [limit ?? Infinity, batch]);
  const HEADROOM = rules.headroom, SURCHARGE = rules.surcharge, FULL = rules.full, MAX_LOADED = rules.max_loaded;

  // Python rounds halves to even.
  const round = value => {
    const floor = Math.floor(value), rest = value - floor;
    return rest < 0.5 ? floor : rest > 0.5 ? floor + 1 : floor + (floor % 2);
  };
  const fromGib = size => round(size * GIB);
  const sum = values => values.reduce((total, value) => total + value, 0);
  const padCells = tokens => Math.ceil(tokens / PADDING) * PADDING;
  const known = value => value !== null && value !== undefined;
  const digits = (value, count) => Number(value.toFixed(count));

  function bandFor(calibration, context, batch = null, parallel = null) {
    const bands = calibration.metadata.bands, own = calibration.metadata.settings.num_parallel;
    if (batch === null || bands.every(band => band.num_batch !== batch)) {
      const reached = context * (parallel ?? own) / own;
      batch = (bands.find(band => reached <= band.up_to) ?? bands.at(-1)).num_batch;
    }
    const alike = bands.filter(band => band.num_batch === batch);
    return alike.find(band => context <= band.up_to) ?? alike.at(-1);
  }

  function predict(calibration, context, parallel = 1, batch = null) {
    const metadata = calibration.metadata, parts = metadata.breakdown_gb;
    const band = bandFor(calibration, context, batch, parallel);
    const units = padCells(context) / UNIT;
    const beyondLog = band.overhead_gb ?? parts.overhead ?? null;
    const growth = band.overhead_gb_per_10k ?? 0;
    const overhead = beyondLog === null ? null : fromGib(beyondLog + units * growth);
    const start = band.base_vram_gb - parts.weights - (beyondLog ?? 0) - band.fixed_cache_gb;
    const found = {
      weights: fromGib(parts.weights),
      overhead,
      fixedCache: fromGib(parallel * band.fixed_cache_gb),
      contextCache: fromGib(units * parallel * band.kv_cache_gb_per_10k),
      compute: fromGib(start + units * (band.compute_gb_per_10k - growth)),
      withinRange: context <= metadata.quality.valid_to,
    };
    found.total = found.weights + (overhead ?? 0) + found.fixedCache + found.contextCache + found.compute;
    found.doubt = interval(calibration, band, padCells(context), found.total, parallel);
    return found;
  }

  function interval(calibration, band, cells, total, parallel) {
    const {quality, machine} = calibration.metadata;
    const own = quality.loads.filter(load => load.num_batch === band.num_batch), loads = own.length ? own : quality.loads;
    const contexts = loads.length ? loads.map(load => load.context) : [cells];
    const low = Math.min(...contexts), high = Math.max(...contexts);
    const error = quality.max_error ?? rules.unmeasured_error;
    const most = fromGib(loads.length ? Math.max(...loads.map(load => load.total_gb)) : 0);
    const reading = rules.reading_error[machine.meter] ?? rules.reading_error_else;
    const times = 1 + Math.max(cells - padCells(high), low - cells, 0) / Math.max(high - low, PADDING);
    const spread = fromGib(quality.overhead_spread_gb ?? 0);
    const slots = Math.abs(parallel - calibration.metadata.settings.num_parallel);
    const grown = fromGib(slots * (band.overhead_gb_per_10k ?? 0) * cells / UNIT);
    const away = cells > padCells(high) || cells < low ? (cells - low) * (cells - high) : 0;
    const curve = fromGib((band.curve_gb_per_10k2 ?? 0) * away / UNIT ** 2);
    return round(Math.max(error * total, (Math.max(error * most, spread) + reading) * times)) + grown + curve;
  }

  const versionOf = text => {
    const match = /^v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?/.exec(text ?? "");
    return match ? [Number(match[1]), Number(match[2]), Number(match[3] ?? 0)] : null;
  };
  const before = (version, other) => {
    const at = version.findIndex((part, index) => part !== other[index]);
    return at >= 0 && version[at] < other[at];
  };

  function goRunner(calibration) {
    const {machine, engine} = calibration.metadata, version = versionOf(engine.version);
    return machine.target !== "host" && calibration.engine === "ollama" && version !== null && before(version, SERVER_SINCE);
  }

  function reserveOf(calibration, overhead) {
    const metadata = calibration.metadata;
    if (metadata.machine.target === "host") return 0;
    if (goRunner(calibration)) return Math.max(GO_MINIMUM - fromGib(metadata.breakdown_gb.overhead ?? 0), 0);
    const {reserve_gb: recorded, start_gb: taken} = metadata.placement;
    const reserve = known(recorded) ? fromGib(recorded) : FIT_TARGET;
    return known(taken) && overhead !== null ? Math.max(reserve - Math.max(overhead - fromGib(taken), 0), 0) : reserve;
  }

  function estimate(calibration, context, parallel) {
    const placement = calibration.metadata.placement;
    if (!known(placement.estimate_base_gb) || !known(placement.estimate_gb_per_10k))
      return predict(calibration, context, parallel).total;
    return fromGib(placement.estimate_base_gb + placement.estimate_gb_per_10k * (context * parallel) / UNIT);
  }

  function batchFits(batch, size, available) {
    const limit = Math.floor(available * FULL / 100);
    return size <= Math.min(limit, Math.floor(available * HEADROOM[batch] / 100)) && SURCHARGE[batch] <= limit - size;
  }

  function batchOf(calibration, context, parallel, available) {
    const measured = [...new Set(calibration.metadata.bands.map(band => band.num_batch).filter(known))].sort((a, b) => a - b);
    if (calibration.engine !== "ollama" || measured.length < 2) return null;
    let wanted = BATCHES.find(([limit]) => context * parallel <= limit)[1];
    const {settings, machine} = calibration.metadata;
    if (settings.flash_attention === "disabled" && machine.meter === "nvml") wanted = 512;
    const size = estimate(calibration, context, parallel);
    while (wanted > measured[0] && wanted in HEADROOM && !batchFits(wanted, size, available)) wanted = Math.floor(wanted / 2);
    const below = measured.filter(batch => batch <= wanted);
    return below.length ? below.at(-1) : measured[0];
  }

  function evictsOthers(calibration, context, parallel, available, loaded) {
    if (calibration.engine !== "ollama") return false;
    if (loaded >= MAX_LOADED * Math.max(calibration.metadata.machine.gpus.length, 1)) return true;
    const batch = batchOf(calibration, context, parallel, available) ?? 0;
    const least = Object.keys(SURCHARGE).map(Number).sort((a, b) => b - a).find(size => batch >= size);
    const surcharge = known(least) ? SURCHARGE[least] : 0;
    return estimate(calibration, context, parallel) + surcharge > Math.floor(available * FULL / 100);
  }

  function layersOf(calibration, needed) {
    const placement = calibration.metadata.placement, count = calibration.metadata.model.layers;
    if (!count) return null;
    let whole = known(placement.layer_weights_gb) ? fromGib(placement.layer_weights_gb) : null;
    if (whole === null || whole > needed.weights) whole = Math.floor(needed.weights * count / (count + 1));
    let dense = (placement.layers_gb ?? []).map(fromGib), experts = (placement.experts_gb ?? []).map(fromGib);
    if (dense.length !== count) [dense, experts] = [Array(count).fill(whole / count), []];
    const outputLast = goRunner(calibration);
    if (outputLast && experts.length) [dense, experts] = [dense.map((one, index) => one + experts[index]), []];
    if (experts.length !== count) experts = Array(count).fill(0);
    return {
      dense, experts,
      cache: caches(placement.layer_kinds, count, needed),
      output: Math.max(needed.weights - sum(dense) - sum(experts), 0),
      expertUse: placement.expert_use ?? 1,
      outputLast,
      total: count + 1,
    };
  }

  function caches(kinds, count, needed) {
    const letters = (kinds ?? "").padEnd(count, "-").slice(0, count);
    const share = (size, those) => {
      const holds = [...letters].map(letter => those.includes(letter));
      const all = holds.some(Boolean) ? holds : holds.map(() => true);
      return all.map(one => one ? size / all.filter(Boolean).length : 0);
    };
    const growing = share(needed.contextCache, "fb"), fixed = share(needed.fixedCache, "wrb");
    return growing.map((size, index) => size + fixed[index]);
  }

  const hostClass = (kinds, total, count) => {
    const host = (kinds ?? "f".repeat(total)).slice(0, Math.max(total - count, 0));
    return `${"fwb".includes(host.at(-1) ?? " ")} ${[...host].some(kind => "fb".includes(kind))}`;
  };

  function interpolate(rows, context) {
    const points = rows.map(row => [row.context, fromGib(row.compute_gb)]).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    if (points.length === 1) return points[0][1];
    let [left, right] = points.slice(-2);
    for (let index = 1; index < points.length; index++) {
      if (context <= points[index][0]) {
        [left, right] = points.slice(index - 1, index + 1);
        break;
      }
    }
    const value = left[1] + (right[1] - left[1]) * (context - left[0]) / (right[0] - left[0]);
    return Math.max(value, context < points[0][0] ? Math.min(...points.map(point => point[1])) : 0);
  }

  class Compute {
    constructor(placement, layers, context, full) {
      this.grid = placement.split_compute ?? [];
      this.kinds = placement.layer_kinds ?? null;
      Object.assign(this, {layers, context, full});
    }

    split(count) {
      const total = this.layers.total;
      if (count >= total) return this.full;
      let rows = this.grid.filter(row => !row.experts_on_host);
      const wanted = hostClass(this.kinds, total, count);
      const oneOff = rows.filter(row => row.layers === total - 1), others = rows.filter(row => row.layers !== total - 1);
      rows = oneOff.length && count === total - 1 ? oneOff : others.length ? others : rows;
      const same = rows.filter(row => hostClass(this.kinds, total, row.layers) === wanted);
      const alike = same.length ? same : rows;
      if (!alike.length) return this.full + Math.max(...this.layers.cache);
      const nearest = alike.reduce((best, row) => Math.abs(row.layers - count) < Math.abs(best.layers - count) ? row : best);
      return interpolate(alike.filter(row => row.layers === nearest.layers), this.context);
    }

    withoutExperts() {
      const rows = this.grid.filter(row => row.experts_on_host);
      return rows.length ? interpolate(rows, this.context) : this.full;
    }
  }

  function place(calibration, context, parallel, budget, batch) {
    const needed = predict(calibration, context, parallel, batch), layers = layersOf(calibration, needed);
    if (layers === null) return null;
    const compute = new Compute(calibration.metadata.placement, layers, context, needed.compute);
    return fill(layers, compute, budget - (needed.overhead ?? 0));
  }

  function fill(layers, compute, budget) {
    const count = layers.dense.length, total = layers.total, moe = layers.experts.some(Boolean);
    const start = offloaded => total - offloaded - (layers.outputLast && offloaded < total ? 1 : 0);
    const weights = (offloaded, overflowing) => {
      const output = offloaded === total || (offloaded && !layers.outputLast);
      return [
        sum(layers.dense.slice(start(offloaded))) + (output ? layers.output : 0),
        sum(layers.experts.slice(start(offloaded), total - overflowing)),
      ];
    };
    const memory = (offloaded, overflowing) => {
      const work = offloaded < total || !overflowing ? compute.split(offloaded) : compute.withoutExperts();
      return sum(weights(offloaded, overflowing)) + sum(layers.cache.slice(start(offloaded))) + work;
    };
    let offloaded = falsePosition(n => memory(n, moe && n ? n - 1 : 0), 0, total, budget);
    let overflowing = moe && offloaded ? offloaded - 1 : 0, extra = 0;
    if (moe && sum(layers.dense) + layers.output + sum(layers.cache) + compute.withoutExperts() < budget) {
      offloaded = total;
      overflowing = total - falsePosition(n => memory(total, total - n), 1, total, budget);
      extra = partOfOneMore(layers, overflowing, budget - memory(total, overflowing));
    }
    const [dense, experts] = weights(offloaded, overflowing);
    return placed(layers, offloaded, Math.min(overflowing, count), dense, experts + extra);
  }

  function partOfOneMore(layers, overflowing, room) {
    const first = layers.total - overflowing;
    const third = overflowing && first < layers.experts.length ? layers.experts[first] / 3 : 0;
    return 2 * third < room ? 2 * third : third < room ? third : 0;
  }

  function falsePosition(memory, low, high, budget) {
    let least = memory(low), most = memory(high);
    if (most <= budget) return high;
    while (high - low > 1) {
      const room = most - least;
      const step = room > 0 && budget >= least ? Math.trunc((high - low) * (budget - least) / room) : high - low - 1;
      const guess = low + Math.min(Math.max(step, 1), high - low - 1), taken = memory(guess);
      if (taken <= budget) [low, least] = [guess, taken];
      else [high, most] = [guess, taken];
    }
    return low;
  }

  function placed(layers, offloaded, overflowing, dense, experts) {
    const allDense = sum(layers.dense) + layers.output, allExperts = sum(layers.experts);
    const work = allDense + allExperts * layers.expertUse, done = dense + experts * layers.expertUse;
    return {total: layers.total, offloaded, overflowing, hostWork: work ? Math.min(Math.max((work - done) / work, 0), 1) : 0};
  }

  const devicesOf = calibration =>
    calibration.metadata.machine.target === "gpu" ? Math.max(calibration.metadata.machine.gpus.length, 1) : 1;

  function judge(calibration, context, parallel, available) {
    const metadata = calibration.metadata, target = metadata.machine.target;
    const needed = predict(calibration, context, parallel), devices = devicesOf(calibration);
    const unknown = reason => ({
      verdict: "unknown", reason, required: needed.withinRange ? needed.total : null, reserve: reserveOf(calibration, needed.overhead),
      available: available.length ? sum(available) : null, short: null, tight: false,
      maxContext: largestContext(calibration, parallel, available),
      layersTotal: known(metadata.model.layers) ? metadata.model.layers + 1 : null,
      layersOffloaded: null, layersOverflowing: null, decode: null,
    });
    if (!needed.withinRange)
      return unknown(`a context of ${context} is beyond ${metadata.quality.valid_to}, the range of this calibration`);
    // Each of several devices has its own margin, which a sum says nothing about: `harness check` lays the model over them.
    if (devices > 1 || available.length !== 1) return unknown("several devices are judged by harness check");
    const [free] = available, batch = batchOf(calibration, context, parallel, free);
    const {total: required, doubt, overhead} = predict(calibration, context, parallel, batch);
    const reserve = reserveOf(calibration, overhead);
    const margin = free - required - reserve, spills = margin < doubt, tight = spills && margin >= -doubt;
    const there = spills && target === "gpu" ? place(calibration, context, parallel, free - reserve, batch) : null;
    const total = there ? there.total : known(metadata.model.layers) ? metadata.model.layers + 1 : null;
    return {
      verdict: spills ? "offload" : "fits", reason: null, required, reserve, available: free, short: Math.max(-margin, 0), tight,
      maxContext: largest(calibration, parallel, free),
      layersTotal: total,
      layersOffloaded: target === "host" ? null : there ? there.offloaded : spills ? null : total,
      layersOverflowing: target === "host" ? null : there ? there.overflowing : spills ? null : 0,
      decode: there || !spills ? decode(calibration, there) : null,
    };
  }

  function decode(calibration, there) {
    const {decode_tokens_per_s: fast = null, host_decode_tokens_per_s: slow = null} = calibration.metadata.performance;
    if (calibration.metadata.machine.target === "host") return fast === null ? slow : fast;
    if (there === null || there.hostWork === 0) return fast;
    if (!fast || !slow) return null;
    return digits(1 / ((1 - there.hostWork) / fast + there.hostWork / slow), 2);
  }

  function largestContext(calibration, parallel, available) {
    return available.length === 1 && devicesOf(calibration) === 1 ? largest(calibration, parallel, available[0]) : null;
  }

  function largest(calibration, parallel, free) {
    const top = calibration.metadata.quality.valid_to;
    const fits = context => {
      const needed = predict(calibration, context, parallel, batchOf(calibration, context, parallel, free));
      return needed.total + needed.doubt + reserveOf(calibration, needed.overhead) <= free;
    };
    if (fits(top)) return top;
    const ends = new Set([0, top, ...calibration.metadata.bands.map(band => band.up_to)]);
    const steps = [...ends].sort((a, b) => a - b);
    for (let index = steps.length - 1; index > 0; index--) {
      const start = steps[index - 1];
      let low = Math.floor(start / PADDING), high = Math.floor(steps[index] / PADDING);
      if (high > low && fits(Math.max(low, 1) * PADDING + (start ? PADDING : 0))) {
        while (high - low > 1) {
          const middle = Math.floor((low + high) / 2);
          if (fits(middle * PADDING)) low = middle;
          else high = middle;
        }
        return (fits(high * PADDING) ? high : low) * PADDING;
      }
    }
    return 0;
  }

  function judgeTogether(requests, available) {
    const found = [], fates = [], resident = [];
    const taken = one => one.verdict === "fits" ? one.required ?? 0 : Math.max((one.available ?? 0) - (one.reserve ?? 0), 0);
    requests.forEach(([calibration, context, parallel], index) => {
      let verdict;
      for (;;) {
        const rest = [Math.max(available[0] - sum(resident.map(one => taken(found[one]))), 0), ...available.slice(1)];
        verdict = judge(calibration, context, parallel, rest);
        if (!resident.length || !evictsOthers(calibration, context, parallel, sum(rest), resident.length)) break;
        fates[resident.shift()] = "evicted";
      }
      found.push(verdict);
      fates.push({fits: "resident", offload: "offload", unknown: null}[verdict.verdict]);
      if (verdict.verdict !== "unknown") resident.push(index);
    });
    return found.map((verdict, index) => ({...verdict, fate: fates[index]}));
  }

  return {predict, judge, judgeTogether, largestContext, place, batchOf};
};
