// Numbers as people read them. Unknown values are a dash.

const DASH = "–";
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function count(value) {
  if (value === null || value === undefined) return DASH;
  if (value >= 1e6) return `${(value / 1e6).toFixed(value >= 1e7 ? 0 : 1)}M`;
  if (value >= 1e5) return `${(value / 1e3).toFixed(0)}k`;
  return whole.format(value);
}

export function rate(value) {
  if (value === null || value === undefined) return DASH;
  return value > 0 && value < 10 ? value.toFixed(1) : count(value);
}

export function time(seconds) {
  if (seconds === null || seconds === undefined) return DASH;
  if (seconds >= 100) return `${whole.format(seconds)} s`;
  if (seconds >= 1) return `${seconds.toFixed(seconds >= 10 ? 1 : 2)} s`;
  const ms = seconds * 1000;
  return `${ms >= 10 || ms === 0 ? ms.toFixed(0) : ms.toFixed(1)} ms`;
}

export function share(value) {
  return value === null || value === undefined ? DASH : `${(value * 100).toFixed(0)}%`;
}

export function bytes(value) {
  if (value === null || value === undefined) return DASH;
  const units = ["B", "KB", "MB", "GB", "TB", "PB"];
  let place = 0;
  while (value >= 1000 && place < units.length - 1) {
    value /= 1000;
    place += 1;
  }
  return `${value >= 10 || place === 0 ? value.toFixed(0) : value.toFixed(1)} ${units[place]}`;
}

export function ago(seconds) {
  if (seconds < 1.5) return "now";
  return seconds < 90 ? `${seconds.toFixed(0)} s ago` : `${(seconds / 60).toFixed(0)} min ago`;
}

export function plural(number, one, many = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : many}`;
}
