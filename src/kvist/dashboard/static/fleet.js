// The fleet as the diagram of the README: the router above, prefill and decode below it, and the pool of pages.

import { askForRole, askToDrain } from "./actions.js";
import { h } from "./dom.js";
import { bytes, count, plural, rate, share, time } from "./format.js";

const LANES = [
  ["prefill", "Prefill", "reads the prompt"],
  ["unified", "Unified", "reads and writes"],
  ["decode", "Decode", "writes the answer"],
  ["unknown", "Joining", "role not known yet"],
];

export function fleet(snapshot) {
  const { workers, server } = snapshot;
  const lanes = LANES.map(([role, title, purpose]) => lane(role, title, purpose, workers.filter((each) => each.role === role)));
  const [prefill, unified, decode, unknown] = lanes;
  const pair = prefill && decode ? [prefill, handoff(snapshot.handoffs), decode] : [prefill, decode];
  return [
    gateway(snapshot),
    workers.length
      ? h("div", { class: "lanes", "data-key": "lanes" }, ...pair, unified, unknown)
      : h("p", { class: "empty", "data-key": "none" }, server.role === "router" ? "No worker has joined yet." : "The engine is loading."),
    ...snapshot.pools.map(pool),
  ];
}

function gateway({ server, traffic, routing }) {
  const title = server.role === "router" ? "Router" : "Gateway of this worker";
  const index = routing.num_index_pages
    ? `knows ${count(routing.num_index_pages)} cached pages (${bytes(routing.num_index_bytes)})`
    : null;
  return h(
    "article",
    { class: "card gateway", "data-key": "gateway", "aria-label": title },
    h("h3", null, title, state(server.draining ? "draining" : server.ready ? "ready" : "not ready")),
    h("p", null, h("b", null, count(traffic.num_in_flight)), " in flight"),
    h("p", null, h("b", null, rate(traffic.finished_per_s)), " finished/s"),
    traffic.failed_per_s > 0 && h("p", { class: "bad" }, h("b", null, rate(traffic.failed_per_s)), " failed/s"),
    server.policy && h("p", null, "policy ", h("b", null, server.policy)),
    index && h("p", { class: "quiet" }, index),
    h("button", { type: "button", class: "drain", disabled: server.draining, onclick: () => askToDrain(server) }, server.draining ? "Draining…" : "Drain…"),
  );
}

function lane(role, title, purpose, workers) {
  if (!workers.length) return null;
  return h(
    "section",
    { class: `lane ${role}`, "data-key": role, "aria-label": `${title} workers` },
    h("h3", null, title, h("span", { class: "quiet" }, ` ${purpose}`)),
    ...workers.map(card),
  );
}

function handoff(handoffs) {
  return h(
    "div",
    { class: "between", "data-key": "handoff", role: "group", "aria-label": "Handoffs from prefill to decode" },
    h("p", { class: "big" }, rate(handoffs.received_per_s), h("span", { class: "unit" }, "/s")),
    h("p", { class: "quiet" }, "handoffs"),
    h("svg", { viewBox: "0 0 100 12", "aria-hidden": "true", class: handoffs.received_per_s > 0 ? "moving" : null },
      h("line", { x1: "0", y1: "6", x2: "90", y2: "6" }), h("polygon", { points: "88,1 99,6 88,11" })),
    h("p", null, `${bytes(handoffs.bytes_per_s)}/s`),
    h("p", { class: "quiet" }, `${time(handoffs.mean_s)} each`),
    handoffs.failed_per_s > 0 && h("p", { class: "bad" }, `${rate(handoffs.failed_per_s)} failed/s`),
  );
}

function card(worker) {
  const away = worker.state !== "ready";
  return h(
    "article",
    { class: away ? "card worker away" : "card worker", "data-key": worker.worker_id, "aria-label": `Worker ${worker.worker_id}` },
    h(
      "div",
      { class: "card-title" },
      h("h4", null, worker.worker_id, " "),
      away && state(worker.state),
      !away && h("button", { type: "button", "aria-label": `Role of ${worker.worker_id}…`, onclick: () => askForRole(worker) }, "Role…"),
    ),
    worker.problem && h("p", { class: "bad" }, worker.problem),
    worker.num_running !== null && h("dl", { class: "figures" }, ...figures(worker)),
    worker.pages && meter("Device pages", worker.pages),
    worker.host_pages && meter("Host pages", worker.host_pages),
    worker.storage && storage(worker.storage),
  );
}

