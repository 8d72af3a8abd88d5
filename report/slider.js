"use strict";
// One block of a figure at a time, chosen with a slider.
for (const figure of document.querySelectorAll(".steps")) {
  const steps = [...figure.children];
  if (steps.length < 2) continue;
  const label = document.createElement("label");
  const slider = document.createElement("input");
  Object.assign(slider, { type: "range", min: 0, max: steps.length - 1, value: figure.dataset.start, autocomplete: "off" });
  const show = () => {
    steps.forEach((step, block) => { step.hidden = block !== slider.valueAsNumber; });
    slider.setAttribute("aria-valuetext", steps[slider.valueAsNumber].firstElementChild.textContent);
  };
  slider.addEventListener("input", show);
  label.append("block", slider);
  label.className = "slider";
  figure.before(label);
  figure.classList.add("single");
  show();
}
