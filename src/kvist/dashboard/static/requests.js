// The slowest or newest requests as waterfalls: one bar each, in the stages that the server recorded (GET /requests).

import { h } from "./dom.js";
import { count, time } from "./format.js";
import { KeyNeeded, ask } from "./live.js";

const LIMIT = 12;
const KINDS = {
  received: "edge", tokenised: "edge", detokenised: "edge", sent: "edge", other: "edge",
  queued: "wait", grammar: "wait", store: "wait", pages: "wait",
  prefill: "prefill", handoff: "handoff", decode: "decode",
  preempted: "broken", failover: "broken",
};
const LEGEND = [["wait", "waiting"], ["prefill", "prefill"], ["handoff", "handoff"], ["decode", "decode"], ["broken", "interrupted"], ["edge", "gateway"]];

// Returns the requests; a text that says why the server does not show them; null if it does not record any.
export async function readRequests(order) {
  try {
    const response = await ask(`requests?limit=${LIMIT}&order=${order}`);
    return (await response.json()).requests;
  } catch (error) {
    if (error instanceof KeyNeeded || error.status === undefined) throw error;
    return error.status === 404 ? null : error.message;
  }
}

export function requests(found, open, onToggle) {
  const empty = (text) => [h("p", { class: "empty", "data-key": "none" }, text)];
  if (found === null) return empty("This server does not record requests.");
  if (typeof found === "string") return empty(found);
  if (!found.length) return empty("No request has been recorded yet.");
  const longest = Math.max(...found.map((request) => request.duration_s || 0), 1e-6);
  return [
    h("ul", { class: "legend", "data-key": "legend", "aria-label": "Colours of the stages" }, ...LEGEND.map(([kind, label]) => h("li", null, h("i", { class: `swatch ${kind}` }), label))),
    h(
      "table",
      { class: "requests", "data-key": "table" },
      h("thead", null, h("tr", null, ...["Request", "Tokens", "First token", "Total"].map((name) => h("th", { scope: "col" }, name)), h("th", { scope: "col", class: "wide" }, `Stages, of ${time(longest)}`))),
      h("tbody", null, ...found.flatMap((request) => rows(request, longest, open.has(request.id), onToggle))),
    ),
  ];
}

function rows(request, longest, isOpen, onToggle) {
  const cached = Object.values(request.cached_tokens || {}).reduce((sum, each) => sum + each, 0);
  const row = h(
    "tr",
    { "data-key": request.id, class: request.status },
    h("th", { scope: "row" },
      h("button", { type: "button", title: request.id, "aria-expanded": String(isOpen), onclick: () => onToggle(request.id) }, request.id),
      request.status !== "finished" && h("span", { class: `state ${request.status}` }, request.status)),
    h("td", null, `${count(request.prompt_tokens)} → ${count(request.completion_tokens)}`, cached > 0 && h("span", { class: "quiet" }, ` ${count(cached)} cached`)),
    h("td", null, time(request.ttft_s)),
    h("td", null, time(request.duration_s)),
    h("td", { class: "wide" }, waterfall(request, longest)),
  );
  return isOpen ? [row, h("tr", { "data-key": `${request.id} stages`, class: "stages" }, h("td", { colspan: "5" }, stages(request)))] : [row];
}

function waterfall(request, longest) {
  const said = request.stages.map((stage) => `${stage.name} ${time(stage.duration_s)}`).join(", ");
  const parts = request.stages.map((stage, index) =>
    h("i", {
      "data-key": `${index}`,
      class: KINDS[stage.name] || "edge",
      title: `${stage.name}${stage.where ? ` at ${stage.where}` : ""}: ${time(stage.duration_s)}`,
      style: { left: `${(100 * stage.start_s) / longest}%`, width: `max(1px, ${(100 * stage.duration_s) / longest}%)` },
    }),
  );
  return h("div", { class: "waterfall", role: "img", "aria-label": said || "no stages" }, ...parts);
}

function stages(request) {
  const about = [request.id, request.endpoint, request.error && `failed with ${request.error}`, request.finish_reason && `ended by ${request.finish_reason}`, request.workers?.length && `at ${request.workers.join(" and ")}`];
  return [
    h("p", { class: "quiet" }, about.filter(Boolean).join(", ")),
    h(
      "ol",
      null,
      ...request.stages.map((stage) =>
        h("li", null, h("i", { class: `swatch ${KINDS[stage.name] || "edge"}` }), h("b", null, stage.name), ` ${time(stage.duration_s)}`,
          h("span", { class: "quiet" }, ` from ${time(stage.start_s)}`, stage.where && ` at ${stage.where}`, detail(stage.detail)))),
    ),
  ];
}

function detail(value) {
  if (value === null || value === undefined || value === "") return "";
  if (typeof value !== "object") return `, ${value}`;
  const parts = Object.entries(value).map(([name, each]) => `${name.replaceAll("_", " ")} ${typeof each === "number" ? count(each) : each}`);
  return parts.length ? `, ${parts.join(", ")}` : "";
}