function figures(worker) {
  const pairs = [
    ["running", count(worker.num_running)],
    ["waiting", count(worker.num_waiting), worker.num_waiting > 0 ? "wait" : null],
    ["busy", share(worker.busy_share)],
  ];
  if (worker.role !== "decode") {
    pairs.push(["read/s", count(worker.computed_tokens_per_s)]);
    const { cached, ceiling, cached_total: total, ceiling_total: best } = worker.hit_rate;
    pairs.push(["hits", cached === null ? `${share(total)} / ${share(best)}` : `${share(cached)} / ${share(ceiling)}`]);
  }
  if (worker.role !== "prefill") {
    pairs.push(["written/s", count(worker.output_tokens_per_s)]);
    if (worker.role === "decode") pairs.push(["step", time(worker.decode_step_s)]);
  }
  return pairs.map(([name, value, mark]) => h("div", { class: mark, "data-key": name }, h("dt", null, name), h("dd", null, value)));
}

function meter(label, pages) {
  const part = (number) => (pages.total ? number / pages.total : 0);
  const text = `${share(part(pages.used))} used, ${share(part(pages.cached))} cached, of ${plural(pages.total, "page")}`;
  return h(
    "div",
    { class: "meter", "data-key": label },
    h("span", { class: "meter-label", "aria-hidden": "true" }, label),
    h("span", { class: "meter-text", "aria-hidden": "true" }, `${share(part(pages.used))} used · ${share(part(pages.cached))} cached`),
    h(
      "div",
      {
        class: "bar",
        role: "meter",
        "aria-label": label,
        "aria-valuemin": "0",
        "aria-valuemax": "100",
        "aria-valuenow": (part(pages.used) * 100).toFixed(0),
        "aria-valuetext": text,
        title: text,
      },
      h("i", { class: "used", style: { width: `${part(pages.used) * 100}%` } }),
      h("i", { class: "cached", style: { width: `${part(pages.cached) * 100}%` } }),
    ),
  );
}

function storage(found) {
  const broken = found.breaker !== "closed";
  const text = broken ? `${found.backend} store: not used, it hangs or fails` : `${found.backend} store ${found.state}, ${bytes(found.stored_bytes)}`;
  return h("p", { class: broken ? "bad store" : "quiet store", "data-key": "storage" }, text);
}

function pool(found) {
  const used = (part, all) => (all ? part / all : 0);
  const rows = Object.entries(found.stores).map(([name, [part, all]]) =>
    h("li", { "data-key": name }, h("span", null, name), tinyBar(used(part, all), `${name}: ${bytes(part)} of ${bytes(all)}`)),
  );
  return h(
    "article",
    { class: "card pool", "data-key": `pool ${found.location}`, "aria-label": "Mooncake pool" },
    h("h3", null, "Mooncake pool", h("span", { class: "quiet" }, ` ${plural(found.num_stores, "store")}`)),
    found.problem && h("p", { class: "bad" }, found.problem),
    h("p", null, h("b", null, bytes(found.used_bytes)), ` of ${bytes(found.capacity_bytes)} memory`),
    found.ssd_capacity_bytes > 0 && h("p", null, h("b", null, bytes(found.ssd_used_bytes)), ` of ${bytes(found.ssd_capacity_bytes)} SSD`),
    h("p", null, h("b", null, count(found.num_pages)), " pages"),
    rows.length > 0 && h("ul", { class: "stores" }, ...rows),
  );
}

function tinyBar(part, text) {
  return h("div", { class: "bar", role: "img", "aria-label": text, title: text }, h("i", { class: "cached", style: { width: `${part * 100}%` } }));
}

function state(text) {
  return h("span", { class: `state ${text.replace(" ", "-")}` }, text);
}
