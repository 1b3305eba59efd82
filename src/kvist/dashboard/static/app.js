// Starts the page, and carries each snapshot to its parts.

import { say } from "./actions.js";
import { Charts } from "./charts.js";
import { h, show } from "./dom.js";
import { fleet } from "./fleet.js";
import { count, rate, share, time } from "./format.js";
import { KeyNeeded, follow, key } from "./live.js";
import { readRequests, requests } from "./requests.js";
import { routing } from "./routing.js";

const MAX_POINTS = 900;
const REQUESTS_MS = 3000;
const THEMES = { auto: "Theme: auto", light: "Theme: light", dark: "Theme: dark" };
const at = (id) => document.getElementById(id);
const openRequests = new Set();
let charts = null;
let lastRequests = []; // null: this server does not record requests

function onSnapshot(snapshot, isFirst) {
  const { server } = snapshot;
  document.title = `${server.model} · Kvist`;
  at("about").textContent = `${server.model} · ${server.version}`;
  at("main").hidden = false;
  at("main").classList.remove("stale");
  charts ||= new Charts(at("charts"), MAX_POINTS);
  show(at("headline"), ...headline(snapshot));
  show(at("fleet"), ...fleet(snapshot));
  show(at("routing"), ...routing(snapshot));
  charts.add(snapshot.series, isFirst);
}

function headline({ traffic, hit_rate: hits, workers }) {
  const waiting = workers.reduce((sum, worker) => sum + (worker.num_waiting || 0), 0);
  const isNow = hits.cached !== null;
  return [
    figure("Output tokens/s", rate(traffic.output_tokens_per_s), `${count(traffic.num_in_flight)} in flight, ${count(waiting)} waiting`),
    figure("First token, median", time(traffic.ttft_s.p50), `99% within ${time(traffic.ttft_s.p99)}`),
    figure("Between tokens, median", time(traffic.itl_s.p50), `99% within ${time(traffic.itl_s.p99)}`),
    figure("Whole request, median", time(traffic.e2e_s.p50), `99% within ${time(traffic.e2e_s.p99)}`),
    figure(isNow ? "Cache hits" : "Cache hits since start", share(isNow ? hits.cached : hits.cached_total), `${share(isNow ? hits.ceiling : hits.ceiling_total)} possible`),
  ];
}

function figure(label, value, more) {
  return h("div", { "data-key": label }, h("dt", null, label), h("dd", { class: "big" }, value), h("dd", { class: "quiet" }, more));
}

function onState(state, reason) {
  const element = at("connection");
  const text = state === "live" ? "Live" : `Reconnecting: ${reason}`;
  if (element.textContent !== text) element.textContent = text;
  element.className = state;
  if (state !== "live") at("main").classList.add("stale");
}

async function watchRequests() {
  while (lastRequests !== null) {
    if (!document.hidden && !at("main").hidden) await refreshRequests();
    await new Promise((done) => setTimeout(done, REQUESTS_MS));
  }
}

async function refreshRequests() {
  try {
    lastRequests = await readRequests(document.querySelector("input[name=order]:checked").value);
  } catch (error) {
    if (error instanceof KeyNeeded) return; // the stream asks for the key
  }
  showRequests();
}

function showRequests() {
  show(at("requests"), ...requests(lastRequests, openRequests, toggle));
}

function toggle(id) {
  if (!openRequests.delete(id)) openRequests.add(id);
  showRequests();
}

async function run() {
  for (;;) {
    at("forget").hidden = !key.get();
    await follow(onSnapshot, onState);
    at("main").hidden = true;
    at("connection").textContent = "";
    await askForKey(key.get() ? "This key was refused. Check it, and try again." : "");
  }
}

function askForKey(problem) {
  key.forget();
  at("key").hidden = false;
  at("key-problem").textContent = problem;
  const input = at("key-input");
  input.setAttribute("aria-invalid", String(problem !== ""));
  input.focus();
  return new Promise((done) => {
    at("key").querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      key.set(input.value.trim());
      input.value = "";
      at("key").hidden = true;
      done();
    };
  });
}

function setTheme(theme) {
  if (theme === "auto") {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem("kvist.theme");
  } else {
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("kvist.theme", theme);
  }
  at("theme").textContent = THEMES[theme];
  charts?.restyle();
}

function currentTheme() {
  return document.documentElement.dataset.theme || "auto";
}

setTheme(THEMES[localStorage.getItem("kvist.theme")] ? localStorage.getItem("kvist.theme") : "auto");
at("theme").onclick = () => {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(currentTheme()) + 1) % names.length]);
};
at("forget").onclick = () => {
  key.forget();
  location.reload();
};
at("range").onchange = (event) => charts?.setRange(Number(event.target.value));
at("order").onchange = refreshRequests;
at("notice").onclick = () => say("");
document.addEventListener("visibilitychange", () => !document.hidden && refreshRequests());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts?.restyle());
run();
watchRequests();
