"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (query, root = document) => Array.from(root.querySelectorAll(query));
  const byId = (id) => document.getElementById(id);

  // Costs: a sum of factors times sizes of axes; a size is a sum of counts times the surviving fractions of groups.
  const widths = data.groups.map((group) => group.size);
  const cost = (kind) => {
    const left = widths.map((width, group) => width / data.groups[group].size);
    const times = (row, numbers) => row.slice(1).reduce((product, place) => product * numbers[place], row[0]);
    const sum = (rows, numbers) => rows.reduce((total, row) => total + times(row, numbers), 0);
    const sizes = kind.axes.map((rows) => sum(rows, left));
    return sum(kind.terms, sizes);
  };
  const whole = Object.fromEntries(Object.entries(data.kinds).map(([name, kind]) => [name, cost(kind)]));
  const count = (number) => {
    for (const [unit, scale] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
      if (Math.abs(number) >= scale) return `${(number / scale).toFixed(1)} ${unit}`;
    }
    return number.toFixed(0);
  };
  const text = (name, number) => {
    if (name === "ms") return `${number.toPrecision(3)} ms`;
    return count(number) + (name === "bytes" ? "B" : "");
  };
  const show = () => {
    for (const [name, kind] of Object.entries(data.kinds)) {
      const card = byId(`cost-${name}`), now = cost(kind), part = whole[name] ? now / whole[name] : 1;
      card.querySelector(".value").textContent = text(name, now);
      card.querySelector(".detail").textContent = `${(100 * part).toFixed(1)} % of ${text(name, whole[name])}`;
      card.querySelector(".bar i").style.width = `${Math.min(100, 100 * part)}%`;
    }
    widths.forEach((width, group) => {
      const slider = byId(`width-${group}`);
      if (slider) {
        slider.value = width;
        byId(`out-${group}`).textContent = `${width} of ${data.groups[group].size}`;
      }
    });
  };
  const setAll = (choose) => {
    data.groups.forEach((group, place) => { if (!group.held) widths[place] = choose(group); });
    show();
  };
  all("input[data-group]").forEach((slider) => slider.addEventListener("input", () => {
    widths[Number(slider.dataset.group)] = Number(slider.value);
    show();
  }));
  const global = byId("width-all");
  const setShare = (percent) => {
    global.value = percent;
    byId("out-all").textContent = `${percent} %`;
  };
  global.addEventListener("input", () => {
    setShare(Number(global.value));
    setAll((group) => Math.max(1, Math.round(group.size * Number(global.value) / 100)));
  });
  byId("reset").addEventListener("click", () => { setShare(100); setAll((group) => group.size); });
  byId("free").addEventListener("click", () => { setShare(100); setAll((group) => group.size - group.dead); });

  // Groups: all that belongs to one is lit while it is pointed at, or after a click until the next.
  const members = new Map();
  all("[data-groups]").forEach((element) => {
    for (const group of element.dataset.groups.split(" ").filter(Boolean)) {
      if (!members.has(group)) members.set(group, []);
      members.get(group).push(element);
    }
  });
  let pinned = null, lit = null;
  const light = (group) => {
    if (group === lit) return;
    for (const element of members.get(lit) || []) element.classList.remove("lit");
    for (const element of members.get(group) || []) element.classList.add("lit");
    document.body.classList.toggle("choosing", group !== null);
    lit = group;
  };
  const pin = (group) => {
    pinned = pinned === group ? null : group;
    all("button.chip").forEach((chip) => chip.setAttribute("aria-pressed", String(chip.dataset.group === pinned)));
    light(pinned);
  };
  all("button.chip").forEach((chip) => chip.addEventListener("click", () => pin(chip.dataset.group)));
  all("tr[data-groups], g.chip").forEach((element) => {
    const group = element.dataset.group;
    element.addEventListener("pointerenter", () => light(group));
    element.addEventListener("pointerleave", () => light(pinned));
  });
  all("g.chip").forEach((element) => element.addEventListener("click", () => pin(element.dataset.group)));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && pinned !== null) pin(pinned); });

  // Zoom: the drawing has a size of its own, and its frame scrolls.
  const svg = byId("drawing"), frame = byId("frame");
  const natural = svg.viewBox.baseVal.width;
  let scale = 1;
  const zoom = (to) => {
    const before = scale, x = frame.scrollLeft + frame.clientWidth / 2, y = frame.scrollTop + frame.clientHeight / 2;
    scale = Math.min(4, Math.max(0.05, to));
    svg.style.width = `${natural * scale}px`;
    frame.scrollLeft = x * scale / before - frame.clientWidth / 2;
    frame.scrollTop = y * scale / before - frame.clientHeight / 2;
  };
  const fit = () => zoom(Math.min(1, (frame.clientWidth - 2) / natural));
  byId("closer").addEventListener("click", () => zoom(scale * 1.4));
  byId("farther").addEventListener("click", () => zoom(scale / 1.4));
  byId("fit").addEventListener("click", fit);
  zoom(Math.max(0.7, Math.min(1, (frame.clientWidth - 2) / natural)));
  const first = svg.querySelector(".block");
  if (first) {
    const box = first.getBoundingClientRect();
    frame.scrollLeft = box.left + box.width / 2 - frame.getBoundingClientRect().left - frame.clientWidth / 2;
  }
  frame.scrollTop = 0;
  show();
})();
