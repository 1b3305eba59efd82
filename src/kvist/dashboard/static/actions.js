// What the operator can do: drain this server, switch a worker's role. Each asks first.

import { h } from "./dom.js";
import { plural } from "./format.js";
import { KeyNeeded, ask } from "./live.js";

const dialog = document.getElementById("dialog");
const notice = document.getElementById("notice");
const ROLES = {
  prefill: "reads prompts and hands their pages over",
  decode: "writes answers",
  unified: "does both",
};

export function say(text) {
  notice.textContent = text;
  notice.hidden = !text;
}

export function askToDrain(server) {
  const open = plural(server.num_open_requests, "request is", "requests are");
  openDialog({
    title: `Drain this ${server.role === "router" ? "router" : "worker"}?`,
    content: [
      h("p", null, `It refuses new requests from now on, and stops after its open ones: ${open} open.`),
      h("p", null, "This cannot be undone here: start the process again afterwards."),
    ],
    verb: "Drain",
    act: async () => {
      await ask("drain", { method: "POST" });
      say("The server is draining.");
    },
  });
}

export function askForRole(worker) {
  const choices = Object.entries(ROLES).map(([role, effect]) =>
    h(
      "label",
      null,
      h("input", { type: "radio", name: "role", value: role, checked: role === worker.role }),
      h("span", null, h("b", null, role), ` ${effect}`),
    ),
  );
  openDialog({
    title: `Role of ${worker.worker_id}`,
    content: [
      h("fieldset", null, h("legend", { class: "unseen" }, "Role"), ...choices),
      h("p", null, "New requests follow the new role at once. Open requests end as they are."),
    ],
    verb: "Switch",
    act: async () => {
      const role = dialog.querySelector("input:checked").value;
      await ask("role", { method: "POST", body: { role, worker: worker.url || worker.worker_id } });
      say(`${worker.worker_id} is switching to ${role}.`);
    },
  });
}

function openDialog({ title, content, verb, act }) {
  const problem = h("p", { class: "problem", role: "alert" });
  const close = () => dialog.close();
  const confirm = h("button", {
    type: "button",
    class: "strong",
    onclick: async () => {
      confirm.disabled = true;
      try {
        await act();
        close();
      } catch (error) {
        problem.textContent = error instanceof KeyNeeded ? "The API key is missing or wrong." : error.message;
        confirm.disabled = false;
      }
    },
  }, verb);
  dialog.replaceChildren(
    h("h2", { id: "dialog-title" }, title),
    ...content,
    problem,
    h("div", { class: "buttons" }, h("button", { type: "button", onclick: close, autofocus: true }, "Cancel"), confirm),
  );
  dialog.showModal();
}
