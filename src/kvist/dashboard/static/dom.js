// Builds elements, and changes a shown tree into a new one. Elements that stay keep their focus and their place for a
// screen reader. Inline styles are set through `style`, which the Content-Security-Policy allows.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "line", "polygon"]);

// h("p", { class: "quiet", "data-key": id, onclick: f, style: { width: "3%" } }, "text", child, null)
export function h(tag, props, ...children) {
  const element = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element[name] = value;
    else if (name === "style") for (const [property, each] of Object.entries(value)) element.style.setProperty(property, each);
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined && child !== false) element.append(child);
  return element;
}

// Gives `parent` these children. A child with a `data-key` is recognised by it, any other by its place.
export function show(parent, ...children) {
  morphChildren(parent, h("div", null, ...children));
}

function morphChildren(parent, wanted) {
  const keyed = new Map();
  for (const child of parent.children) if (child.dataset.key) keyed.set(child.dataset.key, child);
  let place = parent.firstChild;
  for (const next of [...wanted.childNodes]) {
    const key = next.dataset?.key;
    const known = key ? keyed.get(key) : sameKind(place, next) ? place : null;
    if (!known) {
      parent.insertBefore(next, place);
      continue;
    }
    if (known === place) place = place.nextSibling;
    else parent.insertBefore(known, place);
    if (known.tagName === next.tagName) morph(known, next);
    else known.replaceWith(next);
  }
  while (place) {
    const following = place.nextSibling;
    place.remove();
    place = following;
  }
}

function sameKind(old, next) {
  return old && old.nodeType === next.nodeType && old.tagName === next.tagName && !old.dataset?.key;
}

function morph(old, next) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== next.data) old.data = next.data;
    return;
  }
  for (const { name } of [...old.attributes]) if (name !== "style" && !next.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of next.attributes) {
    if (name !== "style" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  if (old.style.cssText !== next.style.cssText) old.style.cssText = next.style.cssText;
  old.onclick = next.onclick;
  morphChildren(old, next);
}
