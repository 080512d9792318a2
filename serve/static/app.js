// The playground: plain modules, no build step, nothing from elsewhere.

import { makeChip } from "./chip.js";
import { takeDrops } from "./drop.js";

const STARTING_CLASSES = 3;
const SAMPLES = {
  digits: ["digits-zero.png", "digits-three.png", "digits-five.png", "digits-eight.png"],
  cifar100: ["photo-woman.jpg", "photo-flower.jpg", "photo-pagoda.jpg"],
};

const $ = (selector, within = document) => within.querySelector(selector);
let token = sessionStorage.getItem("token") || "";
let picture = null; // the file that both models classify
let chosen = 0; // pictures so far: a sample that comes after a later choice is dropped

async function call(path, options = {}) {
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401 && (token = (prompt("This service wants a token") || "").trim())) {
    return call(path, options);
  }
  sessionStorage.setItem("token", token);
  if (!response.ok) {
    const problem = await response.json().catch(() => ({ title: `Status ${response.status}` }));
    throw new Error(problem.detail ? `${problem.title}: ${problem.detail}` : problem.title);
  }
  return response;
}

function split(text, separator) {
  return text.split(separator).map((word) => word.trim()).filter(Boolean);
}

class Panel {
  constructor(section, info) {
    section.append($("#panel").content.cloneNode(true));
    this.section = section;
    this.most = info.limits.classes;
    this.known = new Set(info.classes);
    this.classes = [];
    this.shots = new Map(); // by class, the pictures beside its name
    this.model = null;
    this.latest = 0; // answers to older questions are dropped
    this.made = { text: "", bad: false }; // what there is to say of the model
    this.label = ""; // of the picture
    this.part(".steps").value = info.steps;
    this.part(".steps").max = info.limits.steps;
    this.part("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.add();
      this.generate();
    });
    this.part(".name").addEventListener("keydown", (event) => {
      if (event.isComposing) return; // Enter confirms what an input method offers
      if (event.key === "Enter" && this.part(".name").value.trim()) {
        event.preventDefault();
        this.add();
      } else if (event.key === "Backspace" && !event.repeat && !this.part(".name").value) {
        this.remove(this.classes.length - 1);
      }
    });
    for (const format of ["safetensors", "onnx"]) {
      this.part(`.${format}`).addEventListener("click", (event) => {
        event.preventDefault();
        this.download(format);
      });
    }
  }

  part(selector) {
    return $(selector, this.section);
  }

  say(text, bad = false) {
    this.part(".status").textContent = text;
    this.part(".status").classList.toggle("bad", bad);
  }

  sayMade(label) {
    this.label = label;
    this.say([label, this.made.text].filter(Boolean).join(". "), this.made.bad);
  }

  add(names = this.typed()) {
    for (const name of names) {
      if (!this.classes.includes(name)) this.classes.push(name);
    }
    this.part(".name").value = "";
    this.showChips();
  }

  typed() {
    const text = this.part(".name").value.trim();
    if (this.known.has(text)) return [text]; // its commas are its own
    if (!text.includes(":")) return split(text, ",");
    return split(text, ";").flatMap((part) => {
      const colon = part.includes(":") ? part.indexOf(":") : part.length;
      const names = split(part.slice(0, colon), ",");
      return [...names.slice(0, -1), (names.at(-1) ?? "") + part.slice(colon)]; // the last one's words
    });
  }

  // A class as it was typed: its name, and behind a colon words of which it is any.
  read(text) {
    const colon = this.known.has(text) ? -1 : text.indexOf(":");
    if (colon < 0) return { name: text, words: null };
    const words = split(text.slice(colon + 1), ",");
    return { name: text.slice(0, colon).trim(), words: words.length ? words : null };
  }

  remove(index) {
    for (const name of this.classes.splice(index, 1)) this.shots.delete(name);
    this.showChips();
    this.part(".name").focus();
  }

  take(index, shots) {
    this.shots.set(this.classes[index], shots);
    this.showChips();
    $("input", this.part(".chips").children[index]).focus();
  }

  showChips() {
    this.part(".chips").replaceChildren(
      ...this.classes.map((name, index) =>
        makeChip(name, this.shots.get(name) ?? [], {
          take: (shots) => this.take(index, shots),
          remove: () => this.remove(index),
        }),
      ),
    );
    const many = this.classes.length > this.most;
    this.part(".name").setCustomValidity(many ? `At most ${this.most} classes` : "");
    this.part(".name").reportValidity();
  }

  // The prompt as it travels: JSON, or a form where pictures go with it.
  prompt() {
    const asked = this.classes.map((text) => this.read(text));
    const prompt = JSON.stringify({
      classes: asked.map(({ name }) => name),
      descriptions: asked.map(({ words }) => words),
      seed: Number(this.part(".seed").value),
      steps: Number(this.part(".steps").value),
    });
    const shown = this.classes.flatMap((name, i) => (this.shots.get(name) ?? []).map((file) => [i, file]));
    if (!shown.length) return { headers: { "Content-Type": "application/json" }, body: prompt };
    const form = new FormData();
    form.append("prompt", prompt);
    for (const [i, file] of shown) form.append(`examples[${i}]`, file);
    return { body: form };
  }

  async generate() {
    const turn = ++this.latest;
    this.model = null; // a picture that comes meanwhile waits for the new one
    this.part(".links").hidden = true;
    this.part(".bars").replaceChildren();
    this.made = { text: "Generating…", bad: false };
    this.sayMade("");
    const begin = performance.now();
    try {
      const response = await call("v1/models", { method: "POST", ...this.prompt() });
      const model = await response.json();
      if (turn !== this.latest) return;
      this.model = model;
      const took = Math.round(performance.now() - begin);
      const size = model.parameters.toLocaleString("en");
      const made = `${model.family}, ${size} parameters, ${took} ms`;
      this.made = { text: [made, ...model.warnings].join(". "), bad: model.warnings.length > 0 };
      this.part(".links").hidden = false;
      await this.classify();
    } catch (error) {
      if (turn !== this.latest) return;
      this.made = { text: error.message, bad: true };
      this.sayMade("");
    }
  }

  async classify() {
    this.sayMade("");
    this.part(".bars").replaceChildren();
    if (!this.model || !picture) return;
    const turn = this.latest;
    const asked = picture;
    const late = () => turn !== this.latest || asked !== picture;
    const form = new FormData();
    form.append("images", picture);
    try {
      const response = await call(`v1/models/${this.model.id}/predict`, { method: "POST", body: form });
      const reply = await response.json();
      if (late()) return;
      const { label, probabilities } = reply.predictions[0];
      this.sayMade(label);
      this.part(".bars").replaceChildren(
        ...reply.classes.map((name, index) => {
          const row = document.createElement("li");
          const label = document.createElement("span");
          const bar = document.createElement("meter");
          const value = document.createElement("span");
          const share = `${(100 * probabilities[index]).toFixed(1)} %`;
          label.textContent = name;
          bar.value = probabilities[index];
          bar.setAttribute("aria-label", `${name}: ${share}`);
          value.textContent = share;
          row.append(label, bar, value);
          return row;
        }),
      );
    } catch (error) {
      if (!late()) this.say(error.message, true);
    }
  }

  async download(format) {
    const turn = this.latest;
    this.say("Preparing…"); // the first ONNX file takes seconds
    try {
      const response = await call(`v1/models/${this.model.id}?format=${format}`);
      const [, name] = /filename="([^"]+)"/.exec(response.headers.get("Content-Disposition"));
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await response.blob());
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
      if (turn === this.latest) this.sayMade(this.label);
    } catch (error) {
      if (turn === this.latest) this.say(error.message, true);
    }
  }
}

