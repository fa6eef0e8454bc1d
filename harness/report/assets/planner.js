"use strict";
/* Looks up what Python has worked out (prediction/planner.py): for a context, slots and cards of a table, what holds from how
   many free bytes on. No rule of an engine is here. */
const planner = (() => {
  // The last of the steps [free bytes, value] that begins at or below `free`.
  function at(steps, free) {
    let low = 0, high = steps.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle][0] <= free) low = middle;
      else high = middle;
    }
    return steps[low][1];
  }

  const cellOf = (table, cards, slots, context) => {
    const places = [table.cards.indexOf(cards), table.slots.indexOf(slots), table.contexts.indexOf(context)];
    return places.includes(-1) ? [[], [], "not among what this page was made for"] : places.reduce((cells, place) => cells[place], table.cells);
  };

  function look(table, cards, slots, context, free) {
    const [steps, , reason] = cellOf(table, cards, slots, context);
    if (!steps.length) return {verdict: "unknown", reason, available: free * cards};
    const [verdict, tight, required, reserve, needs, total, offloaded, overflowing, decode] = table.answers[at(steps, free)];
    const short = needs.reduce((sum, need) => sum + Math.max(need - free, 0), 0);
    return {verdict, tight, required, reserve, short, available: free * cards, layersTotal: total, layersOffloaded: offloaded,
      layersOverflowing: overflowing, decode, reason: null};
  }

  // The largest of the table's contexts that fits; 0 where none does, null where that is not known.
  function largest(table, cards, slots, free) {
    const found = table.contexts.map(context => look(table, cards, slots, context, free).verdict);
    if (found.every(verdict => verdict === "unknown")) return null;
    return table.contexts[found.lastIndexOf("fits")] ?? 0;
  }

  const decodeSteps = (table, cards, slots, context) =>
    cellOf(table, cards, slots, context)[0].map(([free, index]) => [free, table.answers[index][8]]);

  // Models started one after the other in one memory: [table, slots, context, engine] each, and the free bytes before the first.
  // An engine ends models of its own alone, the oldest first.
  function together(requests, free) {
    const found = [], fates = [];
    let running = [];
    const taken = one => one.verdict === "fits" ? one.required : Math.max(one.available - one.reserve, 0);
    requests.forEach(([table, slots, context, engine], index) => {
      const {1: evicts} = cellOf(table, 1, slots, context);
      for (;;) {
        const rest = Math.max(running.reduce((left, one) => left - one.size, free), 0);
        found[index] = look(table, 1, slots, context, rest);
        const own = running.filter(one => one.engine === engine);
        const full = table.most_loaded !== null && own.length >= table.most_loaded;
        if (!own.length || !(full || (evicts.length && at(evicts, rest)))) break;
        running = running.filter(one => one !== own[0]);
        fates[own[0].index] = "evicted";
      }
      fates.push({fits: "resident", offload: "offload", unknown: null}[found[index].verdict]);
      if (found[index].verdict !== "unknown") running.push({index, engine, size: taken(found[index])});
    });
    return found.map((answer, index) => ({...answer, fate: fates[index]}));
  }

  return {look, largest, together, decodeSteps};
})();
