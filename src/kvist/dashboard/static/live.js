// The connection to the server: the API key of this tab, requests, and the stream of snapshots.
// `EventSource` cannot send a key, so the stream is read with `fetch`.

const KEY = "kvist.key";
const SILENT_MS = 10_000; // without an event the stream is taken as broken
const PAUSES_MS = [500, 1000, 2000, 5000];

export class KeyNeeded extends Error {}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

// Returns the response. Throws KeyNeeded for a missing or wrong key, and an Error with the server's message.
export async function ask(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const response = await fetch(path, {
    method,
    headers,
    signal,
    cache: "no-store",
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (response.ok) return response;
  if (response.status === 401) throw new KeyNeeded();
  const error = new Error(await messageOf(response));
  error.status = response.status;
  throw error;
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

// Calls `onSnapshot(snapshot, isFirst)` for each event, and `onState(text)` when the connection changes. Connects again
// after a pause. Returns when a key is needed.
export async function follow(onSnapshot, onState) {
  for (let failures = 0; ; failures += 1) {
    try {
      await readStream((snapshot, isFirst) => {
        failures = 0;
        onState("live");
        onSnapshot(snapshot, isFirst);
      });
      onState("lost", "the stream ended");
    } catch (error) {
      if (error instanceof KeyNeeded) return;
      onState("lost", error.name === "AbortError" ? "the server is silent" : error.message);
    }
    await new Promise((done) => setTimeout(done, PAUSES_MS[Math.min(failures, PAUSES_MS.length - 1)]));
  }
}

async function readStream(onSnapshot) {
  const silence = new AbortController();
  let timer = setTimeout(() => silence.abort(), SILENT_MS);
  try {
    const response = await ask("dashboard/events", { signal: silence.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    let isFirst = true;
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENT_MS);
      const events = (text + value).split("\n\n");
      text = events.pop();
      for (const event of events) {
        const line = event.split("\n").find((each) => each.startsWith("data: "));
        if (!line) continue;
        onSnapshot(JSON.parse(line.slice(6)), isFirst);
        isFirst = false;
      }
    }
  } finally {
    clearTimeout(timer);
  }
}
