// Shows the hint of an element with `data-hint` while the pointer or the keyboard's focus is on it.

import { $ } from "./dom.js";

const DELAY_MS = 500;
const GAP = 8; // pixels
let due = 0;
let isClicked = false; // the pointer has not moved since a click, which may change the page under it
let owner = null; // has the hint
let described = null; // has the pointer or the focus

function hide() {
  clearTimeout(due);
  described?.removeAttribute("aria-describedby");
  owner = described = null;
  if ($("hint").matches(":popover-open")) $("hint").hidePopover();
}

function place() {
  const hint = $("hint");
  hint.textContent = owner.dataset.hint;
  hint.showPopover();
  const [at, size] = [owner.getBoundingClientRect(), hint.getBoundingClientRect()];
  const left = at.left + (at.width - size.width) / 2;
  const below = at.bottom + GAP;
  const isBelow = below + size.height <= innerHeight;
  hint.style.left = `${Math.max(GAP, Math.min(left, innerWidth - size.width - GAP))}px`;
  hint.style.top = `${isBelow ? below : at.top - size.height - GAP}px`;
}

function show({ type, target, pointerType }) {
  const found = target.closest?.("[data-hint]");
  const isUnwanted = type === "focusin" ? !target.matches(":focus-visible")
    : isClicked || pointerType === "touch";
  if (!found || found === owner || isUnwanted) return;
  hide();
  [owner, described] = [found, target];
  described.setAttribute("aria-describedby", "hint");
  $("hint").textContent = owner.dataset.hint;
  due = setTimeout(() => owner?.isConnected && place(), type === "focusin" ? 0 : DELAY_MS);
}

// Ignores moves of the pointer within the element.
const leave = ({ relatedTarget }) => owner?.contains(relatedTarget) || hide();

export function watchHints() {
  for (const type of ["pointerover", "focusin"]) document.addEventListener(type, show);
  for (const type of ["pointerout", "focusout"]) document.addEventListener(type, leave);
  document.addEventListener("pointermove", () => (isClicked = false));
  document.addEventListener("pointerdown", () => {
    isClicked = true;
    hide();
  });
  document.addEventListener("scroll", hide, true);
  document.addEventListener("keydown", ({ key }) => key === "Escape" && hide(), true);
}