function show(file, panels) {
  chosen++;
  picture = file;
  const image = $("#shown");
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  image.alt = file.name;
  image.hidden = false;
  $("#hint").hidden = true;
  for (const panel of panels) panel.classify();
}

function takePictures(panels) {
  const input = $("#file");
  input.addEventListener("click", () => (input.value = "")); // the same file again is a change too
  input.addEventListener("change", () => input.files.length && show(input.files[0], panels));
  takeDrops($("#drop"), ([file]) => show(file, panels));
}

function offerSamples(dataset, panels) {
  // of several data sets in one, "a+b", the first has them
  for (const file of SAMPLES[dataset.split("+")[0]] || []) {
    const path = `static/samples/${file}`;
    const button = document.createElement("button");
    const image = document.createElement("img");
    image.src = path;
    image.alt = `Sample: ${file.split(/[-.]/)[1]}`;
    button.append(image);
    button.addEventListener("click", async () => {
      const turn = ++chosen;
      try {
        const content = await (await call(path)).blob();
        if (turn !== chosen) return;
        show(new File([content], file, { type: content.type }), panels);
      } catch (error) {
        if (turn === chosen) panels.forEach((panel) => panel.say(`Sample: ${error.message}`, true));
      }
    });
    $("#samples").append(button);
  }
}

async function begin() {
  try {
    return await (await call("v1/info")).json();
  } catch (error) {
    $("#served").textContent = `${error.message}. Load the page again in a moment.`;
    throw error;
  }
}

const info = await begin();
$("#served").textContent = `${info.families.join(", ")} on ${info.dataset}, up to ${info.limits.classes} classes.`;
for (const name of info.classes) {
  const option = document.createElement("option");
  option.value = name;
  $("#known").append(option);
}
const panels = [...document.querySelectorAll(".side")].map((section) => new Panel(section, info));
const start = Math.min(STARTING_CLASSES, info.limits.classes);
panels.forEach((panel, index) => {
  panel.add(info.classes.slice(index * start, (index + 1) * start));
});
takePictures(panels);
offerSamples(info.dataset, panels);
