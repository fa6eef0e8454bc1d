"use strict";
/* Looks up what Python has worked out (prediction/planner.py): for a context, slots and cards of a table, what holds from how
   many free bytes on. No rule of an engine is here. */
const planner = (() => {
  // Steps are free bytes and a value, in turn: the value of the last one that begins at or below `free`.
  function at(steps, free) {
    let low = 0, high = steps.length / 2;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[2 * middle] <= free) low = middle;
      else high = middle;
    }
    return steps[2 * low + 1];
  }

  const cellOf = (table, cards, slots, context) => {
    const places = [table.cards.indexOf(cards), table.slots.indexOf(slots), table.contexts.indexOf(context)];
    return places.includes(-1) ? [[], [], [], "not among what this page was made for"] : places.reduce((cells, place) => cells[place], table.cells);
  };

  function look(table, cards, slots, context, free) {
    const [steps, layouts, , reason] = cellOf(table, cards, slots, context);
    if (!steps.length) return {verdict: "unknown", reason, available: free * cards};
    const [verdict, tight, required, reserve, needs, growth, calm] = table.answers[at(steps, free)];
    const [layersOffloaded, layersOverflowing, decode] = table.layouts[at(layouts, free)];
    const bounded = table.at_most[table.contexts.indexOf(context)];
    const short = verdict === "unknown" ? null : needs.reduce((sum, need) => sum + Math.max(need - free, 0), 0);
    return {verdict, tight, required, reserve, short, available: free * cards, layersTotal: table.layers_total, layersOffloaded,
      layersOverflowing, decode, bounded, growth, calm, reason: verdict === "unknown" ? "it takes at most this, and may fit or not" : null};
  }

  // The largest of the table's contexts that fits; 0 where none does, null where that is not known or some may.
  function largest(table, cards, slots, free) {
    const answers = table.contexts.map(context => look(table, cards, slots, context, free)), found = answers.map(one => one.verdict);
    const may = !found.includes("fits") && answers.some(one => one.bounded && one.verdict === "unknown");
    if (may || found.every(verdict => verdict === "unknown")) return null;
    return table.contexts[found.lastIndexOf("fits")] ?? 0;
  }

  // Free bytes and the speed from there on.
  function decodeSteps(table, cards, slots, context) {
    const layouts = cellOf(table, cards, slots, context)[1];
    return layouts.flatMap((free, index) => index % 2 ? [] : [[free, table.layouts[layouts[index + 1]][2]]]);
  }

  // Models started one after the other in one memory: [table, slots, context, engine] each, and the free bytes before the first.
  // An engine ends models of its own alone, the oldest first.
  function together(requests, free) {
    const found = [], fates = [];
    let running = [];
    const taken = one => one.verdict === "fits" ? one.required : Math.max(one.available - one.reserve, 0);
    requests.forEach(([table, slots, context, engine], index) => {
      const {2: evicts} = cellOf(table, 1, slots, context);
      for (;;) {
        const rest = Math.max(running.reduce((left, one) => left - one.size, free), 0);
        found[index] = look(table, 1, slots, context, rest);
        // Of what is left, servers that were started before may come to take more, too.
        const before = found[index].before = running.reduce((sum, one) => sum + one.growth, 0);
        if (found[index].verdict === "fits" && found[index].calm) found[index].tight = rest - before < found[index].calm;
        const own = running.filter(one => one.engine === engine);
        const full = table.most_loaded !== null && own.length >= table.most_loaded;
        if (!own.length || !(full || (evicts.length && at(evicts, rest)))) break;
        running = running.filter(one => one !== own[0]);
        fates[own[0].index] = "evicted";
      }
      fates.push({fits: "resident", offload: "offload", unknown: null}[found[index].verdict]);
      if (found[index].verdict !== "unknown") running.push({index, engine, size: taken(found[index]), growth: found[index].growth});
    });
    return found.map((answer, index) => ({...answer, fate: fates[index]}));
  }

  return {look, largest, together, decodeSteps};
})();
