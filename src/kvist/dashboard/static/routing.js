// What the router decided, and why: the numbers of each reason, and the last decisions as sentences.

import { h } from "./dom.js";
import { ago, count, plural } from "./format.js";

const REASONS = {
  unified: ["unified worker", "a unified worker serves the request"],
  split: ["split", "a prefill and a decode worker"],
  held: ["held", "decode alone: it holds nearly the whole prompt"],
  prefill_queue: ["prefill queue", "decode alone: the queue at prefill is too long"],
  cheaper: ["cheaper", "decode alone: a handoff would cost more"],
  no_prefill: ["no prefill", "decode alone: no prefill worker is ready"],
  short_answer: ["short answer", "prefill alone: the answer is short"],
  no_decode: ["no decode", "prefill alone: no decode worker is ready"],
};
const SHOWN = 8;

export function routing({ routing: found, time_unix_s: now }) {
  const counts = Object.entries(found.reasons).sort((one, other) => other[1] - one[1]);
  if (!counts.length) return [h("p", { class: "empty", "data-key": "none" }, "No request has been routed yet.")];
  const all = counts.reduce((sum, [, number]) => sum + number, 0);
  const rows = counts.map(([reason, number]) =>
    h("tr", { "data-key": reason }, h("th", { scope: "row" }, h("b", null, name(reason)), h("span", { class: "quiet" }, ` ${effect(reason)}`)),
      h("td", null, count(number)), h("td", null, `${((100 * number) / all).toFixed(0)}%`)));
  return [
    h("table", { class: "reasons", "data-key": "reasons" }, h("caption", { class: "unseen" }, "Routes since the start, by reason"), h("tbody", null, ...rows)),
    found.num_failovers > 0 && h("p", { class: "quiet", "data-key": "failovers" }, `${plural(found.num_failovers, "failover")} to other workers`),
    h("ol", { class: "decisions", "data-key": "decisions", "aria-label": "Last decisions" }, ...found.decisions.slice(0, SHOWN).map((each) => decision(each, now))),
  ];
}

function decision(each, now) {
  const path = each.prefill === each.decode ? each.decode : `${each.prefill} → ${each.decode}`;
  return h(
    "li",
    { "data-key": `${each.request_id} ${each.time_unix_s.toFixed(3)}` },
    h("div", null, h("b", null, path), h("span", { class: `reason ${each.reason}`, title: effect(each.reason) }, name(each.reason)), h("span", { class: "quiet when" }, ago(now - each.time_unix_s))),
    h("p", null, why(each)),
  );
}

// Says what the chosen worker had, and what the best of the others had.
function why(each) {
  const [first, ...rest] = each.candidates;
  if (!first) return `${plural(each.num_prompt_tokens, "prompt token")}.`;
  const others = rest.filter((other) => !other.chosen);
  const parts = [`holds ${known(first)} of ${plural(each.num_prompt_tokens, "token")}${queue(first)}`];
  if (first.served_session) parts.push("same session");
  if (each.cost_ms !== null) parts.push(`cost ${each.cost_ms < 10 ? each.cost_ms.toFixed(1) : count(each.cost_ms)} ms`);
  if (each.num_failovers) parts.push(`after ${plural(each.num_failovers, "failover")}`);
  const best = others[0];
  return `${parts.join(", ")}.${best ? ` Next: ${best.worker_id} holds ${known(best)}${queue(best)}.` : ""}`;
}

function known(candidate) {
  const own = candidate.num_device_tokens + candidate.num_host_tokens + candidate.num_stored_tokens;
  return count(Math.max(own, candidate.num_coming_tokens));
}

function queue(candidate) {
  return candidate.num_pending_tokens > 0 ? `, ${count(candidate.num_pending_tokens)} queued` : "";
}

function name(reason) {
  return REASONS[reason]?.[0] || reason;
}

function effect(reason) {
  return REASONS[reason]?.[1] || "";
}
