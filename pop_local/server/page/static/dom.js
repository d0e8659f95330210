// Builds elements, and formats numbers.

const SVG = "http:\/\/www.w3.org/2000/svg"; // a namespace, which the browser never loads

// The paths of icons on a grid of 16 by 16.
const PATHS = {
  rename: "M10.5 3.5l2 2M3 13l.6-2.6 7.6-7.6 2 2-7.6 7.6z",
  save: "M8 2.5v7.5M5 7l3 3 3-3M3 13.5h10",
  remove: "M4 4l8 8M12 4l-8 8",
  settings: "M2 4.5h7M13 4.5h1M2 11.5h1M7 11.5h7M9 2.5h4v4H9zM3 9.5h4v4H3z",
  theme: "M8 2a6 6 0 1 0 0 12 6 6 0 0 0 0-12zM8 2v12a6 6 0 0 0 0-12z",
  attach: "M12.5 7.5l-4.6 4.6a2.8 2.8 0 0 1-4-4l5-5a1.9 1.9 0 0 1 2.7 2.7l-5 5a.9.9 0 0 1-1.3-1.3l4.3-4.3",
};

export const $ = (id) => document.getElementById(id);

export function h(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter(Boolean));
  return element;
}

export function icon(name) {
  const [image, path] = ["svg", "path"].map((tag) => document.createElementNS(SVG, tag));
  image.setAttribute("viewBox", "0 0 16 16");
  image.setAttribute("aria-hidden", "true");
  image.setAttribute("class", `icon ${name}`);
  path.setAttribute("d", PATHS[name]);
  image.append(path);
  return image;
}

// `hint` is shown when the user hovers over the button or focuses it (hints.js).
export function button(content, onclick, ariaLabel, hint = "") {
  const made = h("button", { type: "button", onclick, ariaLabel: ariaLabel ?? content }, content);
  if (hint) made.dataset.hint = hint;
  return made;
}

export const number = (n) => n.toLocaleString("en");
export const counted = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : "s"}`;
export const seconds = (s) => `${s.toFixed(s < 10 ? 2 : 1)} s`;
export const megabytes = (n) => `${number(Math.ceil(n / 1e6))} MB`;
export const duration = (s) => (s < 90 ? `${Math.ceil(s)} s` : `${Math.round(s / 60)} min`);

// Shows a notice above the question ("": hides it).
export const tell = (words) => Object.assign($("notice"), { textContent: words, hidden: !words });

// Notifies users of screen readers, without showing the words.
export const announce = (words) => ($("status").textContent = words);
