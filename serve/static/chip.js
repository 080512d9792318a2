// A class of a prompt: its name, the pictures beside it, and a way to be rid of either.

import { takeDrops } from "./drop.js";

function button(text, label, press) {
  const made = document.createElement("button");
  made.type = "button";
  made.append(text);
  made.setAttribute("aria-label", label);
  made.addEventListener("click", press);
  return made;
}

function thumbnail(file) {
  const image = document.createElement("img");
  image.src = URL.createObjectURL(file);
  image.alt = "";
  image.onload = image.onerror = () => URL.revokeObjectURL(image.src);
  return image;
}

// `take` is called with all pictures there are to be, `remove` when the class is to go.
export function makeChip(name, shots, { take, remove }) {
  const chip = document.createElement("li");
  const text = document.createElement("span");
  text.textContent = name;
  const label = document.createElement("label");
  label.title = `Pictures of ${name}: choose some or drop them here`;
  const input = document.createElement("input");
  input.type = "file";
  input.accept = "image/*";
  input.multiple = true;
  input.setAttribute("aria-label", `Add pictures of ${name}`);
  input.addEventListener("change", () => input.files.length && take([...shots, ...input.files]));
  label.append("+", input);
  takeDrops(chip, (files) => take([...shots, ...files]));
  const pictures = shots.map((file, index) =>
    button(thumbnail(file), `Remove picture ${index + 1} of ${name}`, () => take(shots.filter((_, i) => i !== index))),
  );
  chip.append(text, ...pictures, label, button("×", `Remove ${name}`, remove));
  return chip;
}
